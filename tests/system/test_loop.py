"""A worker in this process: it meets more streams than it keeps, is refused, and turns while pictures are decoded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.config import Adapt, Batch, Bundle, Kafka, Metrics, Store, WorkerConfig
from schemas.frame import Frame, Position, parse_frame
from tests.conftest import Topic, picture
from worker import flights
from worker.decode.image import DecodedFrame, decode_frame
from worker.run import FRESH_S, IDLE_POLL_S, MAX_HELD, PAUSE_S, STUCK_AFTER_S, Worker

LARGE = picture(1, size=(1_200, 1_200))


@pytest.fixture
def config(kafka_settings: Kafka, store_settings: Store, tiny_bundle_path: Path) -> WorkerConfig:
    return WorkerConfig(
        threads=1,
        kafka=kafka_settings,
        store=store_settings,
        bundle=Bundle(path=tiny_bundle_path),
        batch=Batch(max_batch=4, max_wait_ms=10, min_adapt=1),
        adapt=Adapt(max_resident_streams=4),
        metrics=Metrics(port=0),
    )


def test_nothing_is_kept_of_streams_that_made_room(config: WorkerConfig, topic: Topic) -> None:
    topic.send(config.kafka.topics.frames, [(b"cam-%d" % i, picture(i), []) for i in range(40)])
    stop = threading.Event()
    worker = Worker(config, stop)
    answered = worker.metrics.registry.get_sample_value
    deadline = time.monotonic() + 60
    while (answered("driftkeel_predictions_total") or 0) < 40 or worker._flights or worker._streams.crowded:
        assert time.monotonic() < deadline
        worker._turn()
    assert set(worker._partitions_of) == set(worker._streams.engine.streams)
    assert len(worker._partitions_of) <= 4
    stop.set()
    worker.run()


def test_a_worker_is_ready_once_it_has_joined_with_partitions_or_without(
    config: WorkerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(config, threading.Event())
    assert not worker.ready()
    monkeypatch.setattr(worker._consumer, "assignment", set)
    deadline = time.monotonic() + 60
    while not worker.ready():
        assert time.monotonic() < deadline
        worker._turn()
    assert worker.metrics.registry.get_sample_value("driftkeel_assigned_partitions") == 0
    worker._stop.set()
    worker.run()


def test_a_refusal_after_a_long_outage_does_not_stop_the_loop(
    config: WorkerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest: list[float] = []
    monkeypatch.setattr("worker.run.random.uniform", lambda least, most: longest.append(most) or 0.0)
    worker = Worker(config, threading.Event())
    worker._refused(["cam"], span=300.0)  # a step that waited for the store
    assert 0 < longest[0] < STUCK_AFTER_S / 2
    worker._stop.set()
    worker.run()


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, decoding a large picture does not end."""
    free = threading.Event()

    def decode(frame: Frame, received: float, **about: Any) -> Any:
        if frame.image == LARGE:
            assert free.wait(60)
        return decode_frame(frame, received, **about)

    monkeypatch.setattr("worker.parts.decode_frame", decode)
    return free


def turn_until(worker: Worker, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        worker._turn()


def folded(worker: Worker, streams: list[str]) -> dict[str, int]:
    """Frames that have shaped each stream."""
    engine = worker._streams.engine
    return {stream: engine.resident(stream).header.frames if stream in engine else 0 for stream in streams}


def test_frames_read_again_while_they_are_decoded_count_once(
    config: WorkerConfig, topic: Topic, free: threading.Event
) -> None:
    slow, quick = ["slow"], [f"cam-{i}" for i in range(6)]
    records = [(b"slow", LARGE if i % 2 == 0 else picture(i), []) for i in range(10)]
    records += [(name.encode(), picture(i), []) for i in range(10) for name in quick]
    topic.send(config.kafka.topics.frames, records)
    worker = Worker(config.model_copy(update={"adapt": Adapt()}), threading.Event())
    wanted = dict.fromkeys(quick, 10)
    turn_until(worker, lambda: folded(worker, quick) == wanted)
    assert folded(worker, slow) == {"slow": 0}
    under_way = worker._decoding.running
    assert under_way
    for _ in range(2):
        worker._rewind(slow)
        turn_until(worker, lambda: worker._decoding.streams >= set(slow) and folded(worker, quick) == wanted)
    assert not any(future.done() for future in under_way)
    free.set()
    turn_until(worker, lambda: folded(worker, slow) == {"slow": 10})
    turn_until(worker, lambda: not worker._flights and not worker._decoding)
    assert folded(worker, slow + quick) == {"slow": 10} | wanted
    worker._stop.set()
    worker.run()


@pytest.mark.parametrize("limit", [{"max_buffered": 20}, {"max_buffered_bytes": 20 * 28 * 28, "max_pass": 5}])
def test_what_is_decoded_counts_as_buffered(
    config: WorkerConfig, topic: Topic, free: threading.Event, limit: dict[str, int]
) -> None:
    config = config.model_copy(
        update={
            "batch": config.batch.model_copy(update=limit),
            "kafka": config.kafka.model_copy(update={"max_poll_records": 5}),
        }
    )
    topic.send(config.kafka.topics.frames, [(b"slow", LARGE if i == 0 else picture(i), []) for i in range(200)])
    worker = Worker(config, threading.Event())
    turn_until(worker, lambda: worker._waiting >= 20)
    for _ in range(30):
        worker._turn()
    assert worker._waiting < 25
    free.set()
    turn_until(worker, lambda: folded(worker, ["slow"]) == {"slow": 200})
    worker._stop.set()
    worker.run()


def test_frames_that_become_late_while_they_wait_are_passed_over(config: WorkerConfig, topic: Topic) -> None:
    """Those before them have their predictions, and the partition goes on."""
    patient = Batch(max_batch=64, max_wait_ms=29_000, latency_budget_ms=60_000, drop_late=True)
    worker = Worker(config.model_copy(update={"batch": patient}), threading.Event())
    assert worker.config.batch.max_batch == 16  # more at a time would teach nothing more
    passes: list[float] = []
    worker._parts.lateness.took = lambda seconds, ended: passes.append(seconds)  # type: ignore[method-assign]
    answered = worker.metrics.registry.get_sample_value
    topic.send(config.kafka.topics.frames, [(b"cam", picture(i), []) for i in range(16)])
    turn_until(worker, lambda: answered("driftkeel_predictions_total") == 16 and not worker._flights)
    assert len(passes) == 1
    topic.send(config.kafka.topics.frames, [(b"cam", picture(i), []) for i in range(3)])
    turn_until(worker, lambda: len(worker._batcher) == 3)
    for frame in worker._batcher._streams["cam"].fresh:
        frame.sent -= 120
    worker._turn()
    assert len(worker._batcher) == 0
    assert answered("driftkeel_frames_dropped_total") == 3
    assert sum(worker._offsets.unfinished().values()) == 0
    worker._stop.set()
    worker.run()


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
    config: WorkerConfig, topic: Topic, monkeypatch: pytest.MonkeyPatch, lanes: int, here_s: float, expected: bool
) -> None:
    """The first does not: nobody knows yet how long it takes."""
    monkeypatch.setattr(flights, "HERE_S", here_s)
    worker = Worker(config.model_copy(update={"threads": lanes}), threading.Event())
    passes, cameras = threads_of_passes(worker), [f"cam-{i}" for i in range(4)]
    for count in (4, 8, 12):
        records = [(name.encode(), picture(i), []) for i in range(4) for name in cameras]
        topic.send(config.kafka.topics.frames, records)
        turn_until(worker, lambda count=count: folded(worker, cameras) == dict.fromkeys(cameras, count))
    assert not passes[0]
    assert set(passes[1:]) == {expected}
    worker._stop.set()
    worker.run()


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
) -> None:
    config = config.model_copy(update={"batch": config.batch.model_copy(update={"max_pass": 4}), "adapt": Adapt()})
    worker = Worker(config, threading.Event())
    with_waiting(worker, topic, counts, monkeypatch)
    answered: list[float] = []
    monkeypatch.setattr(worker._parts.lateness, "took", lambda seconds, ended: answered.append(seconds))
    worker._flights.begin()
    under_way = list(worker._flights._under_way)
    assert [sum(len(o.batch.frames) for o in one.predicted.result()[0].outlooks) for one in under_way] == expected
    assert all(one.published and not one.adapted.done() for one in under_way)
    assert len(answered) == 2
    worker._looked = time.monotonic()
    assert worker._stocked is (len(worker._batcher) == 4)  # with a pass in memory it need not look after each one
    worker._looked -= 1
    assert not worker._stocked
    worker._move_on()
    assert not worker._flights
    assert sum(folded(worker, list(counts)).values()) == sum(expected)
    turn_until(worker, lambda: folded(worker, list(counts)) == counts)
    worker._stop.set()
    worker.run()


def test_a_pass_that_is_expected_to_be_long_runs_beside_the_loop(
    config: WorkerConfig, topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(config.model_copy(update={"adapt": Adapt()}), threading.Event())
    with_waiting(worker, topic, {"a": 4, "b": 4}, monkeypatch)
    monkeypatch.setattr(flights, "HERE_S", 0.25)
    worker._flights._span, worker._flights._frames = 0.1, 1
    worker._flights.begin()
    assert [flight.here for flight in worker._flights._under_way] == [False]
    turn_until(worker, lambda: folded(worker, ["a", "b"]) == {"a": 4, "b": 4})
    worker._stop.set()
    worker.run()


def test_what_becomes_due_during_a_pass_here_waits_for_its_updates(
    config: WorkerConfig, topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would make a small pass of its own, and more of them than there need be."""
    config = config.model_copy(update={"batch": config.batch.model_copy(update={"max_pass": 16}), "adapt": Adapt()})
    worker = Worker(config, threading.Event())
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
    worker._stop.set()
    worker.run()


def test_a_pass_here_takes_along_what_came_during_the_last(
    config: WorkerConfig, topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not wait for what takes longer to decode than the last pass took."""
    worker = Worker(config, threading.Event())
    in_flight = worker._flights
    monkeypatch.setattr(flights, "HERE_S", 1e9)
    topic.send(config.kafka.topics.frames, [(b"cam", picture(i), []) for i in range(4)])
    turn_until(worker, lambda: folded(worker, ["cam"]) == {"cam": 4} and not in_flight)
    assert in_flight.here
    assert not in_flight.takes_in  # nothing has come
    worker._looked = time.monotonic()
    assert not worker._stocked  # an idle worker waits for the topic rather than turn
    worker._decoding.add(time.monotonic(), SimpleNamespace(key=b"cam", value=picture(1), topic="t", partition=0))
    in_flight._ended, in_flight._span = time.monotonic(), 0.2
    assert in_flight.takes_in
    in_flight._ended -= 1
    assert not in_flight.takes_in
    worker._decoding.drop(("t", 0))
    begun: list[bool] = []
    for waits in (True, False):
        monkeypatch.setattr(flights.Flights, "takes_in", waits)
        monkeypatch.setattr(in_flight, "begin", lambda waits=waits: begun.append(waits))
        worker._turn()
    assert begun == [False]
    worker._stop.set()
    worker.run()


@pytest.fixture
def looker(config: WorkerConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Worker, list[float], list[Any]]]:
    """A worker whose broker is played, how long each of its polls may wait, and what the next one gives."""
    worker = Worker(config.model_copy(update={"batch": Batch(max_wait_ms=5_000)}), threading.Event())
    polls: list[float] = []
    records: list[Any] = []

    def poll(timeout_s: float) -> tuple[list[Any], set[Any]]:
        polls.append(timeout_s)
        given, records[:] = list(records), []
        return given, set()

    monkeypatch.setattr(worker._consumer, "poll", poll)
    monkeypatch.setattr(worker._consumer, "pause", lambda paused: None)
    yield worker, polls, records
    worker._close()


def record(worker: Worker, timestamp: float | None) -> Any:
    topic, milliseconds = worker.config.kafka.topics.frames, None if timestamp is None else int(1000 * timestamp)
    return SimpleNamespace(
        topic=topic, partition=0, offset=0, key=b"cam", value=picture(1), headers=[], timestamp=milliseconds
    )


@pytest.mark.parametrize(
    ("ago", "waits"), [(2.0, 2.0), (-60.0, 0.0), (3_600.0, 10.0), (None, 0.0)], ids=["since", "ahead", "old", "unsaid"]
)
def test_a_frame_waits_since_it_was_sent_but_not_since_before_the_last_poll(
    looker: tuple[Worker, list[float], list[Any]], ago: float | None, waits: float
) -> None:
    """The loop may have stood still for a pass; a producer's clock may say anything."""
    worker, _, records = looker
    records.append(record(worker, None if ago is None else time.time() - ago))
    worker._looked = time.monotonic() - 10
    worker._receive(0.0)
    (arrival,) = next(iter(worker._decoding._order.values()))
    assert worker._looked - arrival.received == pytest.approx(waits, abs=0.5)


def test_a_look_after_a_while_is_for_what_has_come_meanwhile_too(
    looker: tuple[Worker, list[float], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client fetches at each poll what the next one gives."""
    worker, polls, records = looker
    records.append(record(worker, time.time()))
    worker._receive(0.0)
    polls.clear()
    worker._looked -= 1
    worker._look()
    assert polls == [0.0, FRESH_S]
    polls.clear()
    worker._looked = time.monotonic() + 60  # a moment ago
    worker._look()
    assert polls == [0.0]
    polls.clear()
    worker._looked -= 120
    worker._decoding.held += MAX_HELD  # and a partition that is paused gives nothing
    worker._look()
    assert polls == [0.0]
    polls.clear()
    worker._looked -= 120
    worker._decoding.held -= MAX_HELD
    monkeypatch.setattr(Worker, "_waiting", worker.config.batch.max_pass)  # enough for the next pass
    worker._look()
    assert polls == [0.0]


def test_a_worker_with_nothing_to_do_waits_in_one_poll_and_else_for_what_is_due(
    looker: tuple[Worker, list[float], list[Any]],
) -> None:
    worker, polls, _ = looker
    worker._looked -= 1
    worker._look()
    assert polls == [0.0, IDLE_POLL_S]
    polls.clear()
    worker._look()
    assert polls == [IDLE_POLL_S]
    polls.clear()
    now = time.monotonic()
    parsed = parse_frame(Position("frames", 0, 0), b"cam", picture(1), [], 0, 1 << 20, 100)
    frame = decode_frame(parsed, now, worker.config.frames, worker._streams.engine.bundle.manifest.preprocess)
    assert isinstance(frame, DecodedFrame)
    worker._batcher.add([frame])
    worker._looked = now - 1
    worker._look()
    assert time.monotonic() - now >= PAUSE_S  # Frames that come before need not be taken over one by one.
    assert polls == [0.0, FRESH_S]
    polls.clear()
    frame.received -= 10  # due
    worker._looked -= 1
    worker._look()
    assert polls == [0.0, 0.0]


@pytest.mark.parametrize(("max_wait_ms", "patience"), [(5_000, FRESH_S), (10, 0.005), (0, 0.0)])
def test_what_a_look_has_found_does_not_wait_long_for_more(
    looker: tuple[Worker, list[float], list[Any]], max_wait_ms: int, patience: float
) -> None:
    worker, polls, records = looker
    worker.config = worker.config.model_copy(update={"batch": Batch(max_wait_ms=max_wait_ms)})
    records.append(record(worker, time.time()))
    worker._looked -= 1
    worker._look()
    assert polls == [0.0, patience]


@pytest.mark.parametrize(("max_wait_ms", "pause"), [(1_000, PAUSE_S), (60, 0.03), (20, 0.0), (0, 0.0)])
def test_looks_are_paused_for_no_more_than_half_of_the_wait(
    config: WorkerConfig, max_wait_ms: int, pause: float
) -> None:
    worker = Worker(config.model_copy(update={"batch": Batch(max_wait_ms=max_wait_ms)}), threading.Event())
    assert worker._pause == pytest.approx(pause)
    worker._close()
