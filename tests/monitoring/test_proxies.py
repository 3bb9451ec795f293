import math

import pytest

from monitoring.proxies import estimate
from schemas.bundle import Calibration
from schemas.state import RunningProxies

CALIBRATION = Calibration(temperature=1, intercept=-0.5, slope=1.5, error=0.1)


def test_new_streams_count_as_clean() -> None:
    assert estimate(RunningProxies(), CALIBRATION, 0.91, 10).estimated_accuracy == 0.91


@pytest.mark.parametrize(("confidence", "expected"), [(0.8, 0.7), (0.2, 0.0), (1.0, 1.0)])
def test_line_within_bounds(confidence: float, expected: float) -> None:
    seen = RunningProxies(frames=50, confidence=confidence, entropy=0.3)
    assert estimate(seen, CALIBRATION, 0.91, 10).estimated_accuracy == pytest.approx(expected)


def test_confidence_never_stands_for_the_accuracy_of_a_method_that_the_estimate_is_not_made_for() -> None:
    sure = RunningProxies(frames=500, confidence=0.99, shadowed=64, signals={"marginal": 0.1, "flips": 0.8})
    seen = estimate(sure, CALIBRATION, 0.91, 10, estimated=False)
    assert (seen.estimated_accuracy, seen.low, seen.high, seen.source_accuracy) == (None, None, None, None)
    assert (seen.confidence, seen.flip_rate) == (0.99, 0.8)
    assert seen.marginal_entropy == pytest.approx(0.1 * math.log(10))
    assert estimate(RunningProxies(), CALIBRATION, 0.91, 10, estimated=False).estimated_accuracy is None


def test_the_entropy_of_the_mean_prediction_is_in_nats() -> None:
    seen = RunningProxies(frames=50, confidence=0.8, signals={"marginal": 0.5})
    assert estimate(seen, CALIBRATION, 0.91, 10).marginal_entropy == pytest.approx(0.5 * math.log(10))
