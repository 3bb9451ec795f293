"""Drift detection per stream: switches adaptation on when a stream drifts, and off when it has settled.

Each micro-batch gives a few signals; the worker uses mean entropy and mean confidence. While a stream adapts, their
running mean and variance are learned. Once it has settled, these are the reference, and a two-sided cumulative sum
(Page, "Continuous inspection schemes", Biometrika 1954) of the standardised signals watches for a change. On
independent normal signals a lasting change of two deviations is found after four micro-batches (median; 95% within
six), one of four deviations after two (95% within three). A stream that stands still and is alone in its passes adapts
on 8% of its micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from schemas.state import DriftWatch

ACTIVE, AGAIN = 12, 5  # least micro-batches of an active phase: of a new stream, and after an alarm
RATE, SLOW_RATE = 1 / 16, 1 / 48  # of the running mean and variance, while settling and while watching
SLACK, ALARM = 0.5, 6.0  # of the cumulative sums, in standard deviations
CLIP = 4.0  # deviations: one strange micro-batch alone raises no alarm
CALM = 1.5  # deviations between the newest micro-batch and the running mean that count as settled
PATIENCE = 4  # times the least length of an active phase, after which a stream counts as settled in any case
LEAST_DEVIATION = 1e-3
MOST = 1e100  # largest mean or variance, so that what is computed from it stays finite
HEALTHY = 0.05  # how far estimated accuracy may be below that of clean frames
UPKEEP, CHECK = 5, 16  # a settled stream adapts on one micro-batch of so many: an unhealthy, a healthy one
UPKEEP_JOINED, CHECK_JOINED = 2, 8  # the same beside another stream's update


def wants_update(
    watch: DriftWatch | None, estimated_accuracy: float | None, clean_accuracy: float, company: bool = False
) -> bool:
    """Whether the stream's next micro-batch should make an update.

    A settled stream still makes one now and then. It makes more if its estimated accuracy, if there is one, is well
    below that of clean frames, and also in `company`: beside another stream's update it costs a quarter.
    """
    if watch is None or watch.adapting:
        return True
    unwell = estimated_accuracy is not None and estimated_accuracy < clean_accuracy - HEALTHY
    upkeep, check = (UPKEEP_JOINED, CHECK_JOINED) if company else (UPKEEP, CHECK)
    return watch.rested >= (upkeep if unwell else check) - 1


def observe(watch: DriftWatch | None, signals: Sequence[float], adapted: bool) -> DriftWatch:
    """The watch after one more micro-batch; signals that are not finite change nothing.

    `watch` is None for a new stream. `adapted`: whether the micro-batch was meant to make an update.
    """
    if watch is None or not _fits(watch, len(signals)):
        watch = DriftWatch()
    if not all(math.isfinite(value) for value in signals):
        return watch
    after = _settling(watch, signals) if watch.adapting else _watching(watch, signals)
    after.rested = 0 if adapted else watch.rested + 1
    return after


def _fits(watch: DriftWatch, count: int) -> bool:
    """Whether this is a valid watch of `count` signals; what was stored may be anything."""
    sums, known = [watch.rise, watch.fall], [watch.mean, watch.variance]
    if not watch.adapting:
        known += sums
    elif not watch.mean:
        known = [watch.variance] if watch.variance else []
    sizes = all(len(values) == count for values in known)
    return sizes and all(0 <= v < MOST for v in watch.variance) and all(abs(v) < MOST for v in watch.mean)


def _settling(watch: DriftWatch, signals: Sequence[float]) -> DriftWatch:
    """Learn the reference, until the signals have been calm for long enough. After an alarm the variance is known, so
    that there is less to learn; the cumulative sums, which are there then, tell this case."""
    if not watch.mean:
        variance = watch.variance or [0.0] * len(signals)
        return DriftWatch(seen=1, mean=list(signals), variance=variance, rise=watch.rise, fall=watch.fall)
    seen, least = watch.seen + 1, AGAIN if watch.rise else ACTIVE
    rate = max(RATE, 1 / (seen + 1))
    spread = SLOW_RATE if watch.rise else rate
    mean, variance, calm = [], [], True
    for value, m, v in zip(signals, watch.mean, watch.variance, strict=True):
        step = value - m
        mean.append(m + rate * step)
        variance.append((1 - spread) * (v + spread * step * step))
        calm = calm and abs(step) <= CALM * _deviation(variance[-1])
    if seen < least or (not calm and seen < PATIENCE * least):
        return DriftWatch(seen=seen, mean=mean, variance=variance, rise=watch.rise, fall=watch.fall)
    zeros = [0.0] * len(mean)
    return DriftWatch(adapting=False, mean=mean, variance=variance, rise=zeros, fall=zeros)


def _watching(watch: DriftWatch, signals: Sequence[float]) -> DriftWatch:
    """Add to the cumulative sums. The reference learns on, so slowly that a change raises the alarm long before."""
    mean, variance, rise, fall = [], [], [], []
    for value, m, v, up, down in zip(signals, watch.mean, watch.variance, watch.rise, watch.fall, strict=True):
        deviation = _deviation(v)
        z = min(CLIP, max(-CLIP, (value - m) / deviation))
        rise.append(max(0.0, up + z - SLACK))
        fall.append(max(0.0, down - z - SLACK))
        mean.append(m + SLOW_RATE * z * deviation)
        variance.append((1 - SLOW_RATE) * (v + SLOW_RATE * (z * deviation) ** 2))
    if max(*rise, *fall) > ALARM:
        zeros = [0.0] * len(mean)
        return DriftWatch(variance=variance, rise=zeros, fall=zeros)
    return DriftWatch(adapting=False, seen=watch.seen + 1, mean=mean, variance=variance, rise=rise, fall=fall)


def _deviation(variance: float) -> float:
    return max(LEAST_DEVIATION, math.sqrt(variance))
