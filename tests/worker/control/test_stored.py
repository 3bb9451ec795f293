"""What is said of a stored stream, without a worker."""

from pathlib import Path

import pytest

from schemas.config import Bundle, WorkerConfig
from schemas.policy import Policy, PolicyChange
from schemas.state import RunningProxies, StreamHeader, encode_header
from worker.control.stored import ListedStream, judged, own_policies
from worker.store.store import StateStore, Write


@pytest.mark.parametrize(("method", "estimated"), [("mgg", True), ("tent", False)])
def test_only_a_state_of_the_generator_has_an_accuracy(tiny_bundle_path: Path, method: str, estimated: bool) -> None:
    """One of an earlier release has no signals, and so its confidence would stand for it."""
    seen = RunningProxies(frames=500, confidence=0.99, entropy=0.1)
    header = StreamHeader(stream="cam", bundle="b" * 16, method=method, step=40, proxies=seen)
    config = WorkerConfig(bundle=Bundle(path=tiny_bundle_path))
    _, proxies = judged(config, ListedStream("cam", "", 1, header, 10, 0))
    assert (proxies.estimated_accuracy is not None) is estimated
    assert proxies.confidence == 0.99


def test_a_stream_has_a_policy_of_its_own_where_that_differs_from_the_configuration_s(store: StateStore) -> None:
    told = {
        "free": None,
        "as-it-was": PolicyChange(frozen=False),
        "as-configured": PolicyChange(mode="shadow"),
        "own": PolicyChange(mode="auto", quiet_hours=("22:00-06:00", "12:00-13:00")),
    }
    for stream, change in told.items():
        (claimed,) = store.claim([stream], "worker-1")
        header = encode_header(StreamHeader(stream=stream, bundle="b", method="mgg", policy=change))
        assert store.write([Write(stream, claimed.token, 1, header, b"", b"tensors")]) == [True]
    own = own_policies(WorkerConfig(policy=Policy(mode="shadow")), store)
    assert own == {"own": told["own"]}
    assert own["own"].in_words() == "mode=auto, quiet_hours=22:00-06:00 12:00-13:00"
