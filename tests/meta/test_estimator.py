import math

import numpy as np
import pytest

from meta import estimator as estimator_module
from meta.estimator import AccuracyModel, Table, fit_estimator
from schemas.bundle import Estimator

NAMES = ["confidence", "odd", "flips"]


def table(seed: int, count: int = 600) -> Table:
    """Accuracy that follows from confidence and oddness together, and is seen through some noise."""
    random = np.random.default_rng(seed)
    confidence, odd, flips = random.uniform(0.3, 0.99, count), random.uniform(0, 2, count), random.uniform(0, 1, count)
    odds = np.log(confidence / (1 - confidence)) - odd + random.normal(0, 0.15, count)
    adapted = 1 / (1 + np.exp(-odds))
    return Table(np.stack([confidence, odd, flips], 1), np.stack([adapted, adapted * (1 - 0.5 * flips)], 1))


@pytest.fixture(scope="module")
def estimator() -> Estimator:
    return fit_estimator(NAMES, [table(seed) for seed in range(3)])[0]


def test_two_signals_together_say_what_neither_says_alone(estimator: Estimator) -> None:
    unseen = table(9)
    together = np.abs(AccuracyModel(estimator).predict(unseen.values) - unseen.truth).mean(0)
    assert together[0] < 0.03
    assert together[1] < 0.06
    for place, name in enumerate(NAMES[:2]):
        groups = [Table(t.values[:, [place]], t.truth) for t in map(table, range(3))]
        alone = AccuracyModel(fit_estimator([name], groups)[0])
        error = np.abs(alone.predict(unseen.values[:, [place]])[:, 0] - unseen.truth[:, 0]).mean()
        assert error > 2 * together[0]


def test_intervals_cover_about_nine_of_ten(estimator: Estimator) -> None:
    unseen, model = table(9, 2_000), AccuracyModel(estimator)
    low, high = model.interval(model.predict(unseen.values)[:, 0])
    inside = (unseen.truth[:, 0] >= low) & (unseen.truth[:, 0] <= high)
    assert 0.85 < inside.mean() < 0.95


def test_errors_are_those_on_groups_left_out() -> None:
    """A group whose accuracy is nothing like the others' widens the intervals, though the fit has seen it."""
    groups = [table(seed) for seed in range(3)]
    strange = Table(groups[2].values, 1 - groups[2].truth)
    plain, odd = (fit_estimator(NAMES, part)[0] for part in (groups, [*groups[:2], strange]))
    width = [np.mean(np.array(e.high) - np.array(e.low)) for e in (plain, odd)]
    assert width[1] > 3 * width[0]


def test_of_each_group_it_says_what_the_others_taught_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimator_module, "RIDGES", (1e-2,))
    groups = [table(seed) for seed in range(3)]
    strange = Table(groups[2].values, 1 - groups[2].truth)
    plain, odd = (fit_estimator(NAMES, part)[1] for part in (groups, [*groups[:2], strange]))
    assert np.array_equal(plain[1_200:], odd[1_200:])
    assert not np.array_equal(plain[:1_200], odd[:1_200])


def test_signals_count_by_how_far_they_lie_from_what_is_usual() -> None:
    """Shares as log odds; what was missing counts for nothing."""
    groups = [table(seed) for seed in range(2)]
    seen = np.concatenate([group.values for group in groups])
    groups[0].values[::5, 0] = groups[1].values[::3, 1] = math.nan
    seen[:600:5, 0] = seen[600::3, 1] = math.nan
    spread = np.stack([np.log(seen[:, 0] / (1 - seen[:, 0])), seen[:, 1]], 1)
    made = fit_estimator(NAMES, groups)[0]
    assert made.centre[:2] == pytest.approx(np.nanmean(spread, 0), rel=1e-4)
    assert made.scale[:2] == pytest.approx(np.nanstd(spread, 0), rel=1e-4)


def test_intervals_are_as_wide_as_groups_that_were_left_out_ask_for() -> None:
    random = np.random.default_rng(0)
    estimate, errors = np.full(4_000, 0.5), random.uniform(-0.1, 0.1, 4_000)

    def width(biases: list[float]) -> float:
        sizes = [len(errors) // len(biases)] * len(biases)
        _, low, high = estimator_module._intervals(estimate, 0.5 + errors + np.repeat(biases, sizes), sizes)
        return float(np.mean(np.array(high) - np.array(low)))

    assert width([0.0]) == pytest.approx(0.18, abs=0.003)
    assert width([0.0] * 4) == pytest.approx(0.18, abs=0.003)
    # One of four errs upwards, by so much that the others' errors hold less of it.
    biases = [0.0, 0.0, 0.0, 0.03]
    pooled = np.quantile(errors + np.repeat(biases, 1_000), [0.025, 0.05, 0.95, 0.975])
    assert pooled[2] - pooled[1] + 0.002 < width(biases) < pooled[3] - pooled[0] - 0.002


def test_intervals_hold_on_a_group_that_errs_in_a_way_of_its_own() -> None:
    """Eight groups, each biased on its own: the other seven's errors alone are too narrow for it."""

    def biased(seed: int) -> Table:
        plain = table(seed)
        return Table(plain.values, (plain.truth + np.random.default_rng(seed).normal(0, 0.06)).clip(0, 1))

    groups = [biased(seed) for seed in range(8)]
    model, unseen = AccuracyModel(fit_estimator(NAMES, groups)[0]), [biased(seed) for seed in range(20, 80)]
    held = []
    for one in unseen:
        guess = model.predict(one.values)[:, 0]
        low, high = model.interval(guess)
        held.append(float(((one.truth[:, 0] >= low) & (one.truth[:, 0] <= high)).mean()))
    assert 0.85 < np.mean(held) < 0.97


def test_estimates_stay_shares_whatever_the_signals(estimator: Estimator) -> None:
    model = AccuracyModel(estimator)
    for signals in ({}, {"confidence": 1.0, "odd": 1e9, "flips": -1e9}, {"confidence": 0.0, "odd": -1e9}):
        adapted, source = model.predict_one(signals)
        assert 0 <= adapted <= 1
        assert 0 <= source <= 1
    usual = dict.fromkeys(NAMES, math.nan)
    assert model.predict_one({}) == model.predict_one(usual)


def test_one_stream_is_estimated_as_many_are(estimator: Estimator) -> None:
    model, rows = AccuracyModel(estimator), table(9, 50).values
    rows[::7, 1], rows[3, 0] = math.nan, 2.0
    both = model.predict(rows)
    low, high = model.interval(both[:, 0])
    for row, expected, ends in zip(rows, both, zip(low, high, strict=True), strict=True):
        assert model.predict_one(dict(zip(NAMES, row, strict=True))) == pytest.approx(tuple(expected))
        assert model.interval_of_one(float(expected[0])) == pytest.approx(ends)
    assert model.interval_of_one(0.0) == pytest.approx([float(end[0]) for end in model.interval(np.zeros(1))])
    assert model.interval_of_one(1.0) == pytest.approx([float(end[0]) for end in model.interval(np.ones(1))])
