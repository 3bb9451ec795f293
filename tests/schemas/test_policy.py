"""What a policy allows, and which ones are refused."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from schemas.policy import MOST_SPANS, AskedChange, Policy, PolicyChange

ASKED: TypeAdapter[PolicyChange] = TypeAdapter(AskedChange)
SPAN = "08:00-09:00"


def quiet(policy: Policy, clock: str) -> bool:
    return policy.is_quiet(datetime.fromisoformat(f"2026-03-01T{clock}").replace(tzinfo=UTC))


@pytest.mark.parametrize(
    ("spans", "within", "outside"),
    [
        ((SPAN,), ["08:00:00", "08:59:59.9"], ["07:59:59.9", "09:00:00", "20:30:00"]),
        (("22:00-06:00",), ["22:00:00", "00:00:00", "05:59:59.9"], ["06:00:00", "12:00:00", "21:59:59.9"]),
        ((SPAN, "12:30-13:00"), ["08:30:00", "12:30:00"], ["10:00:00", "13:00:00"]),
        ((), [], ["00:00:00", "12:00:00"]),
    ],
)
def test_a_span_begins_with_its_first_moment_and_ends_before_its_last(
    spans: tuple[str, ...], within: list[str], outside: list[str]
) -> None:
    policy = Policy(quiet_hours=spans)
    assert [clock for clock in [*within, *outside] if quiet(policy, clock)] == within


@pytest.mark.parametrize(
    "rules",
    [
        {"quiet_hours": ["8:00-09:00"]},
        {"quiet_hours": ["24:00-06:00"]},
        {"quiet_hours": ["08:00-09:00 UTC"]},
        {"quiet_hours": ["08:00-08:00"]},
        {"quiet_hours": [SPAN] * (MOST_SPANS + 1)},
        {"canary_share": -0.01},
        {"canary_share": 1.01},
        {"max_updates_per_hour": -1},
        {"mode": "off"},
        {"freeze": True},
    ],
)
def test_rules_that_mean_nothing_are_refused_in_the_file_and_from_a_command(rules: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Policy.model_validate(rules)
    with pytest.raises(ValidationError):
        ASKED.validate_python(rules)


def test_rules_at_their_limits_are_taken() -> None:
    for share in (0, 1):
        limits = {"canary_share": share, "max_updates_per_hour": 0, "quiet_hours": [SPAN] * MOST_SPANS}
        assert ASKED.validate_python(limits).over(Policy()) == Policy.model_validate(limits)


def test_a_change_leaves_what_it_does_not_say() -> None:
    policy = Policy(mode="shadow", canary_share=0.5, max_updates_per_hour=3, quiet_hours=(SPAN,), frozen=True)
    assert PolicyChange().over(policy) == policy
    for change in (
        {"mode": "auto"},
        {"canary_share": 0},
        {"max_updates_per_hour": 0},
        {"quiet_hours": ()},
        {"frozen": 0},
    ):
        changed = PolicyChange.model_validate(change).over(policy)
        assert changed.model_dump() == policy.model_dump() | change


def test_what_is_stored_is_not_held_to_rules_that_came_later() -> None:
    stored = PolicyChange.model_validate({"quiet_hours": ["08:00-08:00"] * (MOST_SPANS + 1)})
    assert not quiet(stored.over(Policy()), "08:00:00")
