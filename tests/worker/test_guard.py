import math

import pytest

from schemas.bundle import Limits
from schemas.config import Guard as GuardSettings
from worker.guard import Guard

GUARD = Guard(
    GuardSettings(max_gradient_factor=4, max_distance_factor=2), Limits(raw_gradient_norm=10, source_distance=3)
)
GOOD = {"raw_gradient_norm": 5.0, "source_distance": 1.0, "loss": 0.3}


def test_ordinary_updates_pass() -> None:
    assert GUARD.judge(GOOD, finite=True).apply


@pytest.mark.parametrize(
    ("changes", "finite", "reason"),
    [
        ({}, False, "not finite"),
        ({"loss": math.nan}, True, "not finite"),
        ({"loss": math.inf}, True, "not finite"),
        ({"raw_gradient_norm": 40.1}, True, "gradient norm 40.1 above its limit 40"),
        ({"source_distance": 6.1}, True, "distance from source 6.1 above its limit 6"),
    ],
)
def test_others_are_skipped_with_the_reason(changes: dict, finite: bool, reason: str) -> None:
    verdict = GUARD.judge({**GOOD, **changes}, finite)
    assert not verdict.apply
    assert verdict.reason == reason
