"""What is said of a stored stream, without a worker."""

from pathlib import Path

import pytest

from schemas.config import Bundle, WorkerConfig
from schemas.state import RunningProxies, StreamHeader
from worker.control.stored import ListedStream, judged


@pytest.mark.parametrize(("method", "estimated"), [("mgg", True), ("tent", False)])
def test_only_a_state_of_the_generator_has_an_accuracy(tiny_bundle_path: Path, method: str, estimated: bool) -> None:
    """One of an earlier release has no signals, and so its confidence would stand for it."""
    seen = RunningProxies(frames=500, confidence=0.99, entropy=0.1)
    header = StreamHeader(stream="cam", bundle="b" * 16, method=method, step=40, proxies=seen)
    config = WorkerConfig(bundle=Bundle(path=tiny_bundle_path))
    _, proxies = judged(config, ListedStream("cam", "", 1, header, 10, 0))
    assert (proxies.estimated_accuracy is not None) is estimated
    assert proxies.confidence == 0.99
