"""The broker as a process of its own, as tests start it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from worker.embedded import Broker, free_port, start_broker, start_child, wait_for_port


def start_own_broker(
    data: Path | None = None,
    log: Path | None = None,
    port: int | None = None,
    advertised: int | None = None,
    users: Mapping[str, str] | None = None,
    certificate: Path | None = None,
    reading_ms: int = 0,
) -> Broker:
    """A broker with the topics, records and groups of `data`, none by default. Raises EmbeddedError."""
    port = port or free_port()
    command = [sys.executable, "-m", "tests.broker", "--port", str(port), "--advertised", str(advertised or port)]
    command += ["--data", str(data)] if data else []
    command += ["--certificate", str(certificate)] if certificate else []
    command += ["--reading", str(reading_ms)]
    for name, password in (users or {}).items():
        command += ["--user", f"{name}:{password}"]
    child = start_child("the broker of the tests", command, log)
    wait_for_port(child, port)
    return Broker(child, port)


@pytest.fixture(scope="module")
def bootstrap() -> Iterator[str]:
    """The broker that DRIFTKEEL_TEST_BOOTSTRAP names, else our own: for tests of what the embedded one cannot do."""
    if given := os.environ.get("DRIFTKEEL_TEST_BOOTSTRAP"):
        yield given
        return
    broker = start_own_broker()
    yield broker.bootstrap
    broker.child.stop(0)


@contextlib.contextmanager
def broker_for(kind: str) -> Iterator[str]:
    """For measurements: `own`, `embedded`, or the address of a real one."""
    if kind not in ("own", "embedded"):
        yield kind
        return
    broker = start_own_broker() if kind == "own" else start_broker()
    yield broker.bootstrap
    broker.child.stop(0)
