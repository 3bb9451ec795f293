"""Closes sockets that kafka-python 3.0.12 leaves open, until the next full garbage collection or for ever:

- Sockets of failed connects. A client tries again for as long as its broker is away, so that a long outage, or a wrong
  certificate, could use up a worker's file descriptors.
- Sockets of connections that are closed with something still to send, as every new one has. They wait until it is sent,
  but a closed client sends nothing more.
- Sockets of TLS handshakes that nobody answers, as with a node that hangs or a port without TLS. The client waits
  without end, and so does all that is to be sent to that node.
"""

from __future__ import annotations

import ssl
import time
from contextlib import ExitStack
from typing import Any

from kafka.errors import KafkaTimeoutError
from kafka.net.inet import KafkaNetSocket
from kafka.net.transport import KafkaSSLTransport, KafkaTCPTransport

HANDSHAKE_S = 10.0  # as long as the client waits for a connection without TLS


def leave_no_sockets() -> None:
    """Patch this process. Calling it again does nothing."""
    connect, close = KafkaNetSocket.sock_connect, KafkaTCPTransport.close
    if getattr(connect, "closing", False):
        return

    async def sock_connect(factory: Any, net: Any, sock: Any, *arguments: Any, **options: Any) -> Any:
        # An ExitStack closes it for whatever reason it ends: a client that is closed meanwhile raises GeneratorExit.
        with ExitStack() as failed:
            failed.callback(sock.close)
            connected = await connect(factory, net, sock, *arguments, **options)
            failed.pop_all()
        return connected

    async def handshake(transport: Any) -> None:
        with ExitStack() as failed:
            failed.callback(transport._sock.close)
            await _shake(transport._net, transport._sock)
            failed.pop_all()

    def close_at_once(transport: Any) -> None:
        transport._write_buffer.clear()  # Whoever needs an answer has waited for it before.
        close(transport)

    sock_connect.closing = True  # type: ignore[attr-defined]
    KafkaNetSocket.sock_connect, KafkaSSLTransport.handshake = sock_connect, handshake
    KafkaTCPTransport.close = close_at_once


async def _shake(net: Any, sock: ssl.SSLSocket) -> None:
    """Raises TimeoutError."""
    until = time.monotonic() + HANDSHAKE_S
    try:
        while True:
            try:
                sock.do_handshake()
            except ssl.SSLWantReadError:
                await net.wait_read(sock, timeout_at=until)
            except ssl.SSLWantWriteError:
                await net.wait_write(sock, timeout_at=until)
            else:
                return
    except KafkaTimeoutError as error:
        raise TimeoutError(f"no answer in TLS for {HANDSHAKE_S:g} s") from error
