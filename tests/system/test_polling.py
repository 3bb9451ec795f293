"""How a worker in this process looks at the topic: how often, for how long, and since when a frame waits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from schemas.config import Batch, WorkerConfig
from schemas.frame import Position, parse_frame
from tests.conftest import picture
from tests.system.conftest import MakeWorker
from worker.decode.image import DecodedFrame, decode_frame
from worker.polling import FRESH_S, IDLE_POLL_S, MAX_HELD, PAUSE_S, Polling
from worker.run import Worker

EPOCH = 1_700_000_000.0


class Clock:
    """One that stands still, however long the machine takes, and what was slept by it."""

    def __init__(self) -> None:
        self.now, self.slept = 1_000.0, [0.0]

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return EPOCH

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("worker.polling.time", clock)
    return clock


@pytest.fixture
def looker(
    config: WorkerConfig, monkeypatch: pytest.MonkeyPatch, make_worker: MakeWorker, clock: Clock
) -> tuple[Worker, list[float], list[Any]]:
    """A worker whose broker is played, how long each of its polls may wait, and what the next one gives."""
    worker = make_worker(config.model_copy(update={"batch": Batch(max_wait_ms=5_000)}))
    polls: list[float] = []
    records: list[Any] = []

    def poll(timeout_s: float) -> tuple[list[Any], set[Any]]:
        polls.append(timeout_s)
        given, records[:] = list(records), []
        return given, set()

    monkeypatch.setattr(worker._consumer, "poll", poll)
    monkeypatch.setattr(worker._consumer, "pause", lambda paused: None)
    return worker, polls, records


def record(worker: Worker, timestamp: float | None) -> Any:
    topic, milliseconds = worker.config.kafka.topics.frames, None if timestamp is None else int(1000 * timestamp)
    return SimpleNamespace(
        topic=topic, partition=0, offset=0, key=b"cam", value=picture(1), headers=[], timestamp=milliseconds
    )


@pytest.mark.parametrize(
    ("ago", "waits"), [(2.0, 2.0), (-60.0, 0.0), (3_600.0, 10.0), (None, 0.0)], ids=["since", "ahead", "old", "unsaid"]
)
def test_a_frame_waits_since_it_was_sent_but_not_since_before_the_last_poll(
    looker: tuple[Worker, list[float], list[Any]], clock: Clock, ago: float | None, waits: float
) -> None:
    """The loop may have stood still for a pass; a producer's clock may say anything."""
    worker, _, records = looker
    records.append(record(worker, None if ago is None else EPOCH - ago))
    worker._polling._looked = clock.now - 10
    worker._polling.receive(0.0)
    (arrival,) = next(iter(worker._decoding._order.values()))
    assert worker._polling._looked - arrival.received == pytest.approx(waits)


def test_a_look_after_a_while_is_for_what_has_come_meanwhile_too(
    looker: tuple[Worker, list[float], list[Any]], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client fetches at each poll what the next one gives."""
    worker, polls, records = looker
    records.append(record(worker, EPOCH))
    worker._polling.receive(0.0)
    polls.clear()
    worker._polling._looked -= 1
    worker._polling.look()
    assert polls == [0.0, FRESH_S]
    polls.clear()
    worker._polling._looked = clock.now  # a moment ago
    worker._polling.look()
    assert polls == [0.0]
    polls.clear()
    worker._polling._looked -= 60
    worker._decoding.held += MAX_HELD  # and a partition that is paused gives nothing
    worker._polling.look()
    assert polls == [0.0]
    polls.clear()
    worker._polling._looked -= 60
    worker._decoding.held -= MAX_HELD
    monkeypatch.setattr(Polling, "waiting", worker.config.batch.max_pass)  # enough for the next pass
    worker._polling.look()
    assert polls == [0.0]


def test_a_worker_with_nothing_to_do_waits_in_one_poll_and_else_for_what_is_due(
    looker: tuple[Worker, list[float], list[Any]], clock: Clock
) -> None:
    worker, polls, _ = looker
    worker._polling._looked -= 1
    worker._polling.look()
    assert polls == [0.0, IDLE_POLL_S]
    polls.clear()
    worker._polling.look()
    assert polls == [IDLE_POLL_S]
    polls.clear()
    now = clock.now
    parsed = parse_frame(Position("frames", 0, 0), b"cam", picture(1), [], 0, 1 << 20, 100)
    frame = decode_frame(parsed, now, worker.config.frames, worker._streams.engine.bundle.manifest.preprocess)
    assert isinstance(frame, DecodedFrame)
    worker._batcher.add([frame])
    worker._polling._looked = now - 1
    worker._polling.look()
    assert clock.slept[-1] == PAUSE_S  # Frames that come before need not be taken over one by one.
    assert polls == [0.0, FRESH_S]
    polls.clear()
    frame.received -= 10  # due
    worker._polling._looked -= 1
    worker._polling.look()
    assert polls == [0.0, 0.0]


@pytest.mark.parametrize(("max_wait_ms", "patience"), [(5_000, FRESH_S), (10, 0.005), (0, 0.0)])
def test_what_a_look_has_found_does_not_wait_long_for_more(
    looker: tuple[Worker, list[float], list[Any]], max_wait_ms: int, patience: float
) -> None:
    worker, polls, records = looker
    worker._polling._batch = Batch(max_wait_ms=max_wait_ms)
    records.append(record(worker, EPOCH))
    worker._polling._looked -= 1
    worker._polling.look()
    assert polls == [0.0, patience]


@pytest.mark.parametrize(("max_wait_ms", "pause"), [(1_000, PAUSE_S), (60, 0.03), (20, 0.0), (0, 0.0)])
def test_looks_are_paused_for_no_more_than_half_of_the_wait(
    config: WorkerConfig, max_wait_ms: int, pause: float, make_worker: MakeWorker
) -> None:
    worker = make_worker(config.model_copy(update={"batch": Batch(max_wait_ms=max_wait_ms)}))
    assert worker._polling._pause == pytest.approx(pause)
