"""How late is too late."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from schemas.config import Batch
from worker.batch.lateness import Lateness

HERE, EPOCH = 1_000.0, 1_700_000_000.0  # now, by the monotonic clock and since the epoch


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the machine takes."""
    monkeypatch.setattr("worker.batch.lateness.time", SimpleNamespace(monotonic=lambda: HERE))


def test_what_would_miss_the_budget_is_dropped_and_no_frame_before_half_of_it() -> None:
    lateness = Lateness(Batch(latency_budget_ms=2_000, drop_late=True))

    def at(now: float) -> tuple[bool, bool]:
        return lateness.hurried(100.0, HERE, now), lateness.dropped(100.0, HERE, now)

    expected = [(False, False), (True, False), (True, False), (True, True)]
    assert [at(now) for now in (100.9, 101.1, 101.8, 101.94)] == expected
    lateness.took(0.6, 101.2)
    assert [at(now) for now in (101.2, 101.6)] == [(True, False), (True, True)]
    lateness.took(60.0, 100.8)
    assert [at(now) for now in (100.95, 101.2)] == [(False, False), (True, True)]


@pytest.mark.parametrize(
    ("budget", "wait", "after"), [(1_000, 100, 300), (300, 100, 125), (200, 100, 100), (100, 90, 50)]
)
def test_updates_are_spared_midway_between_the_usual_wait_and_half_of_the_budget(
    budget: int, wait: int, after: int
) -> None:
    """Where frames wait for half of the budget anyway they are hurried as ever, and none before it is spared."""
    lateness, now = Lateness(Batch(latency_budget_ms=budget, max_wait_ms=wait)), HERE
    assert lateness.spared_after_ms == after
    assert [lateness.spared(100.0, now, 100 + (after + more) / 1000) for more in (-5, 25)] == [False, True]
    assert not Lateness(Batch(max_wait_ms=wait)).spared(100.0, now, 1e9)


@pytest.mark.parametrize(("budget", "told"), [(0, False), (200, True), (201, False), (20, True)])
def test_a_budget_that_no_waiting_frame_can_keep_is_told(
    budget: int, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Each micro-batch would be called overload."""
    Lateness(Batch(latency_budget_ms=budget, max_wait_ms=100))
    assert ("lower max_wait_ms" in caplog.text) == told


def test_a_long_pass_is_forgotten_even_if_no_other_follows() -> None:
    """All frames come with six tenths of the budget used, so that one long pass drops them all."""
    lateness = Lateness(Batch(latency_budget_ms=2_000, drop_late=True))
    lateness.took(60.0, 100.0)
    lateness.took(0.1, 100.0)
    assert lateness.dropped(99.8, HERE, 101.0)
    assert not lateness.dropped(100.1, HERE, 101.3)


def test_nothing_is_dropped_unasked() -> None:
    lateness = Lateness(Batch(latency_budget_ms=1_000))
    assert lateness.hurried(100.0, HERE, 200.0)
    assert not lateness.dropped(100.0, HERE, 200.0)
    assert not Lateness(Batch()).hurried(100.0, HERE, 1e9)


def test_where_a_record_does_not_say_when_it_was_sent_its_receipt_counts() -> None:
    lateness = Lateness(Batch(latency_budget_ms=60_000, drop_late=True))
    assert not lateness.dropped(0.0, HERE, 1e9)
    assert lateness.dropped(0.0, HERE - 70, 0.0)


def test_a_sender_whose_clock_is_ahead_is_believed_no_shorter_than_its_frame_is_here() -> None:
    lateness = Lateness(Batch(latency_budget_ms=60_000, drop_late=True))
    sent = EPOCH + 180
    assert not lateness.hurried(sent, HERE, EPOCH)
    assert lateness.hurried(sent, HERE - 40, EPOCH)
    assert lateness.dropped(sent, HERE - 70, EPOCH)


def test_without_a_budget_nobody_can_say_what_is_late() -> None:
    with pytest.raises(ValidationError, match="drop_late needs a latency_budget_ms"):
        Batch(drop_late=True)
    with pytest.raises(ValidationError, match="max_wait_ms below half of latency_budget_ms"):
        Batch(drop_late=True, latency_budget_ms=200, max_wait_ms=100)
