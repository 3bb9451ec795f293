"""From signals to accuracy: a logistic regression, with intervals that are calibrated on shifts left out of the fit.

The log odds of the accuracy are about linear in the log odds of signals that are shares, such as mean confidence.
Products of signals model their interactions. The ridge penalty is chosen by cross-validation over groups of shifts.
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
MOST_DEVIATION, MOST_PRODUCT = 3.5, 6.0  # clip inputs: no extrapolation beyond what calibration saw
LEAST_SHARE = 0.005
NOT_SHARES = {"discrepancy", "discrepancy_middle", "discrepancy_last", "distance", "odd", "odd_last", "energy", "gap"}
NOT_SHARES |= {"novelty", "dose", "source_odd", "source_odd_last", "source_rank", "source_energy"}
RIDGES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LEVELS = 6  # of the estimate, at which quantiles of the error are measured
COVERAGE = 0.9
SHARES = (
    0.9,
    0.905,
    0.91,
    0.915,
    0.92,
    0.925,
    0.93,
    0.935,
    0.94,
    0.945,
    0.95,
)  # nominal, tried in turn


@dataclass(frozen=True)
class Table:
    """N windows of streams whose labels are known.

    values (N, n): signals in the order of their names, NaN if missing. truth (N, 2): accuracy of the adapted and of the
    source model.
    """

    values: Array
    truth: Array


def concatenated(tables: Sequence[Table]) -> Table:
    """The rows of all tables in turn."""
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

    def predict_one(self, signals: Mapping[str, float]) -> tuple[float, float]:
        """Accuracy of the adapted and the source model, from signals by name; missing ones count as average."""
        bounded = self._inputs.row([signals.get(name, math.nan) for name in self.signals])
        adapted, source = (bounded @ self._weights).tolist()
        return _sigmoid_of_one(adapted), _sigmoid_of_one(source)

    def interval_of_one(self, accuracy: float) -> tuple[float, float]:
        """As `interval`, for one estimate."""
        low, high = (accuracy + _interp(accuracy, self._levels, ends) for ends in (self._low, self._high))
        return min(1.0, max(0.0, low)), min(1.0, max(0.0, high))

    def predict(self, values: Array) -> Array:
        """Accuracies (N, 2) of the adapted and the source model, from values (N, n) in the order of `signals`."""
        return _sigmoid(self._inputs.rows(values) @ self._weights)

    def interval(self, accuracy: Array) -> tuple[Array, Array]:
        """Lower and upper ends (N,) of the 90% intervals around estimates (N,) for the adapted model."""
        low = accuracy + np.interp(accuracy, self._levels, self._low)
        high = accuracy + np.interp(accuracy, self._levels, self._high)
        return low.clip(0, 1), high.clip(0, 1)


def fit_estimator(names: Sequence[str], groups: Sequence[Table]) -> tuple[Estimator, Array, Array]:
    """Fit an estimator to all groups, no two of which should have a shift in common.

    Returns it with its cross-validated estimates, each from a fit without the row's group, and the truth, both (N, 2).
    Ridge and intervals are chosen by these.
    """
    whole = concatenated(groups)
    spread = _with_log_odds(_is_share(names), whole.values)
    known = np.isfinite(spread)
    count = known.sum(0).clip(1)
    centre = np.where(known, spread, 0).sum(0) / count
    scale = np.sqrt((np.where(known, spread - centre, 0) ** 2).sum(0) / count) + 1e-6
    inputs = [_Inputs(names, centre, scale).rows(group.values) for group in groups]
    unseen = {ridge: _cross_validated(inputs, groups, ridge) for ridge in RIDGES}
    ridge = min(RIDGES, key=lambda r: float(np.abs(unseen[r] - whole.truth).mean()))
    weights = [_regress(np.concatenate(inputs), whole.truth[:, target], ridge) for target in (0, 1)]
    levels, low, high = _intervals(unseen[ridge][:, 0], whole.truth[:, 0], [len(group.truth) for group in groups])
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


def _cross_validated(inputs: Sequence[Array], groups: Sequence[Table], ridge: float) -> Array:
    parts = []
    for out in range(len(groups)):
        others = [i for i in range(len(groups)) if i != out] or [out]
        seen, truth = np.concatenate([inputs[i] for i in others]), np.concatenate([groups[i].truth for i in others])
        weights = [_regress(seen, truth[:, target], ridge) for target in (0, 1)]
        parts.append(_sigmoid(inputs[out] @ np.stack(weights, 1)))
    return np.concatenate(parts)


def _intervals(estimate: Array, truth: Array, sizes: Sequence[int]) -> tuple[list[float], list[float], list[float]]:
    """Levels of the estimate, and the lower and upper quantile of truth - estimate around each level.

    Errors within a group, of `sizes` rows, are correlated. So the nominal coverage is the smallest of SHARES with which
    the quantiles of all other groups cover at least COVERAGE of a group, on average over rows.
    """
    group, share = np.repeat(np.arange(len(sizes)), sizes), COVERAGE
    for share in SHARES if len(sizes) > 1 else ():
        held = sum(_covered(estimate, truth, group == one, share) for one in range(len(sizes)))
        if held >= COVERAGE * len(estimate):
            break
    levels, low, high = _quantiles(estimate, truth, share)
    return _rounded(levels), _rounded(low), _rounded(high)


def _covered(estimate: Array, truth: Array, out: npt.NDArray[np.bool_], share: float) -> int:
    """How many rows of the group `out` (N,) lie within the intervals from the other groups' errors."""
    levels, low, high = _quantiles(estimate[~out], truth[~out], share)
    guess, real = estimate[out], truth[out]
    inside = (real >= guess + np.interp(guess, levels, low)) & (real <= guess + np.interp(guess, levels, high))
    return int(inside.sum())


def _quantiles(estimate: Array, truth: Array, share: float) -> tuple[list[float], list[float], list[float]]:
    """Levels of the estimate, and the quantiles around each between which `share` of the errors lies."""
    levels, low, high = [], [], []
    order = np.argsort(estimate)
    for part in np.array_split(order, max(1, min(LEVELS, len(order) // 20))):
        error = truth[part] - estimate[part]
        levels.append(float(estimate[part].mean()))
        low.append(float(np.quantile(error, (1 - share) / 2)))
        high.append(float(np.quantile(error, (1 + share) / 2)))
    return levels, low, high


class _Inputs:
    """The regression's inputs (N, 1 + n + n (n + 1) / 2): a constant, the standardised signals, their products."""

    def __init__(self, names: Sequence[str], centre: Array, scale: Array) -> None:
        self._shares = _is_share(names)
        self._centre, self._scale = centre, scale
        self._first, self._second = np.triu_indices(len(names))
        self._plain = self._shares.tolist(), centre.tolist(), scale.tolist()

    def rows(self, values: Array) -> Array:
        deviations = (_with_log_odds(self._shares, values) - self._centre) / self._scale
        bounded = np.clip(np.where(np.isnan(deviations), 0, deviations), -MOST_DEVIATION, MOST_DEVIATION)
        products = bounded[:, self._first] * bounded[:, self._second]
        return np.concatenate([np.ones((len(bounded), 1)), bounded, products.clip(-MOST_PRODUCT, MOST_PRODUCT)], 1)

    def row(self, values: Sequence[float]) -> Array:
        """As `rows`, for one row; in plain Python, since the overhead of NumPy calls would dominate."""
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


def _is_share(names: Sequence[str]) -> npt.NDArray[np.bool_]:
    return np.array([name not in NOT_SHARES for name in names])


def _with_log_odds(shares: npt.NDArray[np.bool_], values: Array) -> Array:
    """The values, with those that are `shares` replaced by their log odds."""
    inside = values.clip(LEAST_SHARE, 1 - LEAST_SHARE)
    return np.where(shares, np.log(inside / (1 - inside)), values)


def _regress(inputs: Array, truth: Array, ridge: float) -> Array:
    """Logistic regression of a share, by Newton's method; the ridge penalty leaves out the constant."""
    weights = np.zeros(inputs.shape[1])
    mean = min(0.999, max(0.001, float(truth.mean())))
    weights[0] = math.log(mean / (1 - mean))
    penalty = np.full(inputs.shape[1], ridge)
    penalty[0] = 0
    for _ in range(8):
        guess = _sigmoid(inputs @ weights)
        slope = inputs.T @ (truth - guess) / len(inputs) - penalty * weights
        curvature = (inputs.T * np.maximum(guess * (1 - guess), 0.02)) @ inputs / len(inputs)
        weights = weights + np.linalg.solve(curvature + np.diag(penalty + 1e-9), slope)
    return weights


def _sigmoid(odds: Array) -> Array:
    made: Array = 1 / (1 + np.exp(-odds.clip(-30, 30)))
    return made


def _sigmoid_of_one(odds: float) -> float:
    return 1 / (1 + math.exp(-min(30.0, max(-30.0, odds))))


def _interp(x: float, levels: Array, values: Array) -> float:
    """`np.interp` for one number."""
    after = bisect_right(levels, x)  # type: ignore[type-var]
    if after in (0, len(levels)):
        return float(values[min(after, len(levels) - 1)])
    left, right = levels[after - 1], levels[after]
    return float(values[after - 1] + (values[after] - values[after - 1]) * (x - left) / (right - left))


def _rounded(values: Sequence[float] | Array) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
