"""Whatever bytes lie in one stream's entry in the store: documented errors, bounded memory, and others are served."""

from __future__ import annotations

import contextlib
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meta.bundle import Bundle
from schemas.command import Command
from schemas.config import Kafka, Store, WorkerConfig
from schemas.errors import StateError
from schemas.policy import Policy
from schemas.state import Snapshot, StreamHeader
from tests.conftest import make_streams
from worker.control.operate import Operator
from worker.control.stored import listed, snapshots
from worker.engine.engine import Engine
from worker.guard.answer import Policies
from worker.publish.publisher import Publisher
from worker.store.store import StateStore
from worker.streams.last_events import after_last_event
from worker.streams.obey import Context, Subject, obey
from worker.streams.streams import Streams

FIELDS = ["token", "owner", "header", "event", "written"]
KEYS = {"tensors": 1, "snapshots": 2, "approved": 3, "deleted": 4}
GROWTH = 8 << 20
EVENTS_GROWTH = 40 << 20  # of as many as are read, parsed
JSON = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"\n",
    b",",
    b":",
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b'"\\ud800"',
    b"\xff",
    b"9" * 400,
]


class Site:
    """Streams `cam` and `other`, whole in the store, and who reads them."""

    def __init__(self, bundle: Bundle, kafka: Kafka, settings: Store, store: StateStore) -> None:
        self.store, self._settings = store, settings
        self.client = redis.Redis.from_url(settings.url.get_secret_value(), socket_timeout=120)
        self._engine, self._publisher = Engine(bundle), Publisher(kafka, "w", threading.Event())
        self.operator = Operator(WorkerConfig(store=settings), store, Engine(bundle), "operator")
        writer = self.worker()
        writer.ensure(["cam", "other"])
        assert writer.write([self._entry(writer, stream) for stream in ("cam", "other")]) == [True, True]
        writer.release(["cam", "other"])
        self._whole = {key: self.client.dump(key) for s in ("cam", "other") for key in store.keys(s)}
        self.content = {name: self.client.hget(store.keys("cam")[0], name) or b"" for name in FIELDS}
        self.content |= {name: self._value(number) for name, number in KEYS.items()}

    def _entry(self, worker: Streams, stream: str) -> Any:
        resident = worker.engine.resident(stream)
        tensors = {name: t.clone() for name, t in worker.engine.tensors(stream).items()}
        context = Context.of(worker.engine, Policies(Policy(), {}), "w")
        subject = Subject(resident.header, tensors, lambda back: worker.kept(stream, back))
        entry = obey(Command(stream=stream, action="approve"), subject, context, resident.token)
        about = Snapshot(time=datetime.now(UTC), reason="due", header=entry.header)
        return replace(entry, tensors=tensors, snapshot=about)

    def _value(self, number: int) -> bytes:
        key = self.store._all_keys("cam")[number]
        return self.client.lindex(key, 0) if number == 2 else self.client.get(key) or b"1\n" + self.content["event"]

    def worker(self) -> Streams:
        return make_streams(self._engine, self.store, self._publisher, self._settings)

    def put(self, where: str, content: bytes) -> None:
        """Everything as it was written, but for one place."""
        keys = self.store._all_keys("cam")
        self.client.delete(*keys)
        for key, whole in self._whole.items():
            self.client.restore(key, 0, whole, replace=True)
        if where in FIELDS:
            self.client.hset(keys[0], where, content)
        elif where == "snapshots":
            self.client.lpush(keys[2], content)
        else:
            self.client.set(keys[KEYS[where]], content)
            if where == "deleted":
                self.client.delete(*keys[:4])

    def close(self) -> None:
        self._publisher.close()
        self.client.close()


@pytest.fixture
def site(
    tiny_bundle: Bundle, kafka_settings: Kafka, store_settings: Store, open_store: Callable[[Store], StateStore]
) -> Iterator[Site]:
    narrow = store_settings.model_copy(update={"max_state_bytes": 1 << 20})
    site = Site(tiny_bundle, kafka_settings, narrow, open_store(narrow))
    yield site
    site.close()


def edited(whole: bytes) -> st.SearchStrategy[bytes]:
    """Bytes that were an entry's before some of them were others."""
    place, other = st.integers(0, max(0, len(whole) - 1)), st.one_of(st.binary(max_size=8), st.sampled_from(JSON))
    return st.tuples(place, st.integers(0, 40), other).map(lambda e: whole[: e[0]] + e[2] + whole[e[0] + e[1] :])


def arbitrary(whole: bytes) -> st.SearchStrategy[bytes]:
    pieces = st.lists(st.sampled_from(JSON), max_size=12).map(b"".join)
    long = st.tuples(
        st.sampled_from([*JSON, whole, whole + b"\n"]), st.sampled_from([1_000, 300_000, 3 << 20, 12 << 20])
    )
    return st.one_of(st.binary(max_size=200), edited(whole), pieces, long.map(lambda one: repeated(*one)))


def repeated(piece: bytes, size: int) -> bytes:
    return (piece * (size // max(1, len(piece)) + 1))[:size]


@pytest.mark.parametrize("where", [*FIELDS, *KEYS])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
@given(data=st.data())
def test_no_bytes_in_one_entry_break_more_than_their_stream(site: Site, where: str, data: st.DataObject) -> None:
    site.put(where, data.draw(arbitrary(site.content[where])))
    tracemalloc.start()
    try:
        read_all(site)
        assert tracemalloc.get_traced_memory()[1] < (EVENTS_GROWTH if where in ("event", "deleted") else GROWTH)
    finally:
        tracemalloc.stop()


def read_all(site: Site) -> None:
    """All that workers and operators read of a stream; what they may raise is StateError."""
    worker = site.worker()
    listed(site.store)
    with contextlib.suppress(StateError):
        snapshots(site.store, "cam")
    with contextlib.suppress(StateError):
        site.operator.export("cam")
    for name, _, event in site.store.ends():
        assert name in ("cam", "other")
        after_last_event(StreamHeader(stream=name, bundle="", method=""), event)
    site.store.deleted("cam")
    assert set(worker.ensure(["cam", "other"])) == {"cam", "other"}
    with contextlib.suppress(StateError):
        worker.kept("cam", 1)
    assert worker.engine.resident("other").stored
    outcomes = worker.write([site._entry(worker, stream) for stream in ("cam", "other")])
    assert outcomes[1]
    assert outcomes[0] or worker.engine.resident("cam").homeless
    worker.returned()
    worker.release(["cam", "other"])
    worker.ensure(["cam"])
    assert worker.engine.resident("cam").stored or worker.engine.resident("cam").homeless
    worker.release(["cam"])
