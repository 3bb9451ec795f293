"""A TCP proxy on loopback that can cut, refuse, delay and hold its connections."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Iterator

from worker.embedded import free_port, start_broker


class FlakyProxy:
    """Forwards to 127.0.0.1:`target` from `port`; to another target new connections only. One thread serves all."""

    def __init__(self, target: int, port: int) -> None:
        self.target, self.port = target, port
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self.delay_s = 0.0
        self._down = self._closing = self._held = False
        self._listener = socket.create_server(("127.0.0.1", port))
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Drop every connection now; new ones are let through."""
        with self._lock:
            for end in list(self._pairs):
                self._drop(end)

    def down(self, down: bool) -> None:
        """While down, every connection is dropped and new ones end at once."""
        self._down = down
        if down:
            self.cut()

    def hold(self, held: bool) -> None:
        """While held, connections stay and nothing passes. What was sent meanwhile arrives late."""
        self._held = held

    def close(self) -> None:
        self._closing = True
        self._thread.join(timeout=5)
        self.cut()
        self._listener.close()
        self._selector.close()

    def _serve(self) -> None:
        while not self._closing:
            if self._held:
                time.sleep(0.02)
                continue
            for key, _ in self._selector.select(timeout=0.1):
                if self.delay_s:
                    time.sleep(self.delay_s)
                with self._lock:
                    self._accept() if key.fileobj is self._listener else self._forward(key.fileobj)  # type: ignore[arg-type]

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        try:
            if self._down:
                raise ConnectionRefusedError
            server = socket.create_connection(("127.0.0.1", self.target), timeout=2)
        except OSError:
            client.close()
            return
        for here, there in ((client, server), (server, client)):
            here.settimeout(5)
            here.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pairs[here] = there
            self._selector.register(here, selectors.EVENT_READ)

    def _forward(self, source: socket.socket) -> None:
        if source not in self._pairs:
            return
        try:
            content = source.recv(1 << 18)
            if not content:
                raise ConnectionResetError
            self._pairs[source].sendall(content)
        except OSError:
            self._drop(source)

    def _drop(self, end: socket.socket) -> None:
        other = self._pairs.pop(end, None)
        for side in (end, other):
            if side is None:
                continue
            self._pairs.pop(side, None)
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(side)
            side.close()


@contextlib.contextmanager
def flaky_broker() -> Iterator[FlakyProxy]:
    """The way to a broker of the test's own, whose clients have no other."""
    port = free_port()
    behind = start_broker(port=free_port(), advertised=port)
    proxy = FlakyProxy(behind.port, port)
    yield proxy
    proxy.close()
    behind.child.stop(0)
