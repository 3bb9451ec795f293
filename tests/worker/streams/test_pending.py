"""Writes every so often: what a crash in between costs is repeated exactly. Real store and broker."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import redis
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meta.bundle import Bundle
from monitoring.metrics import WorkerMetrics
from schemas.config import Batch, Kafka, Store
from schemas.config import Guard as GuardSettings
from schemas.frame import Position
from schemas.state import decode_header
from schemas.update import UpdateEvent
from tests.conftest import make_streams
from tests.worker.engine.test_engine import batch
from worker.batch.batcher import MicroBatch, MicroBatcher
from worker.consume.offsets import Offsets
from worker.engine.engine import Engine
from worker.guard.guard import Guard
from worker.publish.publisher import Publisher
from worker.step import Step
from worker.store.store import StateStore
from worker.streams.pending import PendingWrites

LONG_MS = 60_000
FRAMES = 5
EXAMPLES = itertools.count()


class Life:
    """One worker's streams, step and pending, without its loop."""

    def __init__(self, bundle: Bundle, publisher: Publisher, store: StateStore, settings: Store, interval: int) -> None:
        metrics, self.offsets, engine = WorkerMetrics(4), Offsets(), Engine(bundle)
        self.streams = make_streams(engine, store, publisher, settings, metrics=metrics)
        self.pending = PendingWrites(self.streams, publisher, self.offsets, metrics, interval, lambda: None)
        guard = Guard(GuardSettings(never_worse=False), bundle.manifest.limits)
        batcher = MicroBatcher(Batch())
        self._step = Step(self.streams, batcher, guard, publisher, self.pending, metrics, "w", lambda: None, 1)

    def fold(self, one: MicroBatch) -> list[str]:
        self.streams.ensure([one.stream])
        for frame in one.frames:
            self.offsets.received(frame.position)
        flight = self._step.start([one])
        flight.adapted.result(120)
        return self._step.finish(flight)

    def end(self) -> None:
        self._step.close()


@pytest.fixture
def publisher(kafka_settings: Kafka) -> Iterator[Publisher]:
    publisher = Publisher(kafka_settings, "w", threading.Event())
    yield publisher
    publisher.close()


@pytest.fixture
def store(store_settings: Store) -> Iterator[StateStore]:
    store = StateStore(store_settings)
    yield store
    store.close()


@pytest.fixture
def life(tiny_bundle: Bundle, publisher: Publisher, store: StateStore, store_settings: Store) -> Iterator[Life]:
    """A worker that writes when it is told to."""
    life = Life(tiny_bundle, publisher, store, store_settings, LONG_MS)
    yield life
    life.end()


@pytest.fixture
def happened(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> list[int | str]:
    """How many streams each write has had."""
    happened: list[int | str] = []
    write = store.write
    monkeypatch.setattr(store, "write", lambda writes: happened.append(len(writes)) or write(writes))
    return happened


def nth(number: int, stream: str) -> MicroBatch:
    one = batch(stream, FRAMES, seed=number)
    moved = [replace(f, position=Position("frames", 0, number * FRAMES + i)) for i, f in enumerate(one.frames)]
    return replace(one, frames=moved)


def each_once(life: Life, count: int) -> list[str]:
    """Streams with a step that waits to be written."""
    streams = [f"cam-{i}" for i in range(count)]
    for stream in streams:
        life.fold(nth(0, stream))
    return streams


def test_nothing_leaves_before_it_is_stored(life: Life, store: StateStore, topic, kafka_settings: Kafka) -> None:
    for number in range(3):
        assert life.fold(nth(number, "a")) == []
    assert store.read("a").header is None
    assert life.offsets.committable() == {("frames", 0): 0}
    assert topic.read_quiet(kafka_settings.topics.updates, lambda records: False, 1) == []
    assert len(topic.read(kafka_settings.topics.predictions, lambda rs: len(rs) == 3 * FRAMES)) == 3 * FRAMES
    assert life.pending.flush() == []
    header = decode_header(store.read("a").header or b"")
    assert header.frames == 3 * FRAMES
    assert life.offsets.committable() == {("frames", 0): 3 * FRAMES}
    records = topic.read(kafka_settings.topics.updates, lambda rs: len(rs) == 3)
    assert [UpdateEvent.model_validate_json(r.value).number for r in records] == [1, 2, 3]


def test_events_of_many_bytes_do_not_wait(life: Life, store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next owner reads so many of them and no more."""
    life.fold(nth(0, "a"))
    life.pending.flush_due()
    assert store.read("a").header is None
    monkeypatch.setattr("worker.streams.pending.MOST_EVENT_BYTES", 1_000)
    life.fold(nth(1, "a"))
    life.pending.flush_due()
    assert decode_header(store.read("a").header or b"").frames == 2 * FRAMES


def test_a_snapshot_does_not_wait_for_later_tensors(
    tiny_bundle: Bundle, publisher: Publisher, store: StateStore, store_settings: Store
) -> None:
    every_other = store_settings.model_copy(update={"snapshot_every": 2})
    life = Life(tiny_bundle, publisher, store, every_other, LONG_MS)
    life.fold(nth(0, "a"))
    assert store.read("a").header is None
    life.fold(nth(1, "a"))
    tensors = {name: tensor.clone() for name, tensor in life.streams.engine.tensors("a").items()}
    life.fold(nth(2, "a"))
    assert decode_header(store.read("a").header or b"").frames == 2 * FRAMES
    snapshot, kept = life.streams.kept("a", 1)
    assert snapshot.header.step == 2
    assert all(torch.equal(kept[name], tensor) for name, tensor in tensors.items())
    life.end()


def test_of_one_stream_only_so_many_events_wait(life: Life, store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.streams.pending.MOST_EVENTS", 3)
    for number, frames in enumerate((0, 0, 3, 3, 3, 6)):
        life.fold(nth(number, "a"))
        stored = store.read("a").header
        assert (decode_header(stored).frames if stored else 0) == frames * FRAMES


def test_what_two_workers_want_does_not_wait(life: Life, store: StateStore) -> None:
    life.streams.contest(["a"])
    life.fold(nth(0, "a"))
    assert decode_header(store.read("a").header or b"").frames == FRAMES
    life.fold(nth(1, "a"))  # It is ours again.
    assert decode_header(store.read("a").header or b"").frames == FRAMES


def test_what_was_begun_before_a_stream_went_is_void_once_it_is_back(life: Life, store: StateStore) -> None:
    life.fold(nth(0, "a"))
    life.streams.release(["a"])
    assert life.pending.flush(["a"]) == []
    assert store.read("a").header is None
    life.fold(nth(0, "a"))
    life.streams.release(["a"])
    life.fold(nth(0, "a"))
    assert life.pending.flush() == []
    header = decode_header(store.read("a").header or b"")
    assert (header.frames, header.events) == (FRAMES, 1)


def test_of_what_cannot_be_stored_only_the_offsets_are_left(
    life: Life, store: StateStore, client: redis.Redis, topic, kafka_settings: Kafka
) -> None:
    client.set(store.keys("a")[0], "something else")
    life.fold(replace(nth(0, "a"), adapt=False, hurried=True, answer="source"))
    life.fold(nth(1, "b"))
    assert life.pending.flush() == []
    assert life.offsets.committable() == {("frames", 0): 2 * FRAMES}
    events = topic.read(kafka_settings.topics.updates, lambda records: len(records) == 1)
    assert [UpdateEvent.model_validate_json(record.value).stream for record in events] == ["b"]


def test_what_another_claims_is_given_up(life: Life, store: StateStore) -> None:
    life.fold(nth(0, "a"))
    life.fold(nth(0, "b"))
    store.claim(["a"], "another")
    assert life.pending.flush() == ["a"]
    assert store.read("a").header is None
    assert decode_header(store.read("b").header or b"").frames == FRAMES


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(st.sampled_from(["fold", "fold", "flush", "crash"]), min_size=3, max_size=10))
def test_a_crash_repeats_what_was_not_written(
    tiny_bundle: Bundle, publisher: Publisher, store: StateStore, store_settings: Store, plan: list[str]
) -> None:
    """Folded, written and lost in any order: state, count and hash are those of frames that were folded once each."""
    example = next(EXAMPLES)
    stream, plain = f"cam-{example}", f"plain-{example}"
    life, done, goal = Life(tiny_bundle, publisher, store, store_settings, LONG_MS), 0, 0
    for action in [*plan, "flush"]:
        if action == "fold":
            life.fold(nth(done, stream))
            done += 1
            goal = max(goal, done)
        elif action == "flush":
            life.pending.flush()
        else:
            life.end()
            life = Life(tiny_bundle, publisher, store, store_settings, LONG_MS)
            stored = store.read(stream).header
            done = decode_header(stored).frames // FRAMES if stored else 0
    while done < goal:
        life.fold(nth(done, stream))
        done += 1
    life.pending.flush()
    life.end()
    if not goal:
        return
    once = Life(tiny_bundle, publisher, store, store_settings, 0)
    for number in range(goal):
        once.fold(replace(nth(number, stream), stream=plain))
    once.end()
    found, wanted = (decode_header(store.read(name).header or b"") for name in (stream, plain))
    assert (found.frames, found.folded, found.step, found.events) == (
        wanted.frames,
        wanted.folded,
        wanted.step,
        wanted.events,
    )
    one, other = (safetensors.torch.load(store.read(name).tensors or b"") for name in (stream, plain))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_tensors_in_memory_follow_every_step(life: Life) -> None:
    life.fold(nth(0, "a"))
    after_one = life.streams.engine.tensors("a")["affine"].clone()
    life.fold(nth(1, "a"))
    assert not torch.equal(after_one, life.streams.engine.tensors("a")["affine"])
    assert life.streams.engine.resident("a").header.frames == 2 * FRAMES


def test_only_what_makes_no_update_waits(
    tiny_bundle: Bundle, publisher: Publisher, store: StateStore, store_settings: Store
) -> None:
    life = Life(tiny_bundle, publisher, store, store_settings, 0)
    life.fold(replace(nth(0, "a"), adapt=False, reason="settled"))
    assert store.read("a").header is None
    assert life.offsets.committable() == {("frames", 0): 0}
    life.fold(nth(1, "a"))  # An update takes what waits before it along.
    header = decode_header(store.read("a").header or b"")
    assert (header.frames, header.step, header.events) == (2 * FRAMES, 1, 2)
    assert life.offsets.committable() == {("frames", 0): 2 * FRAMES}
    life.end()


def test_many_are_written_in_pieces(
    life: Life, store: StateStore, happened: list[int | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between them the worker stays in its group; a stream that goes meanwhile is its next owner's."""
    streams = each_once(life, 8)

    def one_goes() -> None:
        happened.append("alive")
        life.streams.release([streams[-1]])

    monkeypatch.setattr(life.pending, "_keep_alive", one_goes)
    monkeypatch.setattr("worker.streams.pending.PIECE_STREAMS", 3)
    monkeypatch.setattr("worker.streams.pending.ALIVE_S", -1.0)
    store.claim([streams[1], streams[4]], "another")
    assert life.pending.flush() == [streams[1], streams[4]]
    assert happened == [3, "alive", 3, "alive", 1]
    assert [store.read(s).header is not None for s in streams] == [i not in {1, 4, 7} for i in range(8)]
    assert life.pending.flush() == []


def test_predictions_are_acknowledged_before_a_position_moves_past_their_frames(
    life: Life, publisher: Publisher, happened: list[int | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    life.fold(nth(0, "a"))
    settle = publisher.settle
    monkeypatch.setattr(publisher, "settle", lambda alive: happened.append("acknowledged") or settle(alive))
    assert life.pending.flush() == []
    assert happened == ["acknowledged", 1]


def test_large_states_are_written_in_smaller_pieces(
    life: Life, happened: list[int | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    each_once(life, 3)
    monkeypatch.setattr("worker.streams.pending.PIECE_BYTES", life.streams.engine.state_bytes - 1)
    monkeypatch.setattr(life.pending, "_keep_alive", lambda: happened.append("alive"))
    assert life.pending.flush([f"silent-{i}" for i in range(9)]) == []
    assert life.pending.flush() == []
    assert happened == [1, 1, 1]  # They took no second.
