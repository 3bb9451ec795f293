"""`driftkeel console`: threads read topics and metrics, an event loop serves the pages."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator

import uvicorn
from pydantic import ValidationError

from meta.bundle_folder import read_manifest
from monitoring.console.app import make_app
from monitoring.console.fleet import Fleet
from monitoring.console.security import is_loopback
from schemas.config import Console, WorkerConfig
from schemas.errors import BundleError, ConfigError, UnreachableError, mistakes
from worker.console.backend import SiteBackend
from worker.console.connections import Impatient
from worker.console.site import WorkerScrape
from worker.console.topics import TopicReader

log = logging.getLogger("driftkeel.console")
MAX_CONNECTIONS = 256


class _Server(uvicorn.Server):
    """Stops on SIGTERM and Ctrl-C with exit code 0, as a worker does, and not by raising the signal again."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end)
        yield

    def _end(self) -> None:
        self.should_exit = True


def overridden(config: WorkerConfig, host: str | None, port: int | None, token: str | None) -> WorkerConfig:
    """`config` with the command line's options for the console. Raises ConfigError."""
    given = {name: value for name, value in (("host", host), ("port", port), ("token", token)) if value is not None}
    try:
        console = Console.model_validate({**config.console.model_dump(), **given})
    except ValidationError as error:
        option, words = mistakes(error)[0]
        raise ConfigError(f"--{option}: {words}") from error
    return config.model_copy(update={"console": console})


def run_console(config: WorkerConfig) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises ConfigError if a token is missing, or the address is taken."""
    settings = config.console
    if not is_loopback(settings.host) and settings.token is None:
        raise ConfigError(
            f"console.host {settings.host} can be reached from elsewhere and needs console.token "
            "(DRIFTKEEL__CONSOLE__TOKEN, at least 16 characters)"
        )
    listening = _listen(settings.host, settings.port)
    stop = threading.Event()
    fleet = Fleet(settings.max_streams, _clean_accuracy(config))
    topics = TopicReader(config.kafka, fleet, stop)
    urls = list(settings.workers) or [f"http://{_reachable(config.metrics.host)}:{config.metrics.port}/metrics"]
    site = WorkerScrape(urls, stop)
    backend = SiteBackend(config, topics, site)
    try:
        fleet.note_stored(backend.known_streams())
    except UnreachableError as error:
        log.warning("%s; its streams show once their records come", error)
    topics.start()
    site.start()
    try:
        _serve(fleet, backend, config, listening)
    finally:
        stop.set()
        backend.close()
        topics.join(timeout=5)


def _serve(fleet: Fleet, backend: SiteBackend, config: WorkerConfig, listening: socket.socket) -> None:
    server: _Server | None = None
    app = make_app(fleet, backend, config.console, lambda: server is not None and server.should_exit)
    server = _Server(
        uvicorn.Config(
            app,
            http=Impatient,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=3,
        )
    )
    # It logs every malformed request: whoever reaches the port could fill the disk.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    host, port = listening.getsockname()[:2]
    print(f"console: http://{f'[{host}]' if ':' in host else host}:{port}/", flush=True)  # noqa: T201
    asyncio.run(server.serve(sockets=[listening]))


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]  # The library repeats the address behind that.
        raise ConfigError(f"console: cannot bind {host}:{port}: {reason}; set console.host or console.port") from error


def _clean_accuracy(config: WorkerConfig) -> float | None:
    """The bundle's accuracy on clean frames; None if there is no bundle where the console runs."""
    try:
        return read_manifest(config.bundle.path).model.clean_accuracy
    except BundleError as error:
        log.warning("%s; the console cannot say how far below clean frames a stream is", error)
        return None


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104 - compared, not bound
