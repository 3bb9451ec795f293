"""The worker's HTTP port: /metrics for Prometheus, /healthz and /readyz for Kubernetes or another supervisor."""

from __future__ import annotations

import contextlib
import io
import logging
import socket
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

log = logging.getLogger("driftkeel.http")
TIMEOUT_S = 10.0
MAX_OPEN = 64  # connections: each takes a thread and a file descriptor, which broker and store need as well
MAX_HEAD_BYTES = 32 << 10  # of a request; those of scrapes and probes have some hundred


@dataclass
class MetricsServer:
    """A running server; `port` is the one it is bound to."""

    port: int
    _server: WSGIServer
    _thread: threading.Thread

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


class _LimitedServer(ThreadingMixIn, WSGIServer):
    """Closes the oldest connection if too many are open. A scrape or a probe ends long before it is the oldest; a
    connection that sends a byte now and then does not."""

    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self._open: OrderedDict[Any, None] = OrderedDict()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._open) >= MAX_OPEN:
            with contextlib.suppress(KeyError, OSError):  # It may have ended meanwhile.
                self._open.popitem(last=False)[0].shutdown(socket.SHUT_RDWR)
        self._open[request] = None
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log it; the library would print it."""
        log.exception("a connection to the metrics port failed")

    def shutdown_request(self, request: Any) -> None:
        self._open.pop(request, None)
        super().shutdown_request(request)


class _Head(io.BufferedReader):
    """A request's head, up to `MAX_HEAD_BYTES`. The library would accept a hundred lines of 64 KB, and take five times
    that memory to parse them."""

    _left = MAX_HEAD_BYTES

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        self._left -= len(line)
        if self._left < 0:
            raise ConnectionError("the request's head is too large")
        return line


class _QuietHandler(WSGIRequestHandler):
    timeout = TIMEOUT_S  # A connection without a request must not keep its thread.
    rbufsize = 0

    def setup(self) -> None:
        super().setup()
        self.rfile: io.BufferedReader = _Head(self.rfile)

    def handle(self) -> None:
        """Without a message about connections that break off or send nothing."""
        with contextlib.suppress(TimeoutError, ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: scrapes come every few seconds."""


def serve_metrics(
    registry: CollectorRegistry, host: str, port: int, alive: Callable[[], bool], unready: Callable[[], str]
) -> MetricsServer:
    """Serve in a thread. `unready` gives the reason in a line, "" when ready. Raises OSError if the port is taken."""
    metrics = make_wsgi_app(registry)
    probes = {"/healthz": lambda: "" if alive() else "the loop stands still", "/readyz": unready}

    def app(environ: dict, start_response: Callable) -> Iterable[bytes]:  # type: ignore[type-arg]
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            # The library fails on some Accept headers. Every scraper accepts plain text.
            with contextlib.suppress(TypeError, ValueError):
                return metrics(environ, start_response)
            return metrics(environ | {"HTTP_ACCEPT": "text/plain"}, start_response)
        if path in probes:
            wrong = probes[path]()
            start_response("503 Service Unavailable" if wrong else "200 OK", [("Content-Type", "text/plain")])
            return [f"not ok: {wrong}\n".encode() if wrong else b"ok\n"]
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"/metrics, /healthz or /readyz\n"]

    def answer(environ: dict, start_response: Callable) -> Iterable[bytes]:  # type: ignore[type-arg]
        try:
            return app(environ, start_response)
        except Exception:
            log.exception("%s cannot be answered", environ.get("PATH_INFO", ""))
            start_response("500 Internal Server Error", [("Content-Type", "text/plain")], sys.exc_info())
            return [b"an error: see the log\n"]

    server = make_server(host, port, answer, _LimitedServer, handler_class=_QuietHandler)
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    return MetricsServer(server.server_port, server, thread)
