"""Drift detection on made-up signals: still, moved, drifting, broken."""

import numpy as np
import pytest

from monitoring.drift import ACTIVE, AGAIN, CHECK, CHECK_JOINED, UPKEEP, UPKEEP_JOINED
from monitoring.drift import observe as observe_it
from monitoring.drift import wants_update as wants_update_at
from schemas.state import DriftWatch

LEVEL, DEVIATION = np.array([0.4, 0.85]), np.array([0.08, 0.05])


def wants_update(watch: DriftWatch) -> bool:
    """Of a healthy stream."""
    return wants_update_at(watch, 0.9, 0.9)


def observe(watch: DriftWatch, values: list[float]) -> DriftWatch:
    """Of a healthy stream that does what it is told."""
    return observe_it(watch, values, wants_update(watch))


def signals(seed: int, count: int, moved: float = 0.0) -> list[list[float]]:
    """Entropy up and confidence down by `moved` deviations."""
    random = np.random.default_rng(seed)
    return (LEVEL + DEVIATION * (random.standard_normal((count, 2)) + moved * np.array([1, -1]))).tolist()


def settled(seed: int = 0) -> DriftWatch:
    watch = DriftWatch()
    for values in signals(seed, 8 * ACTIVE):
        watch = observe(watch, values)
        if not wants_update(watch):
            return watch
    raise AssertionError("a stream that stands still never settled")


@pytest.mark.parametrize("seed", range(10))
def test_a_new_stream_adapts_and_settles(seed: int) -> None:
    watch = DriftWatch()
    assert wants_update(watch)
    for number, values in enumerate(signals(seed, 4 * ACTIVE)):
        assert wants_update(watch) or number >= ACTIVE - 1
        watch = observe(watch, values)
    assert settled(seed).seen == 0


@pytest.mark.parametrize(("moved", "within"), [(2.0, 8), (3.0, 5), (4.0, 3)])
@pytest.mark.parametrize("seed", range(10))
def test_a_shift_switches_adaptation_on_within_so_many_micro_batches(moved: float, within: int, seed: int) -> None:
    watch = settled(seed)
    for values in signals(100 + seed, within, moved):
        watch = observe(watch, values)
        if wants_update(watch):
            return
    raise AssertionError(f"a move of {moved} deviations was not seen within {within} micro-batches")


def test_a_stream_that_stands_still_rarely_adapts() -> None:
    adapting = 0
    for seed in range(20):
        watch = settled(seed)
        for values in signals(1_000 + seed, 200):
            watch = observe(watch, values)
            adapting += wants_update(watch)
    assert adapting / (20 * 200) < 0.15


def test_it_goes_on_from_its_stored_form() -> None:
    watch = settled()
    again = DriftWatch.model_validate_json(watch.model_dump_json())
    for values in signals(5, 20, 1.0):
        watch, again = observe(watch, values), observe(again, values)
    assert again == watch


def test_signals_that_are_not_finite_change_nothing() -> None:
    watch = settled()
    assert observe(watch, [float("nan"), 0.5]) == watch
    assert observe(DriftWatch(), [0.1, float("inf")]) == DriftWatch()


def test_a_stream_of_which_nothing_or_something_else_is_known_begins_anew() -> None:
    assert wants_update_at(None, 0.9, 0.9)
    new = observe_it(DriftWatch(), [0.1, 0.2], True)
    assert (new.adapting, new.seen, new.mean) == (True, 1, [0.1, 0.2])
    assert observe_it(None, [0.1, 0.2], True) == new
    for values in (settled().mean[:1], [*settled().mean, 0.5]):
        assert observe_it(settled(), values, True) == observe_it(None, values, True)


def test_a_stream_that_has_moved_settles_sooner_and_knows_how_far_its_signals_spread() -> None:
    settled_after = []
    for seed in range(10):
        watch = settled(seed)
        while not watch.adapting:
            watch = observe(watch, (LEVEL + 4 * DEVIATION * np.array([1, -1])).tolist())
        spread = np.sqrt(watch.variance)
        assert (spread > 0.3 * DEVIATION).all()
        updates = 0
        for values in signals(200 + seed, 4 * AGAIN, 4.0):
            updates += wants_update(watch)
            watch = observe(watch, values)
            if not watch.adapting:
                break
        assert AGAIN <= updates < 4 * AGAIN
        settled_after.append(updates)
        assert (np.sqrt(watch.variance) < 1.5 * spread).all()
    assert sorted(settled_after)[5] < ACTIVE


@pytest.mark.parametrize(
    ("accuracy", "company", "every"),
    [
        (0.9, False, CHECK),
        (0.86, False, CHECK),
        (0.84, False, UPKEEP),
        (0.9, True, CHECK_JOINED),
        (0.7, True, UPKEEP_JOINED),
        (None, False, CHECK),
        (None, True, CHECK_JOINED),
    ],
)
def test_settled_streams_update_now_and_then(accuracy: float | None, company: bool, every: int) -> None:
    """Those that are unwell more often, and all of them sooner beside another."""
    watch, updates = settled(), 0
    for _ in range(5 * every):
        adapts = wants_update_at(watch, accuracy, 0.9, company)
        watch = observe_it(watch, watch.mean, adapts)
        updates += adapts
    assert (updates, watch.seen) == (5, 5 * every)
