"""New streams where the store is to have so many at most, and what is deleted from a store that is full."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from pydantic import SecretStr

from schemas.config import Store
from schemas.errors import UnreachableError
from tests.servers import store_cluster
from worker.control import retire
from worker.embedded import start_store
from worker.store.store import StateStore, Write
from worker.streams import newcomers
from worker.streams.newcomers import Newcomers


class Shelf:
    """A store that is counted."""

    def __init__(self, streams: int) -> None:
        self.streams, self.counted = streams, 0

    def count(self) -> int:
        self.counted += 1
        return self.streams


def test_no_more_begin_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(990)
    room = Newcomers(1_000, shelf.count)
    given = 0
    for wanted in (3, 1, 0, 20):
        now = room.admit(wanted)
        shelf.streams += now
        given += now
    assert (given, shelf.streams) == (10, 1_000)
    counted = shelf.counted
    assert room.admit(5) == 0  # and it is not counted for every frame
    assert shelf.counted == counted
    shelf.streams = 900
    monkeypatch.setattr(newcomers, "COUNT_AGAIN_S", 0.0)
    room._full_until = 0.0
    assert room.admit(5) == 5


def test_many_streams_at_once_are_counted_seldom() -> None:
    shelf = Shelf(0)
    assert Newcomers(10_000, shelf.count).admit(20_000) == 10_000
    assert shelf.counted < 100


def test_several_workers_go_over_by_some_percent() -> None:
    shelf = Shelf(0)
    workers = [Newcomers(1_000, shelf.count) for _ in range(4)]
    refused = 0
    while refused < len(workers):
        refused = 0
        for room in workers:
            given = room.admit(7)
            shelf.streams += given
            refused += given == 0
    assert 1_000 <= shelf.streams <= 1_100


def test_only_known_streams_are_claimed(store: StateStore) -> None:
    store.claim(["cam"], "w")
    known, new = store.claim(["cam", "new"], "w", "known")
    assert (known.token, new.token, new.foreign) == (2, 0, "")
    assert list(store.streams()) == ["cam"]
    assert store.count() == 1


@pytest.fixture(params=["one server", "Cluster"])
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, list[Any]]]:
    """A store's URL, and clients of its servers."""
    if request.param == "Cluster":
        with store_cluster(tmp_path) as nodes:
            clients = [redis.Redis(port=node.port, socket_timeout=120) for node in nodes]
            yield f"redis+cluster://127.0.0.1:{nodes[0].port}", clients
    else:
        server = start_store(tmp_path)
        clients = [redis.Redis(port=server.port, socket_timeout=120)]
        yield server.url, clients
        server.child.stop()
    for client in clients:
        client.close()


def test_a_full_store_takes_nothing_but_a_deletion(
    full: tuple[str, list[Any]], open_store: Callable[[Store], StateStore]
) -> None:
    url, clients = full
    store = open_store(Store(url=SecretStr(url)))
    for stream in ("cam", "gone"):
        (claimed,) = store.claim([stream], "w")
        store.write([Write(stream, claimed.token, 1, b"header", b"event", b"t" * 100_000)])
    for client in clients:
        client.config_set("maxmemory", 1)
    for which in ("any", "known"):
        with pytest.raises(UnreachableError, match=r"OOM|maxmemory"):
            store.claim(["cam"], "w", which)
    (last,) = retire.delete(store, "gone", "made up", "operator")
    assert last.event.token == 2
    assert store.read("gone").token == 0
    assert store.deleted("gone") == last.content
    assert store.write([Write("gone", 1, 2, b"header", b"event", b"t")]) == [False]
    for client in clients:
        client.config_set("maxmemory", 0)
    assert store.claim(["gone"], "w")[0].token == 3
