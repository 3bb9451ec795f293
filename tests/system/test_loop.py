"""A worker in this process: it meets more streams than it keeps, is refused, and turns while pictures are decoded."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.config import Adapt, Batch, WorkerConfig
from schemas.frame import Frame
from schemas.state import StreamHeader, decode_header
from tests.conftest import Topic, picture
from tests.system.conftest import MakeWorker, metric, partition_of, turn_until
from worker import flights
from worker.control.retire import delete
from worker.decode.image import decode_frame
from worker.run import STUCK_AFTER_S, Worker
from worker.store.store import StateStore

LARGE = picture(1, size=(1_200, 1_200))


def test_nothing_is_kept_of_streams_that_made_room(config: WorkerConfig, topic: Topic, make_worker: MakeWorker) -> None:
    topic.send(config.kafka.topics.frames, [(b"cam-%d" % i, picture(i), []) for i in range(40)])
    worker = make_worker(config)
    turn_until(worker, lambda: metric(worker, "predictions_total") >= 40)
    turn_until(worker, lambda: not (worker._flights or worker._streams.crowded))
    assert set(worker._partitions._partitions_of) == set(worker._streams.engine.streams)
    assert len(worker._partitions._partitions_of) <= 4


def test_a_worker_is_ready_once_it_has_joined_with_partitions_or_without(
    config: WorkerConfig, monkeypatch: pytest.MonkeyPatch, make_worker: MakeWorker
) -> None:
    worker = make_worker(config)
    assert worker.unready()
    monkeypatch.setattr(worker._consumer, "assignment", set)
    turn_until(worker, lambda: not worker.unready())
    assert worker.metrics.registry.get_sample_value("driftkeel_assigned_partitions") == 0


def test_a_refusal_after_a_long_outage_does_not_stop_the_loop(
    config: WorkerConfig, monkeypatch: pytest.MonkeyPatch, make_worker: MakeWorker
) -> None:
    longest: list[float] = []
    monkeypatch.setattr("worker.run.random.uniform", lambda least, most: longest.append(most) or 0.0)
    worker = make_worker(config)
    worker._give_way(["cam"], span=300.0)  # a step that waited for the store
    assert 0 < longest[0] < STUCK_AFTER_S / 2


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, decoding a large picture does not end."""
    free = threading.Event()

    def decode(frame: Frame, received: float, **about: Any) -> Any:
        if frame.image == LARGE:
            assert free.wait(120)
        return decode_frame(frame, received, **about)

    monkeypatch.setattr("worker.parts.decode_frame", decode)
    return free


def folded(worker: Worker, streams: list[str]) -> dict[str, int]:
    """Frames that have shaped each stream."""
    engine = worker._streams.engine
    return {stream: engine.resident(stream).header.frames if stream in engine else 0 for stream in streams}


def test_frames_read_again_while_they_are_decoded_count_once(
    config: WorkerConfig, topic: Topic, free: threading.Event, make_worker: MakeWorker
) -> None:
    slow, quick = ["slow"], [f"cam-{i}" for i in range(6)]
    records = [(b"slow", LARGE if i % 2 == 0 else picture(i), []) for i in range(10)]
    records += [(name.encode(), picture(i), []) for i in range(10) for name in quick]
    topic.send(config.kafka.topics.frames, records)
    worker = make_worker(config.model_copy(update={"adapt": Adapt()}))
    wanted = dict.fromkeys(quick, 10)
    turn_until(worker, lambda: folded(worker, quick) == wanted)
    assert folded(worker, slow) == {"slow": 0}
    under_way = worker._decoding.running
    assert under_way
    for _ in range(2):
        worker._partitions.rewind(slow)
        turn_until(worker, lambda: worker._decoding.streams >= set(slow) and folded(worker, quick) == wanted)
    assert not any(future.done() for future in under_way)
    free.set()
    turn_until(worker, lambda: folded(worker, slow) == {"slow": 10})
    turn_until(worker, lambda: not worker._flights and not worker._decoding)
    assert folded(worker, slow + quick) == {"slow": 10} | wanted


@pytest.mark.parametrize("limit", [{"max_buffered": 20}, {"max_buffered_bytes": 20 * 28 * 28, "max_pass": 5}])
def test_what_is_decoded_counts_as_buffered(
    config: WorkerConfig, topic: Topic, free: threading.Event, limit: dict[str, int], make_worker: MakeWorker
) -> None:
    config = config.model_copy(
        update={
            "batch": config.batch.model_copy(update=limit),
            "kafka": config.kafka.model_copy(update={"max_poll_records": 5}),
        }
    )
    topic.send(config.kafka.topics.frames, [(b"slow", LARGE if i == 0 else picture(i), []) for i in range(200)])
    worker = make_worker(config)
    turn_until(worker, lambda: worker._polling.waiting >= 20)
    for _ in range(30):
        worker._turn()
    assert worker._polling.waiting < 30  # A look at the topic that comes late polls twice, for five records each.
    free.set()
    turn_until(worker, lambda: folded(worker, ["slow"]) == {"slow": 200})


def test_frames_that_become_late_while_they_wait_are_passed_over(
    config: WorkerConfig, topic: Topic, make_worker: MakeWorker
) -> None:
    """Those before them have their predictions, and the partition goes on."""
    patient = Batch(max_batch=64, max_wait_ms=29_000, latency_budget_ms=60_000, drop_late=True)
    worker = make_worker(config.model_copy(update={"batch": patient}))
    assert worker.config.batch.max_batch == 16  # more at a time would teach nothing more
    passes: list[float] = []
    worker._parts.lateness.took = lambda seconds, ended: passes.append(seconds)  # type: ignore[method-assign]
    topic.send(config.kafka.topics.frames, [(b"cam", picture(i), []) for i in range(16)])
    turn_until(worker, lambda: metric(worker, "predictions_total") == 16 and not worker._flights)
    assert len(passes) == 1
    topic.send(config.kafka.topics.frames, [(b"cam", picture(i), []) for i in range(3)])
    turn_until(worker, lambda: len(worker._batcher) == 3)
    for frame in worker._batcher._streams["cam"].fresh:
        frame.sent -= 120
    worker._turn()
    assert len(worker._batcher) == 0
    assert metric(worker, "frames_dropped_total") == 3
    assert sum(worker._parts.offsets.unfinished().values()) == 0


def test_held_frames_of_a_stream_that_is_deleted_start_it_anew(
    config: WorkerConfig, topic: Topic, store: StateStore, make_worker: MakeWorker
) -> None:
    """They were predicted and are in no state yet: the write is refused, and they are read again. The partition's other
    streams go on, and so does the chain of events."""
    batch = config.batch.model_copy(update={"min_adapt": 4, "max_hold_ms": 60_000})
    worker = make_worker(config.model_copy(update={"batch": batch, "adapt": Adapt()}))
    gone, stays = [name for name in (f"cam-{i}" for i in range(9)) if partition_of(name) == 0][:2]

    def send(count: int) -> None:
        before = metric(worker, "predictions_total")
        records = [(name.encode(), picture(i), []) for i in range(count) for name in (gone, stays)]
        topic.send(config.kafka.topics.frames, records)
        turn_until(worker, lambda: metric(worker, "predictions_total") == before + len(records) and not worker._flights)

    def stored(stream: str) -> StreamHeader | None:
        content = store.read(stream).header
        return decode_header(content) if content else None

    def frames(stream: str) -> int:
        return header.frames if (header := stored(stream)) else 0

    send(4)
    turn_until(worker, lambda: (frames(gone), frames(stays)) == (4, 4) and set(worker._consumer.lag().values()) == {0})
    send(2)
    assert all(len(worker._batcher._streams[name].held) == 2 for name in (gone, stays))
    *_, last = delete(store, gone, "too early", "operator")
    assert stored(gone) is None
    for name in (gone, stays):
        for frame in worker._batcher._streams[name].held:
            frame.received -= 120
    turn_until(worker, lambda: (frames(gone), frames(stays)) == (2, 6))
    turn_until(worker, lambda: set(worker._consumer.lag().values()) == {0})
    anew = stored(gone)
    assert anew is not None
    assert (anew.step, anew.events) == (0, last.event.number + 1)


def threads_of_passes(worker: Worker) -> list[bool]:
    """Of each pass from now on, whether it runs in this thread."""
    engine, own = worker._streams.engine, threading.current_thread()
    passes: list[bool] = []
    forward = engine.forward

    def noted(gathered: Any) -> Any:
        passes.append(threading.current_thread() is own)
        return forward(gathered)

    engine.forward = noted  # type: ignore[method-assign]
    return passes


@pytest.mark.parametrize(("lanes", "here_s", "expected"), [(1, 1e9, True), (1, 0.0, False), (2, 1e9, False)])
def test_short_passes_of_a_single_lane_run_in_the_loop_itself(
    config: WorkerConfig,
    topic: Topic,
    monkeypatch: pytest.MonkeyPatch,
    lanes: int,
    here_s: float,
    expected: bool,
    make_worker: MakeWorker,
) -> None:
    """The first does not: nobody knows yet how long it takes."""
    monkeypatch.setattr(flights, "HERE_S", here_s)
    worker = make_worker(config.model_copy(update={"threads": lanes}))
    passes, cameras = threads_of_passes(worker), [f"cam-{i}" for i in range(4)]
    for count in (4, 8, 12):
        records = [(name.encode(), picture(i), []) for i in range(4) for name in cameras]
        topic.send(config.kafka.topics.frames, records)
        turn_until(worker, lambda count=count: folded(worker, cameras) == dict.fromkeys(cameras, count))
    assert not passes[0]
    assert set(passes[1:]) == {expected}


def with_waiting(worker: Worker, topic: Topic, counts: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have it predict in its own thread, and then give it frames that wait and are due."""
    monkeypatch.setattr(flights, "HERE_S", 1e9)
    frames = worker.config.kafka.topics.frames
    topic.send(frames, [(b"first", picture(i), []) for i in range(4)])
    turn_until(worker, lambda: folded(worker, ["first"]) == {"first": 4} and not worker._flights)
    with monkeypatch.context() as held:
        held.setattr(flights.Flights, "takes_in", True)
        topic.send(frames, [(name.encode(), picture(i), []) for name, count in counts.items() for i in range(count)])
        turn_until(worker, lambda: len(worker._batcher) == sum(counts.values()))
    for waiting in worker._batcher._streams.values():
        for frame in waiting.fresh:
            frame.received -= 60


@pytest.mark.parametrize(
    ("counts", "expected"),
    [({"a": 4, "b": 4, "c": 4}, [4, 4]), ({"a": 4, "b": 2}, [4, 2])],
    ids=["no further one, so that updates come", "a small one, too"],
)
def test_who_had_no_room_in_a_pass_here_is_predicted_before_its_updates(
    config: WorkerConfig,
    topic: Topic,
    monkeypatch: pytest.MonkeyPatch,
    counts: dict[str, int],
    expected: list[int],
    make_worker: MakeWorker,
) -> None:
    config = config.model_copy(update={"batch": config.batch.model_copy(update={"max_pass": 4}), "adapt": Adapt()})
    worker = make_worker(config)
    with_waiting(worker, topic, counts, monkeypatch)
    answered: list[float] = []
    monkeypatch.setattr(worker._parts.lateness, "took", lambda seconds, ended: answered.append(seconds))
    worker._flights.begin()
    under_way = list(worker._flights._under_way)
    assert [sum(len(o.batch.frames) for o in one.predicted.result()[0].predictions) for one in under_way] == expected
    assert all(one.published and not one.adapted.done() for one in under_way)
    assert len(answered) == 2
    worker._polling._looked = time.monotonic() + 60  # a moment ago
    assert worker._polling.stocked is (
        len(worker._batcher) == 4
    )  # with a pass in memory it need not look after each one
    worker._polling._looked -= 61
    assert not worker._polling.stocked
    worker._move_on()
    assert not worker._flights
    assert sum(folded(worker, list(counts)).values()) == sum(expected)
    turn_until(worker, lambda: folded(worker, list(counts)) == counts)


def test_a_pass_that_is_expected_to_be_long_runs_beside_the_loop(
    config: WorkerConfig, topic: Topic, monkeypatch: pytest.MonkeyPatch, make_worker: MakeWorker
) -> None:
    worker = make_worker(config.model_copy(update={"adapt": Adapt()}))
    with_waiting(worker, topic, {"a": 4, "b": 4}, monkeypatch)
    monkeypatch.setattr(flights, "HERE_S", 0.25)
    worker._flights._span, worker._flights._frames = 0.1, 1
    worker._flights.begin()
    assert [flight.here for flight in worker._flights._under_way] == [False]
    turn_until(worker, lambda: folded(worker, ["a", "b"]) == {"a": 4, "b": 4})


def test_what_becomes_due_during_a_pass_here_waits_for_its_updates(
    config: WorkerConfig, topic: Topic, monkeypatch: pytest.MonkeyPatch, make_worker: MakeWorker
) -> None:
    """It would make a small pass of its own, and more of them than there need be."""
    config = config.model_copy(update={"batch": config.batch.model_copy(update={"max_pass": 16}), "adapt": Adapt()})
    worker = make_worker(config)
    with_waiting(worker, topic, {"a": 4, "b": 4}, monkeypatch)
    later = list(worker._batcher._streams["b"].fresh)
    worker._batcher.drop(["b"])
    start = worker._parts.step.start

    def meanwhile(batches: Any, here: bool) -> Any:
        worker._batcher.add(later)
        return start(batches, here)

    monkeypatch.setattr(worker._parts.step, "start", meanwhile)
    worker._flights.begin()
    assert [flight.streams for flight in worker._flights._under_way] == [{"a"}]
    assert len(worker._batcher) == 4
    monkeypatch.undo()
    turn_until(worker, lambda: folded(worker, ["a", "b"]) == {"a": 4, "b": 4})


def test_a_pass_here_takes_along_what_came_during_the_last(
    config: WorkerConfig, topic: Topic, monkeypatch: pytest.MonkeyPatch, make_worker: MakeWorker
) -> None:
    """And does not wait for what takes longer to decode than the last pass took."""
    worker = make_worker(config)
    in_flight = worker._flights
    monkeypatch.setattr(flights, "HERE_S", 1e9)
    topic.send(config.kafka.topics.frames, [(b"cam", picture(i), []) for i in range(4)])
    turn_until(worker, lambda: folded(worker, ["cam"]) == {"cam": 4} and not in_flight)
    assert in_flight.here
    assert not in_flight.takes_in  # nothing has come
    worker._polling._looked = time.monotonic() + 60  # a moment ago
    assert not worker._polling.stocked  # an idle worker waits for the topic rather than turn
    record = SimpleNamespace(key=b"cam", value=picture(1), topic="t", partition=0, headers=[])
    worker._decoding.add(time.monotonic(), record)
    in_flight._ended, in_flight._span = time.monotonic(), 60.0
    assert in_flight.takes_in
    in_flight._ended -= 60
    assert not in_flight.takes_in
    worker._decoding.drop(("t", 0))
    begun: list[bool] = []
    for waits in (True, False):
        monkeypatch.setattr(flights.Flights, "takes_in", waits)
        monkeypatch.setattr(in_flight, "begin", lambda waits=waits: begun.append(waits))
        worker._turn()
    assert begun == [False]
