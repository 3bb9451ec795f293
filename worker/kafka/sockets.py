"""Sockets that kafka-python 3.0 leaves open until the next full garbage collection.

Those of connects that fail: a client tries again for as long as its broker is away, so that a long outage, or a
certificate that does not fit, could cost a worker its file descriptors. And those of connections that are closed with
something still to send, as each begins: they wait for that to be sent, and a client that is closed sends nothing more.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from kafka.net.inet import KafkaNetSocket
from kafka.net.transport import KafkaSSLTransport, KafkaTCPTransport


def leave_no_sockets() -> None:
    """From here on, in this process. Again does nothing."""
    connect, shake, close = KafkaNetSocket.sock_connect, KafkaSSLTransport.handshake, KafkaTCPTransport.close
    if getattr(connect, "closing", False):
        return

    async def sock_connect(factory: Any, net: Any, sock: Any, *arguments: Any, **options: Any) -> Any:
        # However it ends: a client that is closed meanwhile ends it with GeneratorExit.
        with ExitStack() as failed:
            failed.callback(sock.close)
            connected = await connect(factory, net, sock, *arguments, **options)
            failed.pop_all()
        return connected

    async def handshake(transport: Any) -> None:
        with ExitStack() as failed:
            failed.callback(transport._sock.close)
            await shake(transport)
            failed.pop_all()

    def close_at_once(transport: Any) -> None:
        transport._write_buffer.clear()  # Whoever wants an answer has waited for it before.
        close(transport)

    sock_connect.closing = True  # type: ignore[attr-defined]
    KafkaNetSocket.sock_connect, KafkaSSLTransport.handshake = sock_connect, handshake
    KafkaTCPTransport.close = close_at_once
