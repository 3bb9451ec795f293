"""Accuracy without labels: what a stream's calibrated confidence says of its accuracy."""

from __future__ import annotations

from schemas.bundle import Calibration
from schemas.state import RunningProxies
from schemas.update import Proxies


def estimate(proxies: RunningProxies, calibration: Calibration, clean_accuracy: float) -> Proxies:
    """The estimate for a stream's recent frames.

    A line from mean confidence to accuracy, fitted on simulated shifts (a regression form of the difference of
    confidences, Guillory et al., ICCV 2021). A stream that has shown nothing yet counts as clean.
    """
    fitted = calibration.intercept + calibration.slope * proxies.confidence
    accuracy = fitted if proxies.frames else clean_accuracy
    return Proxies(
        estimated_accuracy=min(1.0, max(0.0, accuracy)), confidence=proxies.confidence, entropy=proxies.entropy
    )
