"""A pass before there are frames leaves no trace but what torch has loaded for it."""

import sys
from datetime import UTC, datetime

import numpy as np
import torch

from schemas.frame import Position
from worker.batch.batcher import MicroBatch
from worker.decode.image import DecodedFrame
from worker.engine.engine import Engine
from worker.engine.warm_up import warm_up


def adapted(engine: Engine) -> dict[str, torch.Tensor]:
    engine.admit(engine.begun("cam"), token=1, stored=False)
    pixels = np.random.default_rng(1).integers(0, 255, (8, 28, 28), np.uint8)
    frames = [
        DecodedFrame("cam", Position("frames", 0, i), one, datetime.now(UTC), 0.0) for i, one in enumerate(pixels)
    ]
    return engine.adapt(engine.predict([MicroBatch("cam", frames, adapt=True, fold=True)])).state


def test_it_leaves_no_stream_and_changes_no_other(tiny_bundle) -> None:
    warm = Engine(tiny_bundle)
    warm_up(warm, tiny_bundle.manifest.preprocess)
    assert not warm.streams
    expected = adapted(Engine(tiny_bundle))
    for name, tensor in adapted(warm).items():
        assert torch.equal(tensor, expected[name]), name


def test_the_next_pass_has_nothing_left_to_load(tiny_bundle) -> None:
    engine = Engine(tiny_bundle)
    warm_up(engine, tiny_bundle.manifest.preprocess)
    loaded = set(sys.modules)
    adapted(engine)
    assert set(sys.modules) == loaded


def test_colour_frames_have_three_channels(tiny_bundle) -> None:
    engine, seen = Engine(tiny_bundle), []
    engine.predict = lambda batches: seen.extend(batches)  # type: ignore[method-assign,assignment,return-value]
    engine.adapt = lambda passed: None  # type: ignore[method-assign,assignment,return-value]
    warm_up(engine, tiny_bundle.manifest.preprocess.model_copy(update={"mode": "RGB"}))
    assert {frame.pixels.shape for frame in seen[0].frames} == {(28, 28, 3)}
