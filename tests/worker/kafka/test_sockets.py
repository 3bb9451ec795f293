"""No failed connect leaves its socket open, nor does a connection that is closed as it begins; and each ends."""

from __future__ import annotations

import errno
import gc
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import trustme
from kafka import KafkaAdminClient
from kafka.errors import KafkaError
from kafka.net.inet import KafkaNetSocket
from kafka.net.selector import NetworkSelector
from kafka.net.transport import KafkaTCPTransport

from tests.servers import TlsProxy
from worker.embedded import free_port
from worker.kafka import sockets
from worker.kafka.client import open_client
from worker.kafka.sockets import leave_no_sockets

HURRIED = {"bootstrap_timeout_ms": 400, "reconnect_backoff_ms": 20, "reconnect_backoff_max_ms": 20}


def open_sockets() -> set[int]:
    # By type alone: some of what else there is warns when it is asked for its class.
    found = (thing for thing in gc.get_objects() if type(thing) in (socket.socket, ssl.SSLSocket))
    return {thing.fileno() for thing in found} - {-1}


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Connects that nobody accepts; the kernel makes them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def fail_to_open(port: int, **arguments: Any) -> set[int]:
    """Sockets that are open after a client did not reach its broker, and were not before; no collection meanwhile."""
    gc.collect()
    gc.disable()
    try:
        before = open_sockets()
        with pytest.raises(KafkaError):
            open_client(KafkaAdminClient, bootstrap_servers=f"127.0.0.1:{port}", **HURRIED, **arguments)
        return open_sockets() - before
    finally:
        gc.enable()


def test_clients_of_ours_are_opened_so_in_any_process() -> None:
    """Here the tests have seen to it."""
    program = """
from kafka import KafkaAdminClient
from kafka.errors import KafkaError
from kafka.net.inet import KafkaNetSocket
from worker.kafka.client import open_client
try:
    open_client(KafkaAdminClient, bootstrap_servers="127.0.0.1:1", bootstrap_timeout_ms=1)
except KafkaError:
    print(KafkaNetSocket.sock_connect.closing)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "True\n"


def test_where_nobody_listens() -> None:
    assert not fail_to_open(free_port())


def test_where_the_time_is_over_as_the_connect_succeeds(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = KafkaNetSocket.connect_ex
    attempts: list[int] = []

    def slow(factory: KafkaNetSocket, sock: socket.socket, address: Any) -> int:
        attempts.append(connect(factory, sock, address))
        return errno.EINPROGRESS

    monkeypatch.setattr(KafkaNetSocket, "connect_ex", slow)
    assert not fail_to_open(listener.getsockname()[1])
    assert attempts


def test_where_the_certificate_is_not_trusted(listener: socket.socket) -> None:
    proxy = TlsProxy(listener.getsockname()[1], trustme.CA(), free_port())
    try:
        context = ssl.create_default_context()
        assert not fail_to_open(proxy.port, security_protocol="SSL", ssl_context=context)
    finally:
        proxy.close()


def test_where_nobody_answers_in_tls(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that hangs, or a port that takes what comes for the beginning of a long request."""
    monkeypatch.setattr(sockets, "HANDSHAKE_S", 0.1)
    context = ssl.create_default_context()
    assert not fail_to_open(listener.getsockname()[1], security_protocol="SSL", ssl_context=context)


def test_a_connection_that_is_closed_before_it_has_sent_leaves_no_socket() -> None:
    ours, theirs = socket.socketpair()
    leave_no_sockets()
    net = NetworkSelector()
    transport = KafkaTCPTransport(net, ours)
    transport._write_buffer.append(b"not sent yet")
    transport.close()
    assert ours.fileno() == -1
    theirs.close()
    net.close()
