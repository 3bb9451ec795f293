"""The store protocol over every form of URL: Cluster, Sentinel, TLS, users with few rights."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
import trustme

from schemas.config import Store
from schemas.errors import ConfigError, LoginError, UnreachableError
from tests.chaos.proxy import FlakyProxy
from tests.servers import (
    TlsProxy,
    cluster_node,
    store_cluster,
    store_with_replica,
    store_with_sentinel,
    wait_until,
    write_certificates,
)
from worker.embedded import free_port, start_store
from worker.kafka.client import until_reached
from worker.store.client import connect
from worker.store.store import StateStore, Write

OpenStore = Callable[[Store], StateStore]
DISK_S = 120.0  # for a store to write down what it has; a disk may be slow
STREAMS = [f"cam-{i}" for i in range(40)]


SECURE_PAGE = (Path(__file__).parents[3] / "docs" / "secure.md").read_text()


def documented(begin: str) -> str:
    """The permissions on the page that begin so."""
    (found,) = set(re.findall(rf"`({re.escape(begin)}[^`]*)`", SECURE_PAGE))
    assert isinstance(found, str)
    return found


RIGHTS, OF_A_CLUSTER, OF_A_SENTINEL = map(documented, ("-@all +@read", "+cluster", "-@all +auth"))


def admit(port: int, rights: str) -> None:
    """Let a user `worker` in, who may do so much, and nobody else."""
    admin = redis.Redis(port=port, socket_timeout=120)
    line = f"on >geheim resetkeys ~driftkeel:* resetchannels {rights}"
    admin.execute_command("ACL", "SETUSER", "worker", *line.split())
    admin.execute_command("ACL", "SETUSER", "default", "off")
    admin.close()


def exercise(store: StateStore) -> None:
    """All that a worker and an operator do."""
    assert {c.token for c in store.claim(STREAMS, "old")} == {1}
    assert {c.token for c in store.claim(STREAMS, "w")} == {2}
    assert store.write([Write(s, 1, 1, b"z", b"z", b"z") for s in STREAMS]) == [False] * 40
    assert (
        store.write([Write(s, 2, 1, s.encode(), b"e", b"t" * 5_000, snapshot=s.encode()) for s in STREAMS])
        == [True] * 40
    )
    assert [c.header for c in store.claim(STREAMS, "w2")] == [s.encode() for s in STREAMS]
    assert sorted(store.streams()) == sorted(STREAMS)
    assert store.snapshots("cam-3") == [b"cam-3"]
    assert store.snapshot("cam-3", 1) == (1, b"cam-3", b"t" * 5_000)
    assert store.read("cam-7").token == 3
    assert [(o.owner, o.tensor_bytes, o.snapshots) for o in store.overview(STREAMS)] == [("w2", 5_000, 1)] * 40
    partitions = [("frames", i) for i in range(9)]
    store.mark("group", {p: 10 + p[1] for p in partitions})
    assert store.marks("group", [*partitions, ("frames", 99)]) == {p: 10 + p[1] for p in partitions}
    assert store.marks("other", partitions) == {}


def test_a_cluster_of_three_nodes(tmp_path: Path, open_store: OpenStore) -> None:
    with store_cluster(tmp_path) as nodes:
        watching = [redis.Redis(port=node.port, single_connection_client=True, socket_timeout=120) for node in nodes]
        for node in nodes:
            admit(node.port, f"{RIGHTS} {OF_A_CLUSTER}")
        url = f"redis+cluster://worker:geheim@127.0.0.1:{nodes[0].port},127.0.0.1:{nodes[1].port}"
        store = open_store(Store(url=url))
        store.ping()
        exercise(store)
        assert all(client.dbsize() > 0 for client in watching)
        for client in watching:
            client.close()
        # One node is away: an error that the worker heals from, and no other.
        nodes[1].child.stop(DISK_S)
        with pytest.raises(UnreachableError):
            store.claim(STREAMS, "w3")
        nodes[1] = cluster_node(tmp_path / "1", nodes[1].port)
        admit(nodes[1].port, f"{RIGHTS} {OF_A_CLUSTER}")
        wait_until(lambda: _claims(store), "the Cluster answering again")
        assert {len(c.tensors or b"") for c in store.claim(STREAMS, "w4")} == {5_000}


def test_a_cluster_that_does_not_tell_its_layout(tmp_path: Path, open_store: OpenStore) -> None:
    """redis-py takes it for a server that is in no Cluster."""
    server = cluster_node(tmp_path)
    admit(server.port, RIGHTS)
    store = open_store(Store(url=f"redis+cluster://worker:geheim@127.0.0.1:{server.port}"))
    with pytest.raises(UnreachableError, match=r"refuses a command: .* no permissions to run the 'cluster\|slots'"):
        store.ping()
    server.child.stop()
    server = start_store(tmp_path / "single")
    with pytest.raises(UnreachableError, match=r"does not answer: .*Cluster mode is not enabled"):
        open_store(Store(url=f"redis+cluster://127.0.0.1:{server.port}")).ping()
    server.child.stop()


def test_sentinels_with_a_password_of_their_own(tmp_path: Path, open_store: OpenStore) -> None:
    with store_with_sentinel(tmp_path) as (_, _, port):
        admin = redis.Redis(port=port, socket_timeout=120)
        admin.execute_command("ACL", "SETUSER", "asks", "on", ">sesam", *OF_A_SENTINEL.split())
        admin.execute_command("ACL", "SETUSER", "default", "resetpass", ">geheim")
        admin.close()
        url = f"redis+sentinel://127.0.0.1:{port}/driftkeel/0"
        open_store(Store(url=url, sentinel_username="asks", sentinel_password="sesam")).ping()
        open_store(Store(url=url, sentinel_password="geheim")).ping()
        for wrong in (None, "falsch"):
            with pytest.raises(LoginError) as caught:
                open_store(Store(url=url, sentinel_password=wrong)).ping()
            assert str(caught.value) == (
                f"a Sentinel of the store at {url} refuses the login; correct store.sentinel_username and "
                "store.sentinel_password"
            )


def test_a_sentinel_that_is_away_is_asked_once(tmp_path: Path, open_store: OpenStore) -> None:
    """One that hangs, as with the node of the old primary, would hold up a failover for a minute."""
    asked = 0

    def turn_away(server: socket.socket) -> None:
        nonlocal asked
        with contextlib.suppress(OSError):
            while True:
                server.accept()[0].close()
                asked += 1

    with store_with_sentinel(tmp_path) as (_, _, port), socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=turn_away, args=[server])
        thread.start()
        away = server.getsockname()[1]
        open_store(Store(url=f"redis+sentinel://127.0.0.1:{away},127.0.0.1:{port}/driftkeel/0")).ping()
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert asked == 1


def test_a_failover_by_sentinel(tmp_path: Path, open_store: OpenStore) -> None:
    with store_with_sentinel(tmp_path) as (primary, replica, port):
        unknown = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{port}/other/0"
        with pytest.raises(UnreachableError) as caught:
            open_store(Store(url=unknown)).ping()
        cause = "No master found for 'other' : network:ConnectionError"
        assert str(caught.value) == f"the store at {unknown} does not answer: {cause}"
        store = open_store(Store(url=f"redis+sentinel://127.0.0.1:{port}/driftkeel/0"))
        exercise(store)
        store.reconnected()
        link = redis.Redis(port=replica.port, socket_timeout=120)
        offset = redis.Redis(port=primary.port, socket_timeout=120).info("replication")["master_repl_offset"]
        wait_until(lambda: link.info("replication")["slave_repl_offset"] >= offset, "the replica catching up")
        with redis.Redis(port=port, socket_timeout=120) as sentinel:
            sentinel.execute_command("SENTINEL", "SET", "driftkeel", "down-after-milliseconds", "500")
        primary.child.stop(0)
        wait_until(lambda: _claims(store), "the failover")
        assert link.role()[0] == b"master"
        assert store.reconnected()
        assert {len(c.tensors or b"") for c in store.claim(STREAMS, "w4")} == {5_000}
        link.close()


def test_a_planned_failover_behind_one_address(tmp_path: Path, open_store: OpenStore) -> None:
    """Which leaves the connections to the old primary open."""
    primary, replica = store_with_replica(tmp_path)
    proxy = FlakyProxy(primary.port, free_port())
    store = open_store(Store(url=f"redis://127.0.0.1:{proxy.port}/0"))
    exercise(store)
    store.reconnected()
    with (
        redis.Redis(port=primary.port, socket_timeout=120) as admin,
        redis.Redis(port=replica.port, socket_timeout=120) as successor,
    ):
        admin.execute_command("FAILOVER", "TO", "127.0.0.1", replica.port)
        wait_until(lambda: successor.role()[0] == b"master", "the failover")
    with pytest.raises(UnreachableError, match="read only replica"):
        store.claim(STREAMS, "w3")
    proxy.target = replica.port
    wait_until(lambda: _claims(store), "the new primary")
    assert store.reconnected()
    assert {len(c.tensors or b"") for c in store.claim(STREAMS, "w4")} == {5_000}
    store.close()  # before the proxy
    proxy.close()
    for server in (primary, replica):
        server.child.stop()


def _claims(store: StateStore) -> bool:
    try:
        store.claim(STREAMS, "w")
    except UnreachableError:
        return False
    return True


def test_tls_with_a_client_certificate(
    tmp_path: Path, store_url: str, store_settings: Store, open_store: OpenStore
) -> None:
    authority = trustme.CA()
    files = write_certificates(authority, tmp_path)
    target = int(store_url.rsplit(":", 1)[1].split("/")[0])
    proxy = TlsProxy(target, authority, free_port(), client_certificate=True)
    settings = store_settings.model_copy(update={"url": _secret(f"rediss://127.0.0.1:{proxy.port}/0"), **files})
    store = open_store(settings)
    exercise(store)
    store.close()  # before the proxy
    for missing in ({"ssl_cafile": None}, {"ssl_certfile": None, "ssl_keyfile": None}):
        with pytest.raises(UnreachableError, match="does not answer"):
            open_store(settings.model_copy(update=missing)).ping()
    with pytest.raises(ConfigError, match="no file nowhere"):
        open_store(settings.model_copy(update={"ssl_cafile": "nowhere.pem"})).ping()
    proxy.close()


def test_tls_to_sentinel_and_cluster_uses_the_same_files(tmp_path: Path) -> None:
    files = write_certificates(trustme.CA(), tmp_path)
    client = connect(Store(url="rediss+sentinel://u:p@127.0.0.1:1/name/2", **files))
    arguments = client.connection_pool.connection_kwargs
    assert (arguments["ssl_ca_certs"], arguments["username"], arguments["db"]) == (files["ssl_cafile"], "u", 2)
    asked = client.connection_pool.sentinel_manager.sentinels[0].connection_pool
    assert asked.connection_class is redis.SSLConnection
    assert asked.connection_kwargs["ssl_ca_certs"] == files["ssl_cafile"]


def test_a_full_store_is_named_as_the_cause_without_the_script(tmp_path: Path, open_store: OpenStore) -> None:
    server = start_store(tmp_path)
    admin = redis.Redis(port=server.port, socket_timeout=120)
    store = open_store(Store(url=f"redis://127.0.0.1:{server.port}/0"))
    store.claim(["cam"], "w")
    admin.config_set("maxmemory", 1)
    with pytest.raises(UnreachableError) as caught:
        store.write([Write("cam", 1, 1, b"header", b"event", b"tensors")])
    assert str(caught.value) == (
        f"the store at redis://127.0.0.1:{server.port}/0 refuses a command: "
        "command not allowed when used memory > 'maxmemory'."
    )
    admin.close()
    server.child.stop()


def test_a_user_with_the_rights_that_the_docs_name(tmp_path: Path, open_store: OpenStore) -> None:
    server = start_store(tmp_path)
    admit(server.port, RIGHTS)
    store = open_store(Store(url=f"redis://worker:geheim@127.0.0.1:{server.port}/0"))
    exercise(store)
    with pytest.raises(UnreachableError, match="refuses a command"):
        open_store(Store(url=f"redis://worker:geheim@127.0.0.1:{server.port}/0", prefix="other")).claim(["cam"], "w")
    with pytest.raises(UnreachableError, match="refuses the login") as caught:
        open_store(Store(url=f"redis://worker:falsch@127.0.0.1:{server.port}/0")).ping()
    assert "falsch" not in str(caught.value)
    server.child.stop()


@pytest.mark.parametrize("login", ["worker:falsch@", "nobody:geheim@", ""])
@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
def test_a_refused_login_is_not_tried_again(scheme: str, login: str, tmp_path: Path, open_store: OpenStore) -> None:
    server = start_store(tmp_path) if scheme == "redis" else cluster_node(tmp_path)
    admit(server.port, f"{RIGHTS} {OF_A_CLUSTER}")
    store = open_store(Store(url=f"{scheme}://{login}127.0.0.1:{server.port}"))
    with pytest.raises(ConfigError, match=r"refuses the login: .*; correct user and password in store\.url$") as caught:
        until_reached(store.ping, "the store", timeout_s=1)
    assert "falsch" not in str(caught.value)
    server.child.stop()


def assert_may_heal(store: StateStore, said: str) -> None:
    with pytest.raises(UnreachableError, match=said) as caught:
        until_reached(store.ping, "the store", timeout_s=0.1)
    assert not isinstance(caught.value, LoginError)


def test_a_store_that_loads_its_data_may_heal(tmp_path: Path, open_store: OpenStore) -> None:
    server = start_store(tmp_path)
    with redis.Redis(port=server.port, socket_timeout=120) as client, client.pipeline(transaction=False) as pipeline:
        for i in range(40_000):
            pipeline.set(f"key-{i}", "x")
        pipeline.execute()
        client.bgrewriteaof()
        wait_until(lambda: client.info("persistence")["aof_base_size"] > 100_000, "the data in one piece")
    server.child.stop(DISK_S)
    # A millisecond a key. It answers once in some dozens of them.
    slowly = ["--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024"]
    server = start_store(tmp_path, options=slowly)
    assert_may_heal(open_store(Store(url=f"redis://127.0.0.1:{server.port}")), "loading the dataset")
    server.child.stop(0)


def test_a_replica_without_its_primary_may_heal(tmp_path: Path, open_store: OpenStore) -> None:
    alone = ["--replicaof", "127.0.0.1", str(free_port()), "--replica-serve-stale-data", "no"]
    server = start_store(tmp_path, options=alone)
    assert_may_heal(open_store(Store(url=f"redis://127.0.0.1:{server.port}")), "Link with MASTER is down")
    server.child.stop()


def test_a_command_that_is_refused_may_be_granted(tmp_path: Path, open_store: OpenStore) -> None:
    server = start_store(tmp_path)
    admit(server.port, "-@all +hello +client")
    store = open_store(Store(url=f"redis://worker:geheim@127.0.0.1:{server.port}"))
    assert_may_heal(store, "no permissions to run the 'ping' command")
    server.child.stop()


def test_new_connections_are_noticed(store_url: str, store_settings: Store, open_store: OpenStore) -> None:
    proxy = FlakyProxy(int(store_url.rsplit(":", 1)[1].split("/")[0]), free_port())
    store = open_store(store_settings.model_copy(update={"url": _secret(f"redis://127.0.0.1:{proxy.port}/0")}))
    store.ping()
    assert not store.reconnected()
    store.ping()
    assert not store.reconnected()
    proxy.cut()
    wait_until(lambda: _claims(store), "another connection")
    with pytest.raises(UnreachableError, match="may have lost its last writes"):
        store.mark("group", {("frames", 0): 1})
    assert store.reconnected()
    assert not store.reconnected()
    store.mark("group", {("frames", 0): 1})
    store.close()  # before the proxy
    proxy.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis+sentinel://a:1", "needs the service's name"),
        ("redis+cluster://a:x", "is no host:port"),
        ("redis://a:x", "cannot be used"),
        ("redis://:pa/ss@a:1", "percent-encoded"),
        ("redis://a:1/0?db=x", "an option behind"),
        ("redis://a:1/0?unknown=x", "an option behind"),
        ("redis://a:1/zero", "its database"),
        ("rediss://a:1/1/2", "its database"),
        ("redis+sentinel://a:1/service/x", "its database"),
    ],
)
def test_urls_that_cannot_be_used(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        connect(Store(url=url))
    assert "pa/ss" not in str(caught.value)


def _secret(url: str) -> object:
    return type(Store().url)(url)
