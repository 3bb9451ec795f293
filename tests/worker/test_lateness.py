"""How late is too late."""

from __future__ import annotations

import time

import pytest
from pydantic import ValidationError

from schemas.config import Batch
from worker.lateness import Lateness


def test_what_would_miss_the_budget_is_dropped_and_no_frame_before_half_of_it() -> None:
    lateness = Lateness(Batch(latency_budget_ms=1_000, drop_late=True))

    def at(now: float) -> tuple[bool, bool]:
        return lateness.hurried(100.0, 0.0, now), lateness.dropped(100.0, 0.0, now)

    assert [at(now) for now in (100.4, 100.6, 100.9, 101.1)] == [
        (False, False),
        (True, False),
        (True, False),
        (True, True),
    ]
    lateness.took(0.3)
    assert [at(now) for now in (100.6, 100.8)] == [(True, False), (True, True)]
    lateness.took(60.0)
    assert [at(now) for now in (100.4, 100.6)] == [(False, False), (True, True)]


def test_one_long_pass_is_forgotten() -> None:
    lateness = Lateness(Batch(latency_budget_ms=1_000, drop_late=True))
    lateness.took(10.0)
    for _ in range(300):
        lateness.took(0.1)
    assert not lateness.dropped(100.0, 0.0, 100.6)


def test_nothing_is_dropped_unasked() -> None:
    lateness = Lateness(Batch(latency_budget_ms=1_000))
    assert lateness.hurried(100.0, 0.0, 200.0)
    assert not lateness.dropped(100.0, 0.0, 200.0)
    assert not Lateness(Batch()).hurried(100.0, 0.0, 1e9)


def test_where_a_record_does_not_say_when_it_was_sent_its_receipt_counts() -> None:
    lateness = Lateness(Batch(latency_budget_ms=60_000, drop_late=True))
    assert not lateness.dropped(0.0, time.monotonic(), 1e9)
    assert lateness.dropped(0.0, time.monotonic() - 70, 0.0)


def test_without_a_budget_nobody_can_say_what_is_late() -> None:
    with pytest.raises(ValidationError, match="drop_late needs a latency_budget_ms"):
        Batch(drop_late=True)
