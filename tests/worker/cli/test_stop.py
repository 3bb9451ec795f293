"""Commands that run until they are stopped, where the broker is away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from schemas.errors import UnreachableError
from tests.forked import Forked
from tests.servers import wait_until
from worker.cli.options import until_stopped
from worker.embedded import free_port

PRODUCE = ["produce", "lavfi:testsrc=rate=10", "--stream", "cam"]


@pytest.fixture
def as_it_was() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def started(folder: Path, command: list[str], **environment: str) -> tuple[Forked, Path]:
    said = folder / "said"
    address = f"127.0.0.1:{free_port()}"
    return Forked([*command, "--bootstrap", address], folder / "shown", said, **environment), said


@pytest.mark.parametrize(("command", "number"), [(["watch"], signal.SIGINT), (PRODUCE, signal.SIGTERM)])
def test_to_stop_while_a_broker_is_waited_for_is_no_error(
    command: list[str], number: signal.Signals, tmp_path: Path
) -> None:
    process, said = started(tmp_path, command)
    wait_until(lambda: "trying again" in said.read_text(), "a first try")
    process.send_signal(number)
    assert process.wait(240) == 0
    assert "is it running" not in said.read_text()


def test_a_broker_that_never_answers_is_an_error_in_text(tmp_path: Path) -> None:
    """`log.format` is for services. No other command writes JSON for people to read, terminal or not."""
    process, said = started(
        tmp_path, ["watch"], DRIFTKEEL__KAFKA__CONNECT_TIMEOUT_S="0.1", DRIFTKEEL__LOG__FORMAT="json"
    )
    assert process.wait(240) == 1
    assert "{" not in said.read_text()
    assert said.read_text().splitlines()[-1].startswith("driftkeel: the broker at 127.0.0.1:")


def test_what_fails_by_itself_is_an_error_still(as_it_was: None) -> None:
    """Threads set the event, too, when one of them has failed."""

    def fail(stop: threading.Event) -> None:
        stop.set()
        raise UnreachableError("the broker is away")

    with pytest.raises(UnreachableError), until_stopped() as stop:
        fail(stop)
