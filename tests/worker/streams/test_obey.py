"""Commands as functions of a stream: what changes, what does not, and the event that says so."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.command import Command
from schemas.errors import StateError
from schemas.policy import Policy, PolicyChange
from schemas.state import Snapshot, StreamHeader
from schemas.update import UpdateEvent, seal
from tests.worker.engine.test_engine import admit
from worker.engine.engine import Engine
from worker.guard.answer import Policies
from worker.streams.obey import Context, Subject, obey

HEADER = StreamHeader(
    stream="cam",
    bundle="b",
    method="mgg",
    positions={"frames/0": 41},
    frames=42,
    step=7,
    events=9,
    folded="f",
    last_event="e",
)


@pytest.fixture
def engine(tiny_bundle) -> Engine:
    engine = Engine(tiny_bundle)
    admit(engine, "cam")
    return engine


@pytest.fixture
def context(engine: Engine) -> Context:
    return Context.of(engine, Policies(Policy(mode="approve"), {}), "w")


@pytest.fixture
def subject(engine: Engine) -> Subject:
    tensors = {name: t.clone() for name, t in engine.like.items()}
    tensors["affine"] += 0.5
    older = {**tensors, "affine": tensors["affine"] - 0.25}
    header = HEADER.model_copy(update={"step": 3, "bundle": engine.bundle_hash})
    snapshot = Snapshot(time=datetime(2026, 1, 2, tzinfo=UTC), reason="", header=header)

    def kept(back: int):
        if back > 1:
            raise StateError("stream 'cam' has 1 snapshots, there is no number 2")
        return snapshot, older

    return Subject(HEADER, tensors, kept)


def command(action: str, **more) -> Command:
    return Command(stream="cam", action=action, by="kim", reason="audit", **more)


def test_the_position_stays_whatever_is_commanded(subject: Subject, context: Context) -> None:
    for action in ("freeze", "unfreeze", "reset", "rollback", "approve"):
        entry = obey(command(action), subject, context, token=5)
        header, (sealed,) = entry.header, entry.events
        assert (header.positions, header.folded, header.frames) == (HEADER.positions, HEADER.folded, HEADER.frames)
        assert header.events == 10
        assert sealed.event.id == "cam@10"
        assert sealed.event.previous == "e"
        assert header.last_event == sealed.digest == seal(sealed.event).digest
        assert sealed.event.token == 5
        assert "audit; by kim" in sealed.event.reason


def test_reset_goes_to_source_and_takes_the_approval_back(subject: Subject, context: Context, engine: Engine) -> None:
    approved = obey(command("approve"), subject, context, 1)
    assert (approved.header.approved, approved.events[0].event.parameters) == (7, "approved")
    assert torch.equal(approved.approved["affine"], subject.tensors["affine"])
    assert approved.tensors is None
    entry = obey(command("reset"), Subject(approved.header, subject.tensors, subject.snapshot), context, 1)
    event = entry.events[0].event
    assert entry.tensors is engine.like
    assert (entry.header.step, entry.header.approved) == (0, None)
    assert (event.decision, event.parameters, event.source_distance) == ("reset", "source", 0)
    change = subject.tensors["affine"] - engine.like["affine"]
    assert sum(d**2 for d in event.layers.values()) == pytest.approx(float(change.square().sum()), rel=1e-3)
    assert set(event.layers) == {p.layer for p in engine.bundle.model.places}


def test_the_way_back_from_anywhere_makes_an_event_that_can_be_read(subject: Subject, context: Context) -> None:
    """Stored numbers may be any that are finite; their squares need not be."""
    far = torch.full_like(subject.tensors["affine"], 3e38)
    away = replace(subject, tensors={**subject.tensors, "affine": far})
    (sealed,) = obey(command("reset"), away, context, 1).events
    event = UpdateEvent.model_validate_json(sealed.content)
    assert event.decision == "reset"
    assert min(event.layers.values()) > 1e38


def test_rollback_takes_a_snapshot_or_says_why_not(subject: Subject, context: Context) -> None:
    entry = obey(command("rollback"), subject, context, 1)
    assert (entry.header.step, entry.events[0].event.decision) == (3, "rolled_back")
    assert torch.equal(entry.tensors["affine"], subject.tensors["affine"] - 0.25)
    refused = obey(command("rollback", snapshot=2), subject, context, 1)
    assert (refused.tensors, refused.header.step) == (None, 7)
    assert refused.events[0].event.decision == "skipped"
    assert "cannot rollback: stream 'cam' has 1 snapshots" in refused.events[0].event.reason


changes = st.builds(
    PolicyChange,
    mode=st.none() | st.sampled_from(["auto", "shadow", "canary", "approve"]),
    frozen=st.none() | st.booleans(),
    max_updates_per_hour=st.none() | st.integers(0, 9),
)


@given(said=st.lists(changes, max_size=5))
def test_policies_lie_over_each_other_and_an_empty_one_takes_them_back(said: list[PolicyChange]) -> None:
    context = Context({"affine": torch.zeros(2)}, ("affine",), lambda a, b: [{}], Policies(Policy(), {}), "b", "w")
    header, expected = HEADER, Policy()
    for change in said:
        subject = Subject(header, {"affine": torch.zeros(2)}, lambda back: None)
        header = obey(command("policy", policy=change), subject, context, 1).header
        expected = change.over(expected) if change != PolicyChange() else Policy()
        assert context.policies.of(header) == expected
