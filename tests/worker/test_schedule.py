from meta.bundle import Bundle
from monitoring.metrics import WorkerMetrics
from schemas.config import Adapt, Batch
from schemas.state import DriftWatch
from tests.worker.test_engine import admit, batch
from worker.batcher import MicroBatch
from worker.engine import Engine
from worker.schedule import Scheduler


def sent(at: float, count: int = 4) -> MicroBatch:
    made = batch("a", count)
    for frame in made.frames:
        frame.sent = at
    return made


def decide(settings: Batch, *batches: MicroBatch, now: float = 100.0) -> tuple[list[MicroBatch], float]:
    metrics = WorkerMetrics(0)
    decided = Scheduler(settings, Adapt(), None, metrics).decide(list(batches), now)
    return decided, metrics.registry.get_sample_value(
        "driftkeel_adaptations_left_out_total", {"reason": "overload"}
    ) or 0


def test_late_frames_are_predicted_only_and_counted() -> None:
    (late, fresh), count = decide(Batch(latency_budget_ms=1_000), sent(at=99.4), sent(at=99.6))
    assert (late.adapt, late.fold) == (False, True)
    assert "overload" in late.reason
    assert fresh.adapt
    assert count == 1


def test_frames_that_were_predicted_already_have_no_budget_left_to_miss() -> None:
    held = sent(at=0.0)
    for frame in held.frames:
        frame.published = True
    assert decide(Batch(latency_budget_ms=1_000), held)[0][0].adapt


def test_without_a_budget_everything_adapts() -> None:
    (late,), count = decide(Batch(), sent(at=0.0))
    assert late.adapt
    assert count == 0


def test_settled_streams_are_left_out_and_counted(tiny_bundle: Bundle) -> None:
    engine = Engine(tiny_bundle)
    admit(engine, "a", "b")
    header = engine.resident("b").header
    engine.resident("b").header = header.model_copy(update={"drift": DriftWatch(adapting=False)})
    metrics = WorkerMetrics(0)
    scheduler = Scheduler(Batch(), Adapt(mode="on_demand"), engine, metrics)
    new, still = scheduler.decide([batch("a", 4), batch("b", 4)], 0.0)
    assert new.adapt
    assert (still.adapt, still.fold) == (False, True)
    assert "settled" in still.reason
    left_out = metrics.registry.get_sample_value("driftkeel_adaptations_left_out_total", {"reason": "settled"})
    assert left_out == 1
