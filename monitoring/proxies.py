"""Estimates a stream's accuracy without labels, from its running signals."""

from __future__ import annotations

import math

from schemas.bundle import Calibration
from schemas.state import RunningProxies
from schemas.update import Proxies


def estimate(
    proxies: RunningProxies, calibration: Calibration, clean_accuracy: float, classes: int, estimated: bool = True
) -> Proxies:
    """What is shown of a stream's recent frames; `meta.proxies` has made the estimates.

    If the method has no estimator (`estimated` is false), its accuracies are None: confidence in their place would call
    a collapse a success. A bundle without an estimator has a line from mean confidence to accuracy (a regression form
    of the difference of confidences, Guillory et al., ICCV 2021). A stream without frames counts as clean.
    """
    accuracy = proxies.accuracy
    if not estimated:
        accuracy = None
    elif accuracy is None:
        fitted = calibration.intercept + calibration.slope * proxies.confidence
        accuracy = min(1.0, max(0.0, fitted)) if proxies.frames else clean_accuracy
    signals = proxies.signals
    return Proxies(
        estimated_accuracy=accuracy,
        low=proxies.low if estimated else None,
        high=proxies.high if estimated else None,
        source_accuracy=proxies.source_accuracy if proxies.shadowed and estimated else None,
        confidence=proxies.confidence,
        entropy=proxies.entropy,
        marginal_entropy=max(0.0, signals["marginal"]) * math.log(classes) if "marginal" in signals else None,
        flip_rate=min(1.0, max(0.0, signals["flips"])) if proxies.shadowed and "flips" in signals else None,
    )
