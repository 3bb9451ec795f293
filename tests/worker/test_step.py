"""A step's promises where passes run beside the loop; the broker and the store are real in tests/system."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from meta.bundle import CPU, Bundle
from monitoring.metrics import WorkerMetrics
from schemas.config import Batch, Kafka, Store
from schemas.config import Guard as GuardSettings
from tests.conftest import make_streams
from tests.worker.engine.test_engine import admit, batch
from worker.batch.batcher import MicroBatcher
from worker.consume.offsets import Offsets
from worker.engine.engine import Engine
from worker.engine.passes import Gathered, Pass, Proposals
from worker.guard.guard import Guard
from worker.publish.publisher import Publisher
from worker.step import Step
from worker.store.store import StateStore
from worker.streams.pending import PendingWrites
from worker.trace import Trace


class Held(Engine):
    """An engine whose passes wait until they may go on, and may fail."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.go, self.error = threading.Event(), None

    def forward(self, gathered: Gathered) -> Pass:
        self.go.wait(120)
        if self.error is not None:
            raise self.error
        return super().forward(gathered)


@pytest.fixture
def engine(tiny_bundle: Bundle) -> Held:
    return Held(tiny_bundle)


@contextmanager
def make_step(engine: Held, kafka: Kafka, store_settings: Store, trace: Trace | None = None) -> Iterator[Step]:
    """A step with the streams a and b, a publisher and a store."""
    metrics, offsets = WorkerMetrics(4), Offsets()
    publisher = Publisher(kafka, "w", threading.Event())
    store = StateStore(store_settings)
    streams = make_streams(engine, store, publisher, store_settings, metrics=metrics)
    streams.ensure(["a", "b"])
    guard, batcher = Guard(GuardSettings(), engine.bundle.manifest.limits), MicroBatcher(Batch())
    pending = PendingWrites(streams, publisher, offsets, metrics, 0, lambda: None)
    step = Step(streams, batcher, guard, publisher, pending, metrics, "w", lambda: None, 2, trace=trace)
    yield step
    engine.go.set()
    step.close()
    publisher.close()
    store.close()


@pytest.fixture
def step(engine: Held, kafka_settings: Kafka, store_settings: Store):
    with make_step(engine, kafka_settings, store_settings) as step:
        yield step


@pytest.mark.parametrize("adapt", [True, False])
def test_a_finished_step_has_published(engine: Held, step: Step, topic, kafka_settings: Kafka, adapt: bool) -> None:
    """Also where prediction and update were done in the moment between two looks."""
    engine.go.set()
    flight = step.start([batch("a", 5, adapt=adapt)])
    flight.adapted.result(120)
    assert step.finish(flight) == []
    assert engine.resident("a").header.frames == 5
    assert len(topic.read(kafka_settings.topics.predictions, lambda rs: len(rs) == 5)) == 5


def test_a_pass_here_has_published_before_it_updates(
    engine: Held, step: Step, topic, kafka_settings: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.go.set()
    seen: list[tuple[threading.Thread, int]] = []
    adapt = engine.adapt

    def noted(passed: Pass) -> Proposals:
        sent = topic.read(kafka_settings.topics.predictions, lambda rs: len(rs) == 5)
        seen.append((threading.current_thread(), len(sent)))
        return adapt(passed)

    monkeypatch.setattr(engine, "adapt", noted)
    flight = step.start([batch("a", 5)], here=True)
    assert flight.published
    step.adapt(flight)
    assert seen == [(threading.current_thread(), 5)]
    assert step.finish(flight) == []
    assert engine.resident("a").header.frames == 5
    assert len(topic.read(kafka_settings.topics.predictions, lambda rs: len(rs) >= 5)) == 5


@pytest.mark.parametrize("given_up", [False, True])
def test_of_frames_that_are_held_what_came_of_them_is_kept(engine: Held, step: Step, given_up: bool) -> None:
    """For as long as the stream is the same."""
    engine.go.set()
    flight = step.start([replace(batch("a", 3, adapt=False), fold=False), batch("b", 5)])
    flight.adapted.result(120)
    if given_up:
        engine.release(["a"])
        admit(engine, "a")
    step.finish(flight)
    assert (engine.resident("a").seen is None, engine.resident("b").seen) == (given_up, None)


def test_a_pass_here_that_fails_says_so_at_once(engine: Held, step: Step) -> None:
    engine.error = RuntimeError("broken")
    engine.go.set()
    with pytest.raises(RuntimeError, match="broken"):
        step.start([batch("a", 5)], here=True)


def test_a_stream_given_up_meanwhile_stores_nothing(engine: Held, step: Step) -> None:
    flight = step.start([batch("a", 5), batch("b", 5)])
    engine.release(["a"])
    admit(engine, "a")
    engine.go.set()
    step.publish(flight)
    assert step.finish(flight) == []
    assert engine.resident("a").header.frames == 0
    assert all((engine.tensors("a")[name] == like).all() for name, like in engine.like.items())
    assert engine.resident("b").header.frames == 5


def test_a_pass_that_fails_is_not_waited_for(engine: Held, step: Step) -> None:
    engine.error = RuntimeError("broken")
    engine.go.set()
    flight = step.start([batch("a", 5)])
    flight.adapted.exception(120)
    with pytest.raises(RuntimeError, match="broken"):
        step.publish(flight)
    with pytest.raises(RuntimeError, match="broken"):
        step.finish(flight)


def test_passes_use_the_gpu_that_the_engine_is_on_and_no_other(
    engine: Held, kafka_settings: Kafka, store_settings: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: used.append((threading.current_thread().name, device)))
    engine.device = torch.device("cuda", 1)
    with make_step(engine, kafka_settings, store_settings) as step:
        engine.device = CPU  # where the tensors are
        engine.go.set()
        step.start([batch("a", 5)]).adapted.result(120)
    assert used == [("pass_0", torch.device("cuda", 1))]
