"""From signals to accuracy: a small logistic regression, and intervals that held on shifts it was not fitted to.

The link is that of shares: accuracy is about linear in the log odds of confidence-like signals. Products of signals let
one signal weigh another; the ridge that keeps them small is the one that does best on shifts left out.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from schemas.bundle import Estimator

Array = npt.NDArray[np.float64]
MOST_DEVIATION, MOST_PRODUCT = 3.5, 6.0  # an estimate does not go on beyond what calibration showed
LEAST_SHARE = 0.005
NO_SHARES = {"discrepancy", "discrepancy_middle", "discrepancy_last", "distance", "odd", "odd_last", "energy", "gap"}
NO_SHARES |= {"novelty", "dose", "source_odd", "source_odd_last", "source_rank", "source_energy"}
RIDGES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LEVELS = 6  # of the estimate, at which the spread of errors is measured
COVERAGE = 0.9
SHARES = (0.9, 0.905, 0.91, 0.915, 0.92, 0.925, 0.93, 0.935, 0.94, 0.945, 0.95)  # of errors, tried for it


@dataclass(frozen=True)
class Table:
    """What streams showed, (N, n) in the order of the signals' names with NaN for what was missing, and what was true,
    (N, 2): the accuracy of the adapted parameters and of source."""

    values: Array
    truth: Array


def joined(tables: Sequence[Table]) -> Table:
    """One after another."""
    return Table(np.concatenate([t.values for t in tables]), np.concatenate([t.truth for t in tables]))


class AccuracyModel:
    """An estimator ready for use."""

    def __init__(self, estimator: Estimator) -> None:
        self.signals = tuple(estimator.signals)
        self._inputs = _Inputs(self.signals, np.array(estimator.centre), np.array(estimator.scale))
        self._weights = np.array([estimator.adapted, estimator.source]).T
        self._levels, self._low, self._high = (
            np.array(values) for values in (estimator.levels, estimator.low, estimator.high)
        )

    def accuracies(self, signals: Mapping[str, float]) -> tuple[float, float]:
        """Of the adapted parameters and of source, from signals by name; those that are missing count as usual."""
        bounded = self._inputs.alone([signals.get(name, math.nan) for name in self.signals])
        adapted, source = (bounded @ self._weights).tolist()
        return _share(adapted), _share(source)

    def ends(self, accuracy: float) -> tuple[float, float]:
        """`interval` of a single estimate."""
        low, high = (accuracy + _between(accuracy, self._levels, ends) for ends in (self._low, self._high))
        return min(1.0, max(0.0, low)), min(1.0, max(0.0, high))

    def of(self, values: Array) -> Array:
        """(N, 2) for values (N, n) in the order of `signals`."""
        return _shares(self._inputs.of(values) @ self._weights)

    def interval(self, accuracy: Array) -> tuple[Array, Array]:
        """The ends (N,) of the 90% intervals around estimates (N,) for the adapted parameters."""
        low = accuracy + np.interp(accuracy, self._levels, self._low)
        high = accuracy + np.interp(accuracy, self._levels, self._high)
        return low.clip(0, 1), high.clip(0, 1)


def fit_estimator(names: Sequence[str], groups: Sequence[Table]) -> tuple[Estimator, Array, Array]:
    """Fit to all groups. What it says of each group without having seen it, (N, 2), and the truth, say how it errs:
    its ridge and intervals come from these. No two groups should have a shift in common.
    """
    whole = joined(groups)
    spread = _spread_out(_are_shares(names), whole.values)
    known = np.isfinite(spread)
    count = known.sum(0).clip(1)
    centre = np.where(known, spread, 0).sum(0) / count
    scale = np.sqrt((np.where(known, spread - centre, 0) ** 2).sum(0) / count) + 1e-6
    inputs = [_Inputs(names, centre, scale).of(group.values) for group in groups]
    unseen = {ridge: _left_out(inputs, groups, ridge) for ridge in RIDGES}
    ridge = min(RIDGES, key=lambda r: float(np.abs(unseen[r] - whole.truth).mean()))
    weights = [_regress(np.concatenate(inputs), whole.truth[:, target], ridge) for target in (0, 1)]
    levels, low, high = _errors(unseen[ridge][:, 0], whole.truth[:, 0], [len(group.truth) for group in groups])
    estimator = Estimator(
        signals=list(names),
        centre=_rounded(centre),
        scale=_rounded(scale),
        adapted=_rounded(weights[0]),
        source=_rounded(weights[1]),
        levels=levels,
        low=low,
        high=high,
    )
    return estimator, unseen[ridge], whole.truth


def _left_out(inputs: Sequence[Array], groups: Sequence[Table], ridge: float) -> Array:
    parts = []
    for out in range(len(groups)):
        others = [i for i in range(len(groups)) if i != out] or [out]
        seen, truth = np.concatenate([inputs[i] for i in others]), np.concatenate([groups[i].truth for i in others])
        weights = [_regress(seen, truth[:, target], ridge) for target in (0, 1)]
        parts.append(_shares(inputs[out] @ np.stack(weights, 1)))
    return np.concatenate(parts)


def _errors(estimate: Array, truth: Array, sizes: Sequence[int]) -> tuple[list[float], list[float], list[float]]:
    """Levels of the estimate, and quantiles of truth minus estimate around each.

    Groups, of `sizes` rows, err each in a way of its own. So these are the narrowest quantiles of which the others'
    hold COVERAGE of each group, on average.
    """
    group, share = np.repeat(np.arange(len(sizes)), sizes), COVERAGE
    for share in SHARES if len(sizes) > 1 else ():
        held = sum(_held(estimate, truth, group == one, share) for one in range(len(sizes)))
        if held >= COVERAGE * len(estimate):
            break
    levels, low, high = _quantiles(estimate, truth, share)
    return _rounded(levels), _rounded(low), _rounded(high)


def _held(estimate: Array, truth: Array, out: npt.NDArray[np.bool_], share: float) -> int:
    """How many rows of a group are within what the others' errors say."""
    levels, low, high = _quantiles(estimate[~out], truth[~out], share)
    guess, real = estimate[out], truth[out]
    inside = (real >= guess + np.interp(guess, levels, low)) & (real <= guess + np.interp(guess, levels, high))
    return int(inside.sum())


def _quantiles(estimate: Array, truth: Array, share: float) -> tuple[list[float], list[float], list[float]]:
    """At levels of the estimate, between what the given share of errors lies."""
    levels, low, high = [], [], []
    order = np.argsort(estimate)
    for part in np.array_split(order, max(1, min(LEVELS, len(order) // 20))):
        error = truth[part] - estimate[part]
        levels.append(float(estimate[part].mean()))
        low.append(float(np.quantile(error, (1 - share) / 2)))
        high.append(float(np.quantile(error, (1 + share) / 2)))
    return levels, low, high


class _Inputs:
    """From signals (N, n) to (N, 1 + n + n (n + 1) / 2): a constant, the standardised signals, and their products."""

    def __init__(self, names: Sequence[str], centre: Array, scale: Array) -> None:
        self._shares = _are_shares(names)
        self._centre, self._scale = centre, scale
        self._first, self._second = np.triu_indices(len(names))
        self._plain = self._shares.tolist(), centre.tolist(), scale.tolist()

    def of(self, values: Array) -> Array:
        deviations = (_spread_out(self._shares, values) - self._centre) / self._scale
        bounded = np.clip(np.where(np.isnan(deviations), 0, deviations), -MOST_DEVIATION, MOST_DEVIATION)
        products = bounded[:, self._first] * bounded[:, self._second]
        return np.concatenate([np.ones((len(bounded), 1)), bounded, products.clip(-MOST_PRODUCT, MOST_PRODUCT)], 1)

    def alone(self, values: Sequence[float]) -> Array:
        """`of` a single row. Worked out number by number, because NumPy's operations take longer to start."""
        bounded = np.zeros(len(values))
        for place, (value, share, centre, scale) in enumerate(zip(values, *self._plain, strict=True)):
            if math.isnan(value):
                continue
            if share:
                inside = min(1 - LEAST_SHARE, max(LEAST_SHARE, value))
                value = math.log(inside / (1 - inside))
            bounded[place] = min(MOST_DEVIATION, max(-MOST_DEVIATION, (value - centre) / scale))
        products = bounded[self._first] * bounded[self._second]
        np.minimum(np.maximum(products, -MOST_PRODUCT, out=products), MOST_PRODUCT, out=products)
        return np.concatenate([_ONE, bounded, products])


_ONE = np.ones(1)


def _are_shares(names: Sequence[str]) -> npt.NDArray[np.bool_]:
    return np.array([name not in NO_SHARES for name in names])


def _spread_out(shares: npt.NDArray[np.bool_], values: Array) -> Array:
    """Shares become log odds."""
    inside = values.clip(LEAST_SHARE, 1 - LEAST_SHARE)
    return np.where(shares, np.log(inside / (1 - inside)), values)


def _regress(inputs: Array, truth: Array, ridge: float) -> Array:
    """Logistic regression on shares, by Newton's method; the constant is free."""
    weights = np.zeros(inputs.shape[1])
    mean = min(0.999, max(0.001, float(truth.mean())))
    weights[0] = math.log(mean / (1 - mean))
    penalty = np.full(inputs.shape[1], ridge)
    penalty[0] = 0
    for _ in range(8):
        guess = _shares(inputs @ weights)
        slope = inputs.T @ (truth - guess) / len(inputs) - penalty * weights
        curvature = (inputs.T * np.maximum(guess * (1 - guess), 0.02)) @ inputs / len(inputs)
        weights = weights + np.linalg.solve(curvature + np.diag(penalty + 1e-9), slope)
    return weights


def _shares(odds: Array) -> Array:
    made: Array = 1 / (1 + np.exp(-odds.clip(-30, 30)))
    return made


def _share(odds: float) -> float:
    return 1 / (1 + math.exp(-min(30.0, max(-30.0, odds))))


def _between(x: float, levels: Array, values: Array) -> float:
    """`np.interp` of one number."""
    after = bisect_right(levels, x)  # type: ignore[type-var]
    if after in (0, len(levels)):
        return float(values[min(after, len(levels) - 1)])
    left, right = levels[after - 1], levels[after]
    return float(values[after - 1] + (values[after] - values[after - 1]) * (x - left) / (right - left))


def _rounded(values: Sequence[float] | Array) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
