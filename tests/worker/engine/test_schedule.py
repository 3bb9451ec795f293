from dataclasses import replace
from types import SimpleNamespace

import pytest

from meta.bundle import Bundle
from monitoring.drift import CHECK_JOINED
from monitoring.metrics import WorkerMetrics
from schemas.config import Adapt, Batch
from schemas.policy import Policy, PolicyChange
from schemas.state import DriftWatch, GuardState
from tests.worker.engine.test_engine import admit, batch
from worker.batch.batcher import MicroBatch
from worker.batch.lateness import Lateness
from worker.decode.image import DecodedFrame
from worker.engine.engine import Engine
from worker.engine.schedule import CONTESTED, HOMELESS, NARROW, Scheduler
from worker.guard.answer import Policies


def sent(at: float, count: int = 4) -> MicroBatch:
    made = batch("a", count)
    for frame in made.frames:
        frame.sent, frame.received = at, HERE
    return made


HERE, NOW = 1_000.0, 1_700_000_000.0  # by the monotonic clock, and 2023-11-14 22:13:20 UTC
ALWAYS, ANYTHING = Adapt(), Policy()
AUTO = Policies(ANYTHING, {})


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the machine takes."""
    monkeypatch.setattr("worker.batch.lateness.time", SimpleNamespace(monotonic=lambda: HERE))


@pytest.fixture
def engine(tiny_bundle: Bundle) -> Engine:
    engine = Engine(tiny_bundle)
    admit(engine, "a", "b")
    return engine


def left_out(metrics: WorkerMetrics, reason: str) -> float:
    return metrics.registry.get_sample_value("driftkeel_adaptations_left_out_total", {"reason": reason}) or 0


def decide(engine: Engine, settings: Batch, *batches: MicroBatch, now: float = 100.0) -> tuple[list[MicroBatch], float]:
    metrics = WorkerMetrics(0)
    decided = Scheduler(Lateness(settings), 16, Adapt(), AUTO, engine, metrics).decide(list(batches), now)
    return decided, left_out(metrics, "overload")


def test_late_frames_are_predicted_only_and_counted(engine: Engine) -> None:
    settings = Batch(latency_budget_ms=1_000, max_wait_ms=100)
    (late, spared, fresh), count = decide(engine, settings, *(sent(at) for at in (99.4, 99.6, 99.75)))
    assert (late.adapt, late.fold, late.hurried) == (False, True, True)
    assert "overload" in late.reason
    # On the way there, so that those behind need not be hurried: no update, and nothing else is left out.
    assert (spared.adapt, spared.fold, spared.hurried) == (False, True, False)
    assert spared.reason == "overload: frames had waited for 300 ms, on the way to half of the budget"
    assert (fresh.adapt, fresh.hurried) == (True, False)
    assert count == 2


def test_late_frames_do_not_wait_for_more(engine: Engine) -> None:
    """For an update that comes later they would be predicted once more, under overload."""
    settings, few = Batch(latency_budget_ms=1_000), replace(sent(at=99.4), adapt=False, fold=False)
    (late,), count = decide(engine, settings, few)
    assert (late.adapt, late.fold, late.hurried, count) == (False, True, True, 1)
    (soon,), count = decide(engine, settings, few, now=99.6)
    assert (soon.adapt, soon.fold, soon.hurried, count) == (False, False, False, 0)


def test_frames_that_only_wait_are_left_out_of_no_update(engine: Engine) -> None:
    """Whatever would hold that back: they are counted once they would make one."""
    settle(engine, "a", 0)
    header = engine.resident("a").header
    engine.resident("a").header = header.model_copy(update={"guard": GuardState(rest=100)})
    few, metrics = replace(sent(at=99.65), adapt=False, fold=False), WorkerMetrics(0)
    for policy in (Policy(), Policy(frozen=True)):
        lateness, policies = Lateness(Batch(latency_budget_ms=1_000)), Policies(policy, {})
        scheduler = Scheduler(lateness, 16, Adapt(mode="on_demand"), policies, engine, metrics)
        assert scheduler.decide([few], 100.0) == [few]
    assert not any(left_out(metrics, reason) for reason in ("overload", "policy", "resting", "settled"))


def test_too_few_late_frames_are_hurried_and_stay_too_few(engine: Engine) -> None:
    few = replace(sent(at=99.4), adapt=False, reason="too few frames within max_hold_ms")
    assert decide(engine, Batch(latency_budget_ms=1_000), few) == ([replace(few, hurried=True)], 0)


def test_where_the_state_cannot_be_stored_source_answers_at_once_and_nothing_is_learned(engine: Engine) -> None:
    engine.resident("a").token = 0
    for work in (batch("a", 4), replace(batch("a", 4), adapt=False, fold=False)):
        ((decided,), _) = decide(engine, Batch(), work)
        assert (decided.adapt, decided.answer, decided.hurried, decided.reason) == (False, "source", True, HOMELESS)


def test_frames_of_a_stream_that_another_worker_wants_too_do_not_wait_for_more(engine: Engine) -> None:
    engine.resident("a").contested = True
    few = replace(batch("a", 2), adapt=False, fold=False)
    ((done, full), _) = decide(engine, Batch(), few, batch("a", 4))
    assert (done.adapt, done.fold, done.reason) == (False, True, CONTESTED)
    assert (full.adapt, full.fold, full.reason) == (True, True, "")


def test_where_a_record_does_not_say_when_it_was_sent_its_receipt_counts(engine: Engine) -> None:
    untold, held_up = sent(at=-0.001), sent(at=-0.001)
    for made, before in ((untold, 0.1), (held_up, 0.9)):
        for frame in made.frames:
            frame.received = HERE - before
    (soon, late), count = decide(engine, Batch(latency_budget_ms=1_000), untold, held_up)
    assert (soon.adapt, late.adapt, count) == (True, False, 1)


def test_frames_that_were_predicted_already_have_no_budget_left_to_miss(engine: Engine) -> None:
    held = sent(at=0.0)
    for frame in held.frames:
        frame.published = True
    assert decide(engine, Batch(latency_budget_ms=1_000), held)[0][0].adapt


def test_without_a_budget_everything_adapts(engine: Engine) -> None:
    (late,), count = decide(engine, Batch(), sent(at=0.0))
    assert late.adapt
    assert count == 0


def test_settled_streams_are_left_out_and_counted(engine: Engine) -> None:
    header = engine.resident("b").header
    engine.resident("b").header = header.model_copy(update={"drift": DriftWatch(adapting=False)})
    metrics = WorkerMetrics(0)
    scheduler = Scheduler(Lateness(Batch()), 16, Adapt(mode="on_demand"), AUTO, engine, metrics)
    new, still = scheduler.decide([batch("a", 4), batch("b", 4)], 0.0)
    assert new.adapt
    assert (still.adapt, still.fold) == (False, True)
    assert "settled" in still.reason
    assert left_out(metrics, "settled") == 1


def settle(engine: Engine, stream: str, rested: int) -> None:
    """A settled stream that is well: of which nothing is known, that counts as accurate as on clean frames."""
    header = engine.resident(stream).header
    proxies = header.proxies.model_copy(update={"frames": 0})
    watch = DriftWatch(adapting=False, rested=rested)
    engine.resident(stream).header = header.model_copy(update={"drift": watch, "proxies": proxies})


def adapting(engine: Engine, *batches: MicroBatch) -> tuple[list[str], float]:
    metrics = WorkerMetrics(0)
    scheduler = Scheduler(Lateness(Batch()), 16, Adapt(mode="on_demand"), AUTO, engine, metrics)
    decided = scheduler.decide(list(batches), 0.0)
    return [b.stream for b in decided if b.adapt and not b.reason], left_out(metrics, "settled")


def test_settled_streams_join_an_update_of_their_pass_in_half_the_time(engine: Engine) -> None:
    admit(engine, "c")
    settle(engine, "b", CHECK_JOINED - 1)
    settle(engine, "c", CHECK_JOINED - 2)
    assert adapting(engine, batch("b", 4), batch("c", 4)) == ([], 2)
    assert adapting(engine, batch("a", 4), batch("b", 16), batch("c", 4)) == (["a", "b"], 1)
    assert adapting(engine, batch("a", 4), batch("b", 17)) == (["a"], 1)


def test_in_wide_passes_nobody_joins(engine: Engine) -> None:
    """There somebody is due for an update anyway, and those who join would only make more."""
    settle(engine, "b", CHECK_JOINED - 1)
    others = [f"c{i}" for i in range(NARROW - 1)]
    admit(engine, *others)
    for stream in others:
        settle(engine, stream, 0)
    assert adapting(engine, batch("a", 4), batch("b", 4), *[batch(s, 4) for s in others])[0] == ["a"]
    assert adapting(engine, batch("a", 4), batch("b", 4), *[batch(s, 4) for s in others[1:]])[0] == ["a", "b"]


def test_of_frames_that_will_make_no_update_it_is_known_before(engine: Engine) -> None:
    """They can go in one micro-batch, however many wait: under overload each costs the loop as much as a full one."""
    on_time, late = sent(at=99.8).frames[0], sent(at=99.6).frames[0]

    def rests(oldest: DecodedFrame, adapt: Adapt = ALWAYS, policy: Policy = ANYTHING) -> bool:
        settings = Batch(latency_budget_ms=1_000)
        return Scheduler(Lateness(settings), 16, adapt, Policies(policy, {}), engine, WorkerMetrics(0)).predicts_only(
            "a", oldest, 100.0
        )

    assert [rests(on_time), rests(late)] == [False, True]
    assert rests(on_time, policy=Policy(frozen=True))
    header = engine.resident("a").header
    engine.resident("a").header = header.model_copy(update={"drift": DriftWatch(adapting=False)})
    assert [rests(on_time), rests(on_time, Adapt(mode="on_demand"))] == [False, True]


def test_streams_that_rest_after_going_back_are_left_out_until_the_last_frame_of_it(engine: Engine) -> None:
    for stream, rest in (("a", 5), ("b", 4)):
        header = engine.resident(stream).header
        engine.resident(stream).header = header.model_copy(update={"guard": GuardState(rest=rest)})
    metrics = WorkerMetrics(0)
    resting, over = Scheduler(Lateness(Batch()), 16, Adapt(), AUTO, engine, metrics).decide(
        [batch("a", 4), batch("b", 4)], 0.0
    )
    assert (resting.adapt, resting.fold, resting.reason) == (False, True, "resting after a reset, 1 frames to go")
    assert over.adapt
    assert left_out(metrics, "resting") == 1


@pytest.mark.parametrize(
    ("policy", "now", "reason"),
    [
        (Policy(), NOW, ""),
        (Policy(frozen=True), NOW, "policy: frozen"),
        (Policy(quiet_hours=("08:00-09:00", "22:00-06:00")), NOW, "policy: quiet hours 08:00-09:00, 22:00-06:00"),
        (Policy(quiet_hours=("22:30-06:00",)), NOW, ""),
        (Policy(max_updates_per_hour=2), NOW, "policy: 2 updates in this hour"),
        (Policy(max_updates_per_hour=3), NOW, ""),
        (Policy(max_updates_per_hour=2), NOW + 3_600, ""),
    ],
)
def test_the_policy_says_when_there_may_be_updates(engine: Engine, policy: Policy, now: float, reason: str) -> None:
    header = engine.resident("a").header
    header.lately = header.lately.and_one(NOW - 3_600).and_one(NOW - 60).and_one(NOW - 1)
    metrics = WorkerMetrics(0)
    (decided,) = Scheduler(Lateness(Batch()), 16, Adapt(), Policies(policy, {}), engine, metrics).decide(
        [batch("a", 4)], now
    )
    assert (decided.adapt, decided.reason) == (not reason, reason)
    assert decided.fold
    assert left_out(metrics, "policy") == bool(reason)


def test_the_policy_is_the_reason_also_where_frames_are_too_few(engine: Engine) -> None:
    few = replace(batch("a", 4), adapt=False, reason="too few frames within max_hold_ms")
    quiet = Policies(Policy(quiet_hours=("22:00-06:00",)), {})
    (decided,) = Scheduler(Lateness(Batch()), 16, Adapt(), quiet, engine, WorkerMetrics(0)).decide([few], NOW)
    assert (decided.adapt, decided.fold, decided.reason) == (False, True, "policy: quiet hours 22:00-06:00")


def test_single_streams_and_commands_override_the_policy(engine: Engine) -> None:
    policies = Policies(Policy(mode="shadow", frozen=True), {"b": PolicyChange(mode="auto")})
    engine.resident("b").header.policy = PolicyChange(frozen=False)
    a, b = Scheduler(Lateness(Batch()), 16, Adapt(), policies, engine, WorkerMetrics(0)).decide(
        [batch("a", 4), batch("b", 4)], NOW
    )
    assert (a.answer, a.adapt) == ("source", False)
    assert (b.answer, b.adapt) == ("adapted", True)
