"""Who obeys when: not a stream in a step, and nobody's streams without disturbing others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
import redis

from meta.bundle import Bundle
from monitoring.metrics import WorkerMetrics
from schemas.command import Command
from schemas.config import Kafka, Store, WorkerConfig
from schemas.errors import StateError, UnreachableError
from schemas.frame import Position
from schemas.state import Snapshot, decode_header
from schemas.update import UpdateEvent
from tests.conftest import make_streams
from worker.consume.offsets import Offsets
from worker.control import retire
from worker.control.commands import CommandList
from worker.control.control import AT_ONCE, Control
from worker.control.operate import Operator
from worker.control.stored import listed_one, snapshots
from worker.engine.engine import Engine
from worker.publish.publisher import Publisher
from worker.store import store as store_module
from worker.store.store import StateStore
from worker.streams.entry import Entry
from worker.streams.last_events import events_beside
from worker.streams.pending import PendingWrites


class Worker:
    """A worker without frames."""

    def __init__(self, bundle: Bundle, kafka: Kafka, settings: Store, store: StateStore, commands: CommandList) -> None:
        self.publisher = Publisher(kafka, "w", threading.Event())
        metrics = WorkerMetrics(0)
        self.streams = make_streams(Engine(bundle), store, self.publisher, settings, "w", metrics)
        pending = PendingWrites(self.streams, self.publisher, Offsets(), metrics, 0, lambda: None)
        self.control = Control(commands, self.streams, store, metrics, lambda act: act(), pending)

    def policy(self, stream: str):
        return self.streams.engine.resident(stream).header.policy


@pytest.fixture
def commands() -> CommandList:
    return CommandList()


@pytest.fixture
def worker(
    tiny_bundle: Bundle,
    kafka_settings: Kafka,
    store_settings: Store,
    open_store: Callable[[Store], StateStore],
    commands: CommandList,
):
    worker = Worker(tiny_bundle, kafka_settings, store_settings, open_store(store_settings), commands)
    yield worker
    worker.publisher.close()


def tell(commands: CommandList, offset: int, stream: str, action: str = "freeze") -> None:
    command = Command(stream=stream, action=action)
    commands.add(Position("commands", 0, offset), command.model_dump_json(exclude_none=True).encode())


def change_nothing(worker: Worker, stream: str) -> Entry:
    return Entry(worker.streams.engine.resident(stream).header, ())


def let_time_pass(control: Control) -> None:
    """Until it is looked who has the streams that nobody here has."""
    control._nobodys = dict.fromkeys(control._nobodys, 0.0)


def test_a_stream_in_a_step_obeys_after_it(worker: Worker, commands: CommandList) -> None:
    worker.control.loaded(worker.streams.ensure(["a", "b"]))
    tell(commands, 0, "*")
    worker.control.listen()
    assert worker.control.run({"a"}) == []
    assert worker.policy("a") is None
    assert worker.control.due == {"a"}
    assert worker.policy("b").frozen
    assert worker.control.run(()) == []
    assert worker.policy("a").frozen
    assert worker.control.due == set()


def test_nobodys_streams_obey_and_a_step_under_way_is_left_alone(worker: Worker, commands: CommandList) -> None:
    worker.control.loaded(worker.streams.ensure(["silent"]))
    tell(commands, 0, "silent", "unfreeze")
    worker.control.listen()
    worker.control.run(())
    worker.streams.release(["silent"])
    worker.control.loaded(worker.streams.ensure(["busy"]))
    tell(commands, 1, "*")
    worker.control.listen()
    assert worker.control.look_after_the_rest({"busy"}) == []
    assert "silent" not in worker.streams.engine
    let_time_pass(worker.control)
    assert worker.control.look_after_the_rest({"busy"}) == []
    assert worker.policy("busy") is None
    # It has obeyed, and was let go.
    assert "silent" not in worker.streams.engine
    worker.control.loaded(worker.streams.ensure(["silent"]))
    assert worker.policy("silent").frozen
    assert worker.control.due == {"busy"}


def test_a_command_to_all_does_not_hold_up_the_loop(worker: Worker, commands: CommandList) -> None:
    """Some streams obey in each turn; and of those that nobody holds, the ones that were claimed for it."""
    tell(commands, 0, "*", "unfreeze")
    worker.control.loaded(worker.streams.ensure(["silent"]))
    assert worker.control.run(()) == []
    worker.streams.release(["silent"])
    here = [f"cam-{i}" for i in range(2 * AT_ONCE + 1)]
    worker.control.loaded(worker.streams.ensure(here))
    for left in (AT_ONCE + 1, 1, 0):
        assert worker.control.run(()) == []
        assert len(worker.control.due) == left
    tell(commands, 1, "*")
    worker.control.listen()
    let_time_pass(worker.control)
    assert worker.control.look_after_the_rest(()) == []
    assert "silent" not in worker.streams.engine
    worker.control.loaded(worker.streams.ensure(["silent"]))
    assert worker.policy("silent").frozen
    assert worker.control.due == set(here)


def test_a_command_to_all_goes_through_the_store_in_pieces(
    worker: Worker, commands: CommandList, store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the store fails in the middle, and where another command to all comes before the first is through."""
    monkeypatch.setattr("worker.store.store.KEYS_AT_ONCE", 20)
    silent = [f"silent-{i}" for i in range(2 * AT_ONCE)]
    tell(commands, 0, "nobody")
    worker.control.loaded(worker.streams.ensure(silent))
    worker.streams.write([change_nothing(worker, stream) for stream in silent])
    worker.streams.release(silent)
    control, scans = worker.control, []
    scan = store_module._scan

    def third_fails(*args, **kwargs):
        scans.append(args)
        if len(scans) == 3:
            raise redis.ConnectionError("away")
        return scan(*args, **kwargs)

    def retry(action):
        while True:
            try:
                return action()
            except UnreachableError:
                retry.times += 1

    retry.times = 0
    control._retry = retry
    monkeypatch.setattr(store_module, "_scan", third_fails)
    tell(commands, 1, "*")
    control.listen()
    let_time_pass(control)
    most = turns = 0
    while control._orphans or control._nobodys or control._all is not None or control._all_again:
        assert control.look_after_the_rest(()) == []
        most = max(most, len(control._orphans))
        turns += 1
        if turns == 3:
            tell(commands, 2, "*", "unfreeze")
            control.listen()
            let_time_pass(control)
        assert turns < 1_000
    assert retry.times == 1
    assert turns > 10
    assert most <= AT_ONCE
    headers = [decode_header(store.read(stream).header or b"") for stream in silent]
    assert all(header.commands == {"commands/0": 2} and not header.policy.frozen for header in headers)


def test_a_stream_that_was_deleted_begins_like_any_other(
    worker: Worker, commands: CommandList, store: StateStore
) -> None:
    """What was done to it before means nothing to it; what holds for its name does. Its chain goes on."""
    worker.control.loaded(worker.streams.ensure(["a"]))
    tell(commands, 0, "a", "freeze")
    tell(commands, 1, "a", "reset")
    worker.control.listen()
    worker.control.run(())
    (frozen,) = retire.delete(store, "a", "gone", "operator")[:-1]
    worker.streams.release(["a"])
    with pytest.raises(StateError, match="stream 'a' was deleted; 'driftkeel audit show"):
        listed_one(store, "a")
    assert retire.delete(store, "a", "gone", "operator")[0].event.previous == frozen.digest
    worker.control.loaded(worker.streams.ensure(["a"]))
    header = worker.streams.engine.resident("a").header
    assert (header.events, header.commands, header.step) == (2, {}, 0)
    worker.control.run(())
    assert worker.policy("a").frozen
    found = [UpdateEvent.model_validate_json(line) for line in (store.read("a").event or b"").splitlines()]
    assert [(event.number, event.decision) for event in found] == [(3, "frozen")]


def test_a_deletion_publishes_no_event_of_another_stream(
    worker: Worker, commands: CommandList, store: StateStore, client: redis.Redis
) -> None:
    worker.control.loaded(worker.streams.ensure(["a", "b"]))
    tell(commands, 0, "b")
    worker.control.listen()
    worker.control.run(())
    assert worker.streams.write([change_nothing(worker, "a")]) == [True]
    client.hset(store.keys("a")[0], "event", client.hget(store.keys("b")[0], "event"))
    assert [(one.event.id, one.event.decision) for one in retire.delete(store, "a", "gone", "operator")] == [
        ("a@1", "deleted")
    ]


def test_what_means_nothing_to_a_stream_that_begins_is_not_done_to_it_later(
    worker: Worker, commands: CommandList
) -> None:
    """Also where the command comes when its first frames wait to be folded."""
    tell(commands, 0, "a", "reset")
    worker.control.loaded(worker.streams.ensure(["a", "b"]))
    tell(commands, 1, "*", "approve")
    worker.control.listen()
    assert worker.control.run(()) == []
    assert worker.streams.write([change_nothing(worker, stream) for stream in ("a", "b")]) == [True, True]
    worker.streams.release(["a", "b"])
    worker.control.loaded(worker.streams.ensure(["a", "b"]))
    assert worker.control.due == set()


def test_a_stream_whose_header_was_lost_does_not_obey_again_what_passes(
    worker: Worker, commands: CommandList, store: StateStore, client: redis.Redis
) -> None:
    """Which commands it has obeyed is not known: as after a way back from a version with another format."""
    for offset, action in enumerate(("approve", "freeze", "rollback")):
        tell(commands, offset, "cam", action)
    client.hset(store.keys("cam")[0], mapping={"token": 1, "header": b'{"version":2}'})
    worker.control.loaded(worker.streams.ensure(["cam"]))
    assert worker.control.run(()) == []
    header = worker.streams.engine.resident("cam").header
    assert (header.events, header.approved, header.policy.frozen) == (2, None, True)  # "reset", and "frozen"
    tell(commands, 3, "cam", "approve")
    worker.control.listen()
    assert worker.control.run(()) == []
    header = worker.streams.engine.resident("cam").header
    assert (header.events, header.approved) == (3, 0)


def test_many_commands_are_obeyed_in_pieces(
    worker: Worker, commands: CommandList, store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their events lie beside the state, where they have a limit, until the broker has them."""
    monkeypatch.setattr("worker.control.control.COMMANDS_AT_ONCE", 3)
    worker.control.loaded(worker.streams.ensure(["a"]))
    for offset in range(8):
        tell(commands, offset, "a", "unfreeze" if offset % 2 else "freeze")
    worker.control.listen()
    assert worker.control.run(()) == []
    assert (worker.control.due, worker.policy("a").frozen) == (set(), False)
    stored = store.read("a")
    assert decode_header(stored.header or b"").commands == {"commands/0": 7}
    assert [event.event.number for event in events_beside("a", stored.event)] == [7, 8]


def test_an_operator_leaves_no_more_events_beside_a_state_than_can_be_read(
    worker: Worker, store: StateStore, store_settings: Store, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.streams.ensure(["a"])
    assert worker.streams.write([change_nothing(worker, "a")]) == [True]
    operator = Operator(WorkerConfig(store=store_settings), store, Engine(tiny_bundle), "operator")
    operator.reset("a", "once")
    monkeypatch.setattr("worker.control.operate.MAX_EVENTS_BYTES", 500)
    before = store.read("a")
    with pytest.raises(StateError, match="too many events of stream 'a' wait beside its state"):
        operator.reset("a", "again")
    assert (store.read("a").header, store.read("a").event) == (before.header, before.event)


def test_a_stream_that_comes_back_from_its_file_is_not_told_again_what_it_has_done(
    worker: Worker, commands: CommandList, store: StateStore, store_settings: Store, tiny_bundle: Bundle
) -> None:
    """Under its own name, after it was deleted here; what another site's file says of commands means nothing here."""
    for offset, action in enumerate(("freeze", "reset")):
        tell(commands, offset, "a", action)
    worker.control.loaded(worker.streams.ensure(["a"]))
    tell(commands, 2, "a", "reset")
    worker.control.listen()
    assert worker.control.run(()) == []
    operator = Operator(WorkerConfig(store=store_settings), store, Engine(tiny_bundle), "operator")
    file = operator.export("a")
    retire.delete(store, "a", "to come back", "operator")
    operator.import_file("a", file, "back")
    operator.import_file("b", file, "another's")
    worker.streams.release(["a"])
    worker.control.loaded(worker.streams.ensure(["a", "b"]))
    headers = {stream: worker.streams.engine.resident(stream).header for stream in ("a", "b")}
    assert worker.control.due == set()
    assert (headers["a"].commands, headers["a"].policy.frozen) == ({"commands/0": 2}, True)
    assert (headers["b"].commands, headers["b"].policy) == ({}, None)


def test_one_damaged_snapshot_does_not_hide_the_others(worker: Worker, store: StateStore, client: redis.Redis) -> None:
    worker.streams.ensure(["a"])
    header = worker.streams.engine.resident("a").header
    about = Snapshot(time=datetime.now(UTC), reason="due", header=header)
    entry = Entry(header, (), worker.streams.engine.tensors("a"), snapshot=about)
    assert worker.streams.write([entry]) == [True]
    client.lpush(store.keys("a")[2], b"x")
    assert snapshots(store, "a") == [None, about]


def test_a_stream_that_another_claims_is_let_go(worker: Worker, commands: CommandList, store: StateStore) -> None:
    worker.control.loaded(worker.streams.ensure(["a"]))
    store.claim(["a"], "another")
    tell(commands, 0, "a")
    worker.control.listen()
    assert worker.control.run(()) == ["a"]
    assert "a" not in worker.streams.engine


def test_a_silent_stream_obeys_after_another_has_claimed_it(
    worker: Worker, commands: CommandList, store: StateStore
) -> None:
    """As `driftkeel streams` does, which lets go at once: no frame comes that would have it claimed again."""
    worker.control.loaded(worker.streams.ensure(["a", "b"]))
    assert worker.streams.write([change_nothing(worker, stream) for stream in ("a", "b")]) == [True, True]
    store.claim(["a"], "operator")
    for offset, stream in enumerate(("a", "b")):
        tell(commands, offset, stream)
    worker.control.listen()
    worker.streams.release(["b"])  # given up before it could obey
    assert worker.control.run(()) == ["a"]
    assert worker.control.run(()) == []
    let_time_pass(worker.control)
    assert worker.control.look_after_the_rest(()) == []
    assert [decode_header(store.read(stream).header or b"").policy.frozen for stream in ("a", "b")] == [True, True]
    assert worker.control.due == set()
