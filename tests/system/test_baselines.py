"""A published baseline in place of the generator, in the real worker."""

import io
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from meta.baselines import BASELINES
from meta.data import fashion_mnist
from schemas.config import Method
from tests.conftest import SHIPPED_BUNDLE, picture
from tests.system.conftest import Site

pytestmark = pytest.mark.usefixtures("full_batches")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_config_names_every_baseline_but_the_oracle() -> None:
    assert set(get_args(Method)) == {"mgg", *BASELINES} - {"oracle"}


def test_tent_through_the_worker_and_back_to_the_generator(site: Site) -> None:
    worker = site.start(adapt={"method": "tent"})
    ids = site.send([(f"cam-{i % 2}", picture(i)) for i in range(64)])
    site.predictions(ids)
    site.wait_folded(worker, {"cam-0": 32, "cam-1": 32})
    header = site.header("cam-0")
    assert header.method == "tent"
    assert header.step > 0
    (first, *_) = site.events(lambda es: sum(len(e.frames) for e in es) >= 64)
    assert first.decision == "applied"
    assert first.raw_gradient_norm > 0
    assert "nobody estimates its accuracy" in worker.log.read_text()
    assert worker.stop() == 0

    # Another method cannot go on from this state: it restarts from source, and says so.
    worker = site.start()
    site.predictions(site.send([("cam-0", picture(i)) for i in range(16)]))
    site.wait_folded(worker, {"cam-0": 48})
    assert site.header("cam-0").method == "mgg"
    assert "nobody estimates" not in worker.log.read_text()
    resets = [e for e in site.events(lambda es: any(e.decision == "reset" for e in es)) if e.decision == "reset"]
    assert "(tent)" in resets[0].reason


def test_tent_that_noise_has_taken_in_goes_back_and_a_healthy_stream_is_not_held_back(site: Site) -> None:
    """Ten times its step, so that it takes seconds. What it claims of itself is nowhere to be seen."""
    noise, images = np.random.default_rng(0), fashion_mnist("test").images
    frames = [("noisy", png(noise.integers(0, 256, (28, 28), np.uint8))) for _ in range(256)]
    frames += [("noisy", png(image)) for image in images[:512]]
    frames += [("healthy", png(image)) for image in images[1_000:1_768]]
    site.config |= {
        "bundle": {"path": str(SHIPPED_BUNDLE)},
        "batch": {"max_batch": 16, "max_wait_ms": 10_000, "max_hold_ms": 10_000, "latency_budget_ms": 0},
    }
    worker = site.start(adapt={"method": "tent", "step_scale": 10})
    predictions = [one for some in site.predictions(site.send(frames)).values() for one in some]
    site.wait_folded(worker, {"noisy": 768, "healthy": 768})
    events = site.events(lambda es: sum(len(e.frames) for e in es) >= 1_536)
    undone = [event for event in events if event.decision in ("reset", "rolled_back")]
    assert {event.stream for event in undone} == {"noisy"}
    assert all("source disagrees" in event.reason or "answers leave source" in event.reason for event in undone)
    assert {event.decision for event in events if event.stream == "healthy"} == {"applied"}
    assert {one.parameters for one in predictions if one.stream == "healthy" and one.step} == {"adapted"}
    assert any(one.source_label is not None for one in predictions)
    assert {one.estimated_accuracy for one in predictions} == {None}
    assert {event.after.estimated_accuracy for event in events} == {None}
    assert all(event.after.flip_rate is not None for event in events)
    shown = worker.metrics()
    assert 'driftkeel_stream_flip_ratio{stream="noisy"}' in shown
    assert "driftkeel_stream_estimated_accuracy_ratio{" not in shown
    assert "driftkeel_fleet_estimated_accuracy_ratio_gcount 0.0" in shown
    assert 'driftkeel_estimated_correct_frames_total{by="answered"} 0.0' in shown


@pytest.mark.parametrize("method", ["rotta", "neo"])
def test_methods_with_memories_of_their_own_store_and_restore_them(site: Site, method: str) -> None:
    frames = [("cam", picture(i)) for i in range(24)]
    first = site.start(adapt={"method": method})
    site.predictions(site.send(frames))
    site.wait_folded(first, {"cam": 24})
    assert first.stop() == 0
    second = site.start(adapt={"method": method})
    site.predictions(site.send(frames))
    site.wait_folded(second, {"cam": 48})
    assert site.header("cam").step > 4
    assert "restarts from source" not in second.log.read_text()
