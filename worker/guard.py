"""The guard: may this update become the stream's state?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from schemas.bundle import Limits
from schemas.config import Guard as GuardSettings


@dataclass(frozen=True)
class Verdict:
    """What to do with an update, and why."""

    apply: bool
    reason: str


class Guard:
    """Accepts or skips updates. A skipped update leaves every part of the stream's parameters as they were."""

    def __init__(self, settings: GuardSettings, limits: Limits) -> None:
        self._max_gradient = settings.max_gradient_factor * limits.raw_gradient_norm
        self._max_distance = settings.max_distance_factor * limits.source_distance

    def judge(self, signals: dict[str, float], finite: bool) -> Verdict:
        """`signals` of one stream as the method reports them; `finite`: all numbers of the proposed state are."""
        if not finite or not all(math.isfinite(value) for value in signals.values()):
            return Verdict(False, "not finite")
        gradient = signals["raw_gradient_norm"]
        if gradient > self._max_gradient:
            return Verdict(False, f"gradient norm {gradient:.3g} above its limit {self._max_gradient:.3g}")
        distance = signals["source_distance"]
        if distance > self._max_distance:
            return Verdict(False, f"distance from source {distance:.3g} above its limit {self._max_distance:.3g}")
        return Verdict(True, "within limits")
