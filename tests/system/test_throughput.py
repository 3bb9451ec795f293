"""The throughput benchmark's own way of running workers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from schemas.errors import DriftkeelError
from worker.benchmark.throughput import frames_of, pictures, stages
from worker.benchmark.throughput_worker import Bench
from worker.embedded import embedded_services


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with embedded_services() as (broker, store, folder):
        yield Bench(broker, store, folder)


@pytest.mark.parametrize(("pods", "pace"), [(1, None), (2, 200.0)])
def test_all_workers_together_predict_every_frame(
    bench: Bench, tiny_bundle_path: Path, pods: int, pace: float | None
) -> None:
    frames = frames_of(24, 240, pictures(7, 28, "L", "PNG"))
    seen = bench.run(tiny_bundle_path, frames, pace, pods=pods)
    assert len(seen.predictions) == 240
    assert len({prediction["worker"] for prediction in seen.predictions.values()}) == pods
    assert seen.metrics["driftkeel_predictions_total"] >= 240  # more where partitions moved meanwhile
    assert stages(seen)["all"] > 0
    assert seen.cpu_seconds_per_1000_frames > 0 or pace is None  # a backlog so short may be gone within one sample
    assert seen.peak_memory_bytes > pods << 26


def test_workers_that_do_not_start_say_why_once_each(bench: Bench, tmp_path: Path) -> None:
    frames = frames_of(1, 1, pictures(1, 28, "L", "PNG"))
    with pytest.raises(DriftkeelError) as caught:
        bench.run(tmp_path / "nothing", frames, pods=2, grown=False)
    first, *lines = str(caught.value).splitlines()
    assert first == "the worker did not become ready"
    assert sum(line.startswith("last lines of worker") for line in lines) == 2
    assert any("nothing" in line for line in lines)
