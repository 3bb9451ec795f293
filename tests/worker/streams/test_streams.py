"""What is stored and what is in memory agree, and every event is published with the same bytes, whoever does it."""

from __future__ import annotations

import json
import threading
import tracemalloc
from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import redis
import torch

from meta.bundle import Bundle
from meta.method import State
from monitoring.reasons import reason_kind
from schemas.command import Command
from schemas.config import Kafka, Store
from schemas.errors import StateError
from schemas.policy import Policy
from schemas.state import DriftWatch, GuardState, RunningProxies, Snapshot, decode_header, encode_header
from schemas.update import Proxies, UpdateEvent, digest, seal
from tests.conftest import make_streams
from tests.servers import wait_until
from worker.engine.engine import Engine
from worker.guard.answer import Policies
from worker.publish.publisher import Publisher
from worker.store.store import Claimed, StateStore, Write
from worker.streams.entry import Entry
from worker.streams.last_events import events_beside
from worker.streams.obey import Context, Subject, obey
from worker.streams.streams import Streams


class Site:
    """As many workers' streams as a test wants, on one store and one topic."""

    def __init__(
        self, bundle: Bundle, kafka: Kafka, settings: Store, open_store: Callable[[Store], StateStore]
    ) -> None:
        self.bundle, self.kafka, self.settings, self.open_store = bundle, kafka, settings, open_store
        self.store = open_store(settings)
        self._publishers: list[Publisher] = []

    def worker(self, name: str, bundle_hash: str = "", **more: object) -> Streams:
        engine = Engine(self.bundle)
        engine.bundle_hash = bundle_hash or engine.bundle_hash
        publisher = Publisher(self.kafka, name, threading.Event())
        self._publishers.append(publisher)
        settings = self.settings.model_copy(update={"snapshot_every": 2, **more})
        return make_streams(engine, self.open_store(settings), publisher, settings, name)

    def settle(self) -> None:
        for publisher in self._publishers:
            publisher.settle(lambda: None)

    def close(self) -> None:
        for publisher in self._publishers:
            publisher.close()


@pytest.fixture
def site(tiny_bundle: Bundle, kafka_settings: Kafka, store_settings: Store, open_store: Callable[[Store], StateStore]):
    site = Site(tiny_bundle, kafka_settings, store_settings, open_store)
    yield site
    site.close()


def change(streams: Streams, action: str, tensors=None) -> Entry:
    """What `action` makes of cam, not stored yet."""
    resident = streams.engine.resident("cam")
    own = {name: t.clone() for name, t in streams.engine.tensors("cam").items()}
    context = Context.of(streams.engine, Policies(Policy(), {}), "w")
    return obey(
        Command(stream="cam", action=action), Subject(resident.header, own, lambda back: None), context, resident.token
    )


def test_a_stream_that_goes_while_others_are_claimed_is_left_to_its_next_owner(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claimed once more, it would have the next owner's writes refused."""
    first, second, ours = site.worker("first"), site.worker("second"), {"a", "b"}
    first.ensure(["a", "b"], ours)
    first.release(["b"])
    claim = first._store.claim

    def waits(*asked: Any) -> list[Claimed]:
        first.release(["a"])  # as `worker.partitions` does
        ours.discard("a")
        second.ensure(["a"])
        return claim(*asked)

    monkeypatch.setattr(first._store, "claim", waits)
    assert first.ensure(["a", "b"], ours) == ["b"]
    assert set(first.engine.streams) == {"b"}
    assert site.store.read("a").token == second.engine.resident("a").token


def test_an_event_that_was_stored_and_not_published_comes_with_the_same_bytes(site: Site, topic) -> None:
    first = site.worker("first")
    first.ensure(["cam"])
    entry = change(first, "freeze")
    assert first.write([entry]) == [True]
    # It dies here, before it publishes. Two others meet the stream, one after the other.
    for name in ("second", "third"):
        site.worker(name).ensure(["cam"])
        site.settle()
    read = topic.read(site.kafka.topics.updates, lambda rs: len(rs) >= 2)
    assert [r.value for r in read] == [entry.events[0].content] * 2


def test_a_stored_event_that_no_broker_takes_is_not_tried_for_ever(site: Site, client: redis.Redis) -> None:
    first = site.worker("first")
    first.ensure(["cam"])
    entry = change(first, "freeze")
    assert first.write([entry]) == [True]
    large = seal(entry.events[0].event.model_copy(update={"reason": "x" * 2_000_000}))
    client.hset(site.store.keys("cam")[0], "event", large.content)
    second = site.worker("second")
    second.ensure(["cam"])
    assert "cam" in second.engine
    assert site._publishers[-1]._waiting == []


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "x" * 600_000 + "@1"},  # twice in a record: no broker takes it
        {"id": "other@1"},
        {"id": "other@1", "stream": "other"},
        {"id": f"cam@{10**18 - 1}"},  # no number comes after it
    ],
)
def test_an_event_that_is_none_of_the_streams_own_is_neither_published_nor_followed(
    site: Site, topic, client: redis.Redis, changes: dict[str, str]
) -> None:
    first = site.worker("first")
    first.ensure(["cam"])
    entry = change(first, "freeze")
    assert first.write([entry]) == [True]
    strange = seal(entry.events[0].event.model_copy(update=changes))
    client.hset(site.store.keys("cam")[0], mapping={"event": strange.content, "header": b"damaged"})
    second = site.worker("second")
    second.ensure(["cam"])
    assert len(site._publishers[-1]._waiting) == 1
    site.settle()
    (record,) = topic.read(site.kafka.topics.updates, lambda rs: len(rs) >= 1)
    reset = UpdateEvent.model_validate_json(record.value)
    assert (reset.id, reset.decision, reset.previous) == ("cam@1", "reset", "")


def test_a_header_and_events_that_are_too_long_cost_their_own_stream_alone(
    site: Site, topic, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    first = site.worker("first")
    first.ensure(["cam", "long", "other"])
    entry = change(first, "freeze")
    others = [Entry(first.engine.resident(s).header.model_copy(update={"events": 7}), ()) for s in ("long", "other")]
    assert first.write([entry, *others]) == [True] * 3
    client.hset(site.store.keys("cam")[0], mapping={"header": b"{" * 400_000, "event": b"{" * (20 << 20)})
    client.hset(site.store.keys("long")[0], "event", b"{" * (20 << 20))
    client.hset(site.store.keys("other")[0], "event", entry.events[0].content)
    second = site.worker("second")
    second.ensure(["cam", "long", "other"])
    site.settle()
    (record,) = topic.read(site.kafka.topics.updates, lambda rs: len(rs) >= 1)
    reset = UpdateEvent.model_validate_json(record.value)
    assert (reset.id, reset.decision) == ("cam@1", "reset")
    assert reset.reason == "the header of the stored state is empty or has more than 262144 bytes"
    assert [second.engine.resident(stream).stored for stream in ("long", "other")] == [True, True]
    said = sorted(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert said[0] == "1 lines beside the state of stream other are no events of its own"
    assert said[1].startswith("stream cam restarts from source: ")
    assert said[2].startswith("the events beside the state of stream long are empty or have more than 4194304 bytes")
    assert len(said) == 3


def test_a_snapshot_that_is_too_large_is_named_and_another_can_be_had(site: Site, client: redis.Redis) -> None:
    first = site.worker("first")
    first.ensure(["cam"])
    streams = site.worker("w", max_state_bytes=100_000)
    for number in (1, 2):
        tensors = {name: t.clone() for name, t in first.engine.tensors("cam").items()}
        entry = replace(change(first, "freeze"), tensors=tensors)
        about = Snapshot(time=datetime.now(UTC), reason=str(number), header=entry.header)
        assert first.write([replace(entry, snapshot=about)]) == [True]
    key = site.store.keys("cam")[2]
    client.lset(key, 0, client.lindex(key, 0) + bytes(400_000))
    with pytest.raises(
        StateError, match=r"snapshot 1 of stream 'cam' cannot be used: .*max_state_bytes = 100000; roll"
    ):
        streams.kept("cam", 1)
    assert streams.kept("cam", 2)[0].reason == "1"
    assert streams.newest("cam") is None  # back to source


def test_lines_without_end_beside_a_state_are_not_taken_apart(site: Site) -> None:
    """Each line was an object of its own: of 16 MB it was hundreds."""
    content = b"ab\n" * 1_300_000
    tracemalloc.start()
    try:
        assert events_beside("cam", content) == []
        assert tracemalloc.get_traced_memory()[1] < 2 * len(content)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("lost", ["tensors", "header"])
def test_a_restart_from_source_is_the_next_link_and_is_stored_before_it_is_told(
    site: Site, topic, client: redis.Redis, lost: str
) -> None:
    first = site.worker("first")
    first.ensure(["cam"])
    entry = change(first, "freeze")
    entry.header.step = 3
    entry.header.guard = GuardState(trusted=False, alarms=3)
    entry.header.drift = DriftWatch(adapting=False)
    entry.header.proxies = RunningProxies(frames=128, confidence=0.9, shadowed=64, accuracy=0.9, source_accuracy=0.3)
    assert first.write([entry]) == [True]
    meta, tensors, *_ = site.store.keys("cam")
    if lost == "tensors":
        client.delete(tensors)
    else:
        client.hset(meta, "header", b"\xff damaged")
    second = site.worker("second")
    second.ensure(["cam"])
    site.worker("third").ensure(["cam"])
    site.settle()
    found = {r.value for r in topic.read(site.kafka.topics.updates, lambda rs: len({r.value for r in rs}) >= 2)}
    events = sorted((UpdateEvent.model_validate_json(value) for value in found), key=lambda e: e.number)
    assert [(e.number, e.decision) for e in events] == [(1, "frozen"), (2, "reset")]
    assert events[1].previous == entry.events[0].digest
    header = second.engine.resident("cam").header
    assert (header.events, header.step, header.last_event) == (2, 0, seal(events[1]).digest)
    # What was known of the parameters that are lost says nothing of source.
    assert (header.guard, header.drift) == (GuardState(), None)
    assert header.proxies.accuracy == (0.3 if lost == "tensors" else None)


def test_a_stream_that_the_store_has_forgotten_says_so_and_its_trail_goes_on(
    site: Site, topic, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Who had it says so: to others it is a new one."""
    first = site.worker("first")
    first.ensure(["cam", "silent"])
    entry = change(first, "freeze")
    assert first.write([entry]) == [True]
    first.publish(entry)
    client.delete(*site.store.keys("cam"))
    assert first.write([change(first, "unfreeze")]) == [False]
    first.release(["cam"])
    first.ensure(["cam"])
    site.settle()
    read = topic.read(site.kafka.topics.updates, lambda rs: len(rs) >= 2)
    events = [UpdateEvent.model_validate_json(r.value) for r in read]
    assert [(e.id, e.decision, reason_kind(e)) for e in events[1:]] == [("cam@2", "reset", "stored_state")]
    assert events[1].previous == entry.events[0].digest
    assert "stream cam restarts from source: the stored state is gone" in caplog.text
    # What it has obeyed is lost, too: of old commands only those hold that stand.
    assert first.engine.resident("cam").stored
    assert first.engine.resident("cam").lost > 0
    # It is said once, and not of a stream that was never written.
    caplog.clear()
    first.release(["cam", "silent"])
    first.ensure(["cam", "silent"])
    assert "restarts" not in caplog.text


def test_who_claims_streams_of_another_is_named(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """So that two sites which share a prefix by mistake are found; not where a stream has moved as it should."""
    first, second = site.worker("line-1"), site.worker("line-2")
    first.ensure(["a", "b", "c"])
    second.ensure(["a", "b", "c"])
    assert "had claimed" not in caplog.text
    first.contest(["b", "a"])
    first.release(["a", "b", "c"])
    first.ensure(["c", "b", "a"])
    assert [r.getMessage() for r in caplog.records] == ["worker line-2 had claimed 2 of our streams, such as a"]


def test_a_stream_that_was_deleted_is_not_forgotten(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    first = site.worker("first")
    first.ensure(["cam"])
    entry = change(first, "freeze")
    assert first.write([entry]) == [True]
    assert site.store.delete("cam", first.engine.resident("cam").token, entry.events[0].content)
    first.release(["cam"])
    first.ensure(["cam"])
    assert first.engine.resident("cam").header.events == 1
    assert "restarts" not in caplog.text


def test_a_restart_from_source_does_not_replace_an_event_that_nobody_published(
    site: Site, topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers die, one after the other, before the broker has what they sent."""
    first = site.worker("first")
    first.ensure(["cam"])
    entry = change(first, "freeze")
    assert first.write([entry]) == [True]
    second, third = site.worker("second", "another"), site.worker("third", "another")
    monkeypatch.setattr(second._publisher, "update", lambda sealed: None)
    second.ensure(["cam"])
    third.ensure(["cam"])
    site.settle()
    read = topic.read(site.kafka.topics.updates, lambda rs: len(rs) >= 2)
    assert [UpdateEvent.model_validate_json(r.value).decision for r in read] == ["frozen", "reset"]
    assert read[0].value == entry.events[0].content
    # One that goes on leaves no more than its own beside the state.
    assert third.write([change(third, "unfreeze")]) == [True]
    assert len((site.store.read("cam").event or b"").splitlines()) == 1


def test_what_a_later_version_wrote_is_read_but_for_fields_that_it_added(
    site: Site, topic, client: redis.Redis
) -> None:
    """As while workers of two versions run, or after one went back: no stream restarts, and no event is withheld."""
    later = site.worker("later")
    later.ensure(["cam"])
    entry = change(later, "freeze")
    entry.header.positions, entry.header.guard = {"frames/0": 41}, GuardState(alarms=3)
    content = entry.events[0].content.replace(b'"flipped":', b'"added":{"to":"it"},"flipped":')
    entry.header.last_event = digest(content)
    assert later.write([entry]) == [True]
    client.hset(site.store.keys("cam")[0], "event", content)
    stored = encode_header(entry.header)
    for part, added in (
        (b'"guard":{', b'"guard":{"added":1,'),
        (b'"drift":', b'"added":1,"drift":'),
        (b'"policy":{', b'"policy":{"added":null,'),
    ):
        assert part in stored
        stored = stored.replace(part, added)
    client.hset(site.store.keys("cam")[0], "header", stored)
    earlier = site.worker("earlier")
    earlier.ensure(["cam"])
    site.settle()
    assert earlier.engine.resident("cam").header == entry.header
    (read,) = topic.read(site.kafka.topics.updates, lambda rs: len(rs) >= 1)
    assert read.value == content
    assert earlier.write([change(earlier, "unfreeze")]) == [True]


def test_a_stream_that_0_1_0_left_in_the_store_goes_on(site: Site, topic, client: redis.Redis) -> None:
    """As a worker of that version left it when it was killed: approved parameters answer, a snapshot is kept, and its
    last event may not be in the topic."""
    recorded = json.loads((Path(__file__).parents[2] / "schemas" / "golden" / "stream.json").read_bytes())
    ours = site.bundle.hash.encode()  # other hardware may give the test's bundle another hash

    def stored(text: str) -> bytes:
        return b64decode(text).replace(b"cb8be0bf34ee8a22", ours)

    event, header = b64decode(recorded["hash"]["event"]), stored(recorded["hash"]["header"])
    state, tensors, snapshots, approved = site.store.keys("cam")
    client.hset(state, mapping={name: b64decode(value) for name, value in recorded["hash"].items()})
    client.hset(state, "header", header)
    client.set(tensors, b64decode(recorded["tensors"]))
    client.set(approved, b64decode(recorded["approved"]))
    client.rpush(snapshots, *map(stored, recorded["snapshots"]))
    later = site.worker("later")
    later.ensure(["cam"])
    site.settle()
    resident = later.engine.resident("cam")
    assert resident.header == decode_header(header)
    assert (resident.header.step, resident.header.approved) == (4, 3)
    assert resident.approved is not None
    assert later.kept("cam", 1)[0].header.step == 4
    (read,) = topic.read(site.kafka.topics.updates, lambda rs: len(rs) >= 1)
    assert read.value == event
    assert digest(event) == resident.header.last_event
    assert later.write([change(later, "freeze")]) == [True]


def taught(site: Site) -> Streams:
    """A worker that has cam in memory, adapted, while its tensors have expired in the store."""
    first = site.worker("first", idle_ttl_s=1)
    first.ensure(["cam"])
    tensors = {name: t.clone() for name, t in first.engine.tensors("cam").items()}
    tensors["affine"] += 0.5
    first.engine.replace("cam", tensors)
    assert first.write([change(first, "freeze")]) == [True]
    wait_until(lambda: site.store.read("cam").tensors is None, "the expiry of the tensors")
    assert site.store.read("cam").token == 1
    return first


def test_tensors_that_expired_are_written_again_by_who_has_them(site: Site) -> None:
    """A header that changes alone may not lie there without them: the next owner would start from source."""
    first = taught(site)
    assert first.write([change(first, "unfreeze")]) == [True]
    second = site.worker("second")
    second.ensure(["cam"])
    assert second.engine.resident("cam").header.events == 2
    assert torch.equal(second.engine.tensors("cam")["affine"], first.engine.tensors("cam")["affine"])


def test_expired_tensors_that_went_while_the_store_was_waited_for_are_left(site: Site) -> None:
    first = taught(site)
    write = first._store.write

    def goes(writes: list[Write]) -> list[bool | None]:
        outcomes = write(writes)
        first.release(["cam"])
        return outcomes

    first._store.write = goes
    assert first.write([change(first, "unfreeze")]) == [False]
    assert decode_header(site.store.read("cam").header or b"").events == 1


def test_a_stream_whose_tensors_expired_is_fenced_as_any(site: Site) -> None:
    first = taught(site)
    second = site.worker("second", idle_ttl_s=1)
    second.ensure(["cam"])
    header = second.engine.resident("cam").header
    assert (header.events, header.step) == (2, 0)  # From source, and an event says so.
    wait_until(lambda: site.store.read("cam").tensors is None, "the expiry of the tensors")
    whole = replace(change(first, "unfreeze"), tensors=dict(first.engine.tensors("cam")))
    assert first.write([change(first, "unfreeze"), whole]) == [False, False]
    assert decode_header(site.store.read("cam").header or b"") == header
    assert second.write([change(second, "unfreeze")]) == [True]


def approving(site: Site) -> tuple[Streams, State]:
    """A worker that has cam in memory, with parameters that are approved."""
    first = site.worker("first")
    first.ensure(["cam"])
    tensors = {name: t.clone() for name, t in first.engine.tensors("cam").items()}
    tensors["affine"] += 0.5
    first.engine.replace("cam", tensors)
    assert first.write([change(first, "approve")]) == [True]
    return first, tensors


@pytest.mark.parametrize("moving", [True, False])
def test_approved_parameters_that_were_evicted_are_written_again_by_who_has_them(
    site: Site, client: redis.Redis, moving: bool
) -> None:
    """Also where the tensors are all there, or come along."""
    first, tensors = approving(site)
    client.delete(site.store.keys("cam")[3])
    entry = change(first, "freeze")
    assert first.write([replace(entry, tensors=first.engine.like) if moving else entry]) == [True]
    second = site.worker("second")
    second.ensure(["cam"])
    resident = second.engine.resident("cam")
    assert (resident.header.approved, resident.header.events) == (0, 2)
    assert torch.equal(resident.approved["affine"], tensors["affine"])
    expected = second.engine.like if moving else tensors
    assert torch.equal(second.engine.tensors("cam")["affine"], expected["affine"])


def test_approved_parameters_survive_their_worker_and_go_with_their_bundle(site: Site) -> None:
    _, tensors = approving(site)
    second = site.worker("second")
    second.ensure(["cam"])
    resident = second.engine.resident("cam")
    assert resident.header.approved == 0
    assert torch.equal(resident.approved["affine"], tensors["affine"])
    assert set(resident.approved) == set(second.engine.source)
    third = site.worker("third", "another")
    third.ensure(["cam"])
    assert third.engine.resident("cam").header.approved is None


@pytest.mark.parametrize("lost", ["tensors", "approved"])
def test_a_store_that_lost_the_last_write_gets_the_next_one_whole(site: Site, client: redis.Redis, lost: str) -> None:
    """A header that changes alone would lie beside older tensors, and the next owner would start from source."""
    first, tensors = approving(site)
    before = {key: content for key in site.store.keys("cam") if (content := client.dump(key))}
    if lost == "tensors":
        moving = change(first, "freeze")
        moving.header.step = 1
        tensors["affine"] += 0.5
        first.engine.replace("cam", tensors)
        assert first.write([replace(moving, tensors=tensors)]) == [True]
    else:
        first.engine.resident("cam").header.step = 1
        moving = change(first, "approve")
        assert first.write([replace(moving, tensors=tensors)]) == [True]
    for key, content in before.items():  # As after a crash, or on a replica that has taken over.
        client.restore(key, 0, content, replace=True)
    assert first.write([change(first, "unfreeze")]) == [True]
    second = site.worker("second")
    second.ensure(["cam"])
    resident = second.engine.resident("cam")
    assert (resident.header.step, resident.header.events) == (1, 3)
    assert resident.header.approved == (0 if lost == "tensors" else 1)
    assert torch.equal(second.engine.tensors("cam")["affine"], tensors["affine"])


@pytest.mark.parametrize(
    ("changes", "trusted", "taken"),
    [
        ({}, True, True),
        ({"decision": "partial"}, True, False),
        ({}, False, False),
        ({"after": Proxies(estimated_accuracy=0.5, source_accuracy=0.6, confidence=0.5, entropy=1)}, True, False),
        ({"after": Proxies(estimated_accuracy=0.7, source_accuracy=0.6, confidence=0.5, entropy=1)}, True, True),
    ],
)
def test_snapshots_are_taken_of_streams_that_do_well(site: Site, changes: dict, trusted: bool, taken: bool) -> None:
    streams = site.worker("w")
    streams.ensure(["cam"])
    before = streams.engine.resident("cam").header
    after = before.model_copy(update={"step": 2, "guard": GuardState(trusted=trusted)})
    event = UpdateEvent(
        id="cam@2",
        stream="cam",
        time=datetime.now(UTC),
        decision="applied",
        reason="",
        frames=[],
        step=2,
        token=1,
        bundle="b",
        worker="w",
    ).model_copy(update=changes)
    snapshot = streams.snapshot(before, after, event)
    assert (snapshot is not None) == taken
    assert after.snapshot == (2 if taken else 0)
    # One that could not be taken when it was due is taken as soon as the stream does well.
    later = after.model_copy(update={"step": 3, "guard": GuardState()})
    good = event.model_copy(update={"step": 3, "decision": "applied", "after": None})
    assert (streams.snapshot(after, later, good) is not None) == (not taken)


def test_states_come_in_pieces(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once those of a site's cameras would be in memory twice when a worker takes them over."""
    names = [f"cam-{i}" for i in range(7)]
    streams = site.worker("w")
    monkeypatch.setattr("worker.streams.streams.CLAIM_BYTES", 3 * streams.engine.state_bytes + 1)
    asked: list[int] = []
    claim = StateStore.claim

    def counted(self: StateStore, wanted: list[str], *others: Any) -> list[Claimed]:
        asked.append(len(wanted))
        return claim(self, wanted, *others)

    monkeypatch.setattr(StateStore, "claim", counted)
    assert streams.ensure(names) == names
    assert streams.engine.streams == set(names)
    assert asked == [3, 3, 1] * 2  # known ones, and then those that begin
