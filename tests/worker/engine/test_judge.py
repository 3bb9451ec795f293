"""What a ruling makes of a stream's parameters and header."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from meta.bundle import load_bundle
from schemas.bundle import Limits
from schemas.config import Guard as GuardSettings
from schemas.policy import Policy
from schemas.state import DriftWatch, GuardState, Snapshot
from tests.worker.engine.test_engine import admit, batch
from worker.engine.engine import Engine
from worker.engine.judge import Judgement, judge
from worker.guard.answer import Policies
from worker.guard.guard import COSINE_SEEN, Guard, Ruling
from worker.publish.event import update_event

AUTO = Policies(Policy(), {})
LIMITS = Limits(raw_gradient_norm=1e9, source_distance=1e9)


class Fixed(Guard):
    """A guard that has made up its mind."""

    def __init__(self, ruling: Ruling) -> None:
        super().__init__(GuardSettings(), LIMITS)
        self.ruling = ruling

    def judge(self, *_: object) -> Ruling:
        return self.ruling


@pytest.fixture
def engine(tiny_bundle) -> Engine:
    engine = Engine(tiny_bundle)
    admit(engine, "a", "b")
    turn(engine, Ruling("applied", ""), 1)
    return engine


def turn(
    engine: Engine, ruling: Ruling, seed: int, adapt: bool = True, newest=lambda stream: None, watch: int = 0
) -> Judgement:
    passed = engine.predict([batch("b", 5, 9), batch("a", 6, seed, adapt)])
    proposals = engine.adapt(passed)
    (prediction,) = (o for o in passed.predictions if o.batch.stream == "a")
    (proposal,) = (p for p in proposals.proposals if p.prediction is prediction)
    judgement = judge(engine, Fixed(ruling), prediction, proposals, proposal, watch, newest)
    engine.accept(proposals, [judgement.kept] if judgement.kept is not None else [])
    engine.resident("a").header = judgement.header
    return judgement


def test_a_skipped_update_leaves_every_tensor(engine: Engine) -> None:
    before = {name: tensor.clone() for name, tensor in engine.tensors("a").items()}
    judgement = turn(engine, Ruling("skipped", "why"), 2)
    assert (judgement.kept, judgement.header.step, judgement.header.frames) == (None, 1, 12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.tensors("a").items())


def test_repeated_frames_are_seen_whether_an_update_was_meant_or_not(engine: Engine) -> None:
    assert turn(engine, Ruling("skipped", ""), 1, adapt=False).blind  # those of the fixture
    assert not turn(engine, Ruling("skipped", ""), 2, adapt=False).blind
    assert turn(engine, Ruling("skipped", ""), 2).blind


def test_a_partial_update_goes_part_of_the_way(engine: Engine) -> None:
    before = engine.tensors("a")["affine"].clone()
    other = Engine(engine.bundle)
    admit(other, "a", "b")
    turn(other, Ruling("applied", ""), 1)
    turn(other, Ruling("applied", ""), 2)
    whole = other.tensors("a")
    assert turn(engine, Ruling("partial", "", 0.25), 2).header.step == 2
    part = engine.tensors("a")
    torch.testing.assert_close(part["affine"], torch.lerp(before, whole["affine"], 0.25))
    assert torch.equal(part["second_moment"], whole["second_moment"])


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_event_says_how_far_the_stream_is_after_the_decision(engine: Engine, share: float) -> None:
    passed = engine.predict([batch("a", 6, 2)])
    proposals = engine.adapt(passed)
    (prediction,), (proposal,) = passed.predictions, proposals.proposals
    decision = "applied" if share == 1 else "partial"
    judgement = judge(engine, Fixed(Ruling(decision, "", share)), prediction, proposals, proposal)
    sealed = update_event(engine, AUTO, "w", prediction, judgement, proposal)
    engine.accept(proposals, [proposal])
    distance = (engine.tensors("a")["affine"] - engine.like["affine"]).norm()
    assert sealed.event.source_distance == pytest.approx(float(distance), rel=1e-3)


@pytest.mark.parametrize(("decision", "share"), [("applied", 1.0), ("partial", 0.25), ("skipped", 1.0)])
@pytest.mark.parametrize("trusted", [True, False])
def test_the_event_says_what_was_seen_and_what_became_of_it(
    engine: Engine, decision: str, share: float, trusted: bool
) -> None:
    before = engine.resident("a").header
    before.guard = GuardState(trusted=trusted)
    passed = engine.predict([batch("a", 6, 2)])
    proposals = engine.adapt(passed)
    (prediction,), (proposal,) = passed.predictions, proposals.proposals
    told = {"loss": 1.0, "entropy": 0.5, "discrepancy": 3.0, "raw_gradient_norm": 2.0, "cosine": -0.25}
    proposal.signals.update({**told, "loss": told["loss"] if trusted else math.nan})
    guard = Fixed(Ruling(decision, "why", share))
    guard.observe = lambda guard_state, *_: guard_state  # type: ignore[method-assign]
    judgement = judge(engine, guard, prediction, proposals, proposal)
    event = update_event(engine, AUTO, "w", prediction, judgement, proposal).event
    assert {name: getattr(event, name) for name in told} == told | {"loss": 1.0 if trusted else None}
    assert event.generated_gradient_norm == proposal.signals["generated_gradient_norm"]
    moved = {} if decision == "skipped" else {name: share * way for name, way in proposal.layers.items()}
    assert event.layers == pytest.approx(moved, rel=1e-3)
    assert (event.source_distance is None) == (decision == "skipped")
    assert (event.before, event.after) == (engine.estimate(before), engine.estimate(judgement.header))
    assert event.before != event.after
    assert event.flipped == prediction.observed.flipped
    assert (event.decision, event.reason, event.step) == (decision, "why", 1 + (decision != "skipped"))
    assert (event.parameters, event.token, event.worker) == ("adapted" if trusted else "source", 1, "w")
    assert event.frames == [f"frames/0/{number}" for number in range(6)]


@pytest.mark.parametrize(
    ("mode", "answered", "before", "after", "expected"),
    [
        ("approve", "approved", True, False, "approved"),  # Approved parameters do not need the guard's trust.
        ("auto", "source", False, True, "adapted"),
        ("auto", "adapted", True, False, "source"),
        ("shadow", "source", False, True, "source"),
    ],
)
def test_the_event_says_who_answers_after_the_decision(
    engine: Engine, mode: str, answered: str, before: bool, after: bool, expected: str
) -> None:
    header = engine.resident("a").header
    header.guard, header.approved = GuardState(trusted=before), 1
    passed = engine.predict([replace(batch("a", 6, 2), answer=answered)])
    proposals = engine.adapt(passed)
    (prediction,), (proposal,) = passed.predictions, proposals.proposals
    guard = Fixed(Ruling("applied", ""))
    guard.observe = lambda *_: GuardState(trusted=after)  # type: ignore[method-assign]
    judgement = judge(engine, guard, prediction, proposals, proposal)
    policies = Policies(Policy(mode=mode), {})
    assert update_event(engine, policies, "w", prediction, judgement, proposal).event.parameters == expected


@pytest.mark.parametrize("decision", ["rolled_back", "reset"])
def test_the_event_says_where_going_back_leads(engine: Engine, decision: str) -> None:
    good, header = engine.tensors("a")["affine"].clone(), engine.resident("a").header
    snapshot = Snapshot(time=datetime(2026, 1, 2, tzinfo=UTC), reason="", header=header)
    kept = {name: tensor.clone() for name, tensor in engine.tensors("a").items()}
    turn(engine, Ruling("applied", ""), 2)
    before, source = engine.tensors("a")["affine"].clone(), engine.like["affine"]
    passed = engine.predict([batch("a", 6, 3)])
    proposals = engine.adapt(passed)
    (prediction,), (proposal,) = passed.predictions, proposals.proposals
    ruling = Ruling(decision, "why")
    judgement = judge(engine, Fixed(ruling), prediction, proposals, proposal, newest=lambda stream: (snapshot, kept))
    event = update_event(engine, AUTO, "w", prediction, judgement, proposal).event
    there, reason = (good, "why; to the snapshot of step 1") if decision == "rolled_back" else (source, "why")
    assert (event.decision, event.reason, event.step) == (decision, reason, int(decision == "rolled_back"))
    assert event.source_distance == pytest.approx(float((there - source).norm()))
    assert event.layers == engine.distances(before[None], there[None])[0]
    assert any(event.layers.values())


@pytest.mark.parametrize("decision", ["rolled_back", "reset"])
def test_going_back_ends_what_drift_detection_knew_of_the_old_parameters(engine: Engine, decision: str) -> None:
    """A stream that counted as settled would else make no update where it has everything to learn again."""
    engine.resident("a").header.drift = DriftWatch(adapting=False, mean=[1.0], variance=[1.0], rise=[0.0], fall=[0.0])
    assert turn(engine, Ruling("applied", ""), 2).header.drift is not None
    assert turn(engine, Ruling(decision, ""), 3).header.drift is None


def test_drift_detection_begins_when_a_stream_may_learn_again(engine: Engine) -> None:
    """While it rests it stands still, and would be taken for settled at source."""
    header = engine.resident("a").header
    resting = header.model_copy(update={"guard": GuardState(rest=1_000), "drift": None})
    engine.resident("a").header = resting
    assert turn(engine, Ruling("skipped", "resting"), 2, watch=6).header.drift is None
    engine.resident("a").header = resting.model_copy(update={"guard": GuardState(rest=1)})
    assert turn(engine, Ruling("applied", ""), 3, watch=6).header.drift is not None


@pytest.mark.parametrize("decision", ["rolled_back", "reset"])
def test_going_back_leads_to_source_and_nobody_else_moves(engine: Engine, decision: str) -> None:
    before = {name: tensor.clone() for name, tensor in engine.tensors("b").items()}
    judgement = turn(engine, Ruling(decision, ""), 2)
    assert (judgement.ruling.decision, judgement.header.step) == ("reset", 0)
    assert all(torch.equal(tensor, engine.like[name]) for name, tensor in engine.tensors("a").items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.tensors("b").items())
    signals = judgement.header.proxies.signals
    assert signals["confidence"] == signals["source_confidence"]
    assert (signals["flips"], signals["distance"]) == (0, 0)


def test_of_one_pass_the_stream_beyond_the_distance_limit_comes_back_and_others_are_held(tiny_bundle) -> None:
    engine = Engine(tiny_bundle)
    admit(engine, "far", "near")
    engine.replace("far", {**engine.like, "affine": engine.like["affine"] + 1})
    guard = Guard(GuardSettings(), Limits(raw_gradient_norm=1e9, source_distance=1e-9))
    passed = engine.predict([batch("far", 6, 1), batch("near", 6, 2)])
    proposals = engine.adapt(passed)
    decided = {p.prediction.batch.stream: judge(engine, guard, p.prediction, proposals, p) for p in proposals.proposals}
    assert {stream: one.ruling.decision for stream, one in decided.items()} == {"far": "applied", "near": "skipped"}
    before = float((engine.tensors("far")["affine"] - engine.like["affine"]).norm())
    engine.accept(proposals, [one.kept for one in decided.values() if one.kept is not None])
    assert float((engine.tensors("far")["affine"] - engine.like["affine"]).norm()) < before
    assert torch.equal(engine.tensors("near")["affine"], engine.like["affine"])


def test_a_rollback_leads_to_the_newest_snapshot_and_a_reset_does_not(engine: Engine) -> None:
    good = {name: tensor.clone() for name, tensor in engine.tensors("a").items()}
    header = engine.resident("a").header
    snapshot = Snapshot(time=datetime(2026, 1, 2, tzinfo=UTC), reason="", header=header)
    turn(engine, Ruling("applied", ""), 2)
    judgement = turn(engine, Ruling("rolled_back", ""), 3, newest=lambda stream: (snapshot, good))
    assert (judgement.ruling.decision, judgement.header.step, judgement.header.frames) == ("rolled_back", 1, 18)
    assert all(torch.equal(tensor, good[name]) for name, tensor in engine.tensors("a").items())
    again = turn(engine, Ruling("reset", ""), 4, newest=lambda stream: (snapshot, good))
    assert (again.ruling.decision, again.header.step) == ("reset", 0)


def test_frames_without_an_update_are_seen_by_the_guard_too(engine: Engine) -> None:
    judgement = turn(engine, Ruling("applied", "not asked"), 3, adapt=False)
    assert judgement.ruling.decision == "skipped"
    assert judgement.header.step == 1
    assert len(judgement.header.guard.recent) == 12
    assert judgement.header.proxies.shadowed == 12


def test_hurried_frames_count_and_teach_nothing(engine: Engine) -> None:
    """What they look like depends on who answered them."""
    before = engine.resident("a").header
    passed = engine.predict([replace(batch("a", 6, 3, adapt=False), hurried=True)])
    proposals = engine.adapt(passed)
    assert proposals.proposals == []
    judgement = judge(engine, Fixed(Ruling("applied", "not asked")), passed.predictions[0], proposals, None, 6)
    after = judgement.header
    assert (judgement.ruling.decision, judgement.kept) == ("skipped", None)
    assert (after.proxies, after.drift, after.step) == (before.proxies, before.drift, before.step)
    assert (after.frames, after.events) == (before.frames + 6, before.events + 1)
    event = update_event(engine, AUTO, "w", passed.predictions[0], judgement, None).event
    assert (event.loss, event.source_distance, event.layers, event.flipped) == (None, None, {}, None)


@pytest.mark.parametrize("finite", [True, False])
def test_what_moves_without_an_update_is_kept_where_it_is_finite(engine: Engine, finite: bool) -> None:
    passed = engine.predict([batch("a", 6, 3, adapt=False)])
    proposals = engine.adapt(passed)
    (prediction,), (proposal,) = passed.predictions, proposals.proposals
    proposal = replace(proposal, finite=finite)
    judgement = judge(engine, Fixed(Ruling("applied", "not asked")), prediction, proposals, proposal)
    assert judgement.kept is (proposal if finite else None)


@pytest.mark.parametrize("method", ["tent", "neo"])
def test_baselines_are_not_held_to_the_gradients_of_the_bundles_own_generator(
    tiny_bundle_path: Path, method: str
) -> None:
    """These are in other units; and a method without gradients has no cosine."""
    bundle = load_bundle(tiny_bundle_path, method=method)
    narrow = {"raw_gradient_norm": 1e-6, "generated_gradient_norm": 1e-6, "cosine": 0.5}
    manifest = bundle.manifest.model_copy(update={"limits": bundle.manifest.limits.model_copy(update=narrow)})
    bundle = replace(bundle, manifest=manifest)
    engine, guard = Engine(bundle), Guard(GuardSettings(max_alike=10_000), bundle.limits)
    admit(engine, "a")
    for seed in range(COSINE_SEEN + 2):
        passed = engine.predict([batch("a", 2, seed)])
        proposals = engine.adapt(passed)
        judgement = judge(engine, guard, passed.predictions[0], proposals, proposals.proposals[0])
        assert judgement.ruling == Ruling("applied", "within limits")
        engine.resident("a").header = judgement.header


def test_a_partial_update_of_a_method_with_a_student_moves_that_in_part_too(tiny_bundle_path: Path) -> None:
    engine = Engine(load_bundle(tiny_bundle_path, method="cotta"))
    admit(engine, "a", "b")
    before = engine.tensors("a")["student"].clone()
    whole = engine.adapt(engine.predict([batch("b", 5, 9), batch("a", 6, 1)])).state["student"][1]
    turn(engine, Ruling("partial", "", 0.25), 1)
    torch.testing.assert_close(engine.tensors("a")["student"], torch.lerp(before, whole, 0.25))
