"""Drift detection per stream: switches adaptation on when a stream moves, and off when it has settled.

Each micro-batch gives a few signals (entropy, confidence, distance of its features from the stream's running mean).
While a stream adapts, their running mean and variance are learned. Once it has settled these are the reference, and a
two-sided cumulative sum (Page, "Continuous inspection schemes", Biometrika 1954) of the standardised signals watches
for a change: a lasting move of one deviation is found within about ten micro-batches, of two within four.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from schemas.state import DriftWatch

ACTIVE = 12  # micro-batches that adapt after a stream began or moved
RATE = 1 / 16  # of the running mean and variance
SLACK, ALARM = 0.5, 6.0  # of the cumulative sums, in standard deviations
CLIP = 4.0  # one strange micro-batch alone is no move
CALM = 0.75  # deviations between the active phase's end and its mean that count as settled
LEAST_DEVIATION = 1e-3


def wants_update(watch: DriftWatch) -> bool:
    """Whether the stream's next micro-batch should make an update."""
    return watch.adapting


def observe(watch: DriftWatch, signals: Sequence[float]) -> DriftWatch:
    """The watch after one more micro-batch; signals that are not finite change nothing."""
    if not all(math.isfinite(value) for value in signals):
        return watch
    return _settling(watch, signals) if watch.adapting else _watching(watch, signals)


def _settling(watch: DriftWatch, signals: Sequence[float]) -> DriftWatch:
    """Learn the reference; done when it has stood still for long enough."""
    if not watch.mean:
        return DriftWatch(adapting=True, seen=1, mean=list(signals), variance=[0.0] * len(signals))
    seen = watch.seen + 1
    rate = max(RATE, 1 / (seen + 1))
    mean, variance, calm = [], [], True
    for value, m, v in zip(signals, watch.mean, watch.variance, strict=True):
        step = value - m
        mean.append(m + rate * step)
        variance.append((1 - rate) * (v + rate * step * step))
        calm = calm and abs(step) <= max(CALM * 2, 1.0) * _deviation(variance[-1])
    adapting = seen < ACTIVE or (not calm and seen < 4 * ACTIVE)
    zeros = [0.0] * len(mean)
    return DriftWatch(
        adapting=adapting, seen=seen if adapting else 0, mean=mean, variance=variance, rise=zeros, fall=zeros
    )


def _watching(watch: DriftWatch, signals: Sequence[float]) -> DriftWatch:
    rise, fall = [], []
    for value, m, v, up, down in zip(signals, watch.mean, watch.variance, watch.rise, watch.fall, strict=True):
        z = min(CLIP, max(-CLIP, (value - m) / _deviation(v)))
        rise.append(max(0.0, up + z - SLACK))
        fall.append(max(0.0, down - z - SLACK))
    if max(*rise, *fall) > ALARM:
        return DriftWatch(adapting=True, seen=0)
    return watch.model_copy(update={"seen": watch.seen + 1, "rise": rise, "fall": fall})


def _deviation(variance: float) -> float:
    return max(LEAST_DEVIATION, math.sqrt(variance))
