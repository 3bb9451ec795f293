"""A pass before the first frames come, because the first one of a process takes longer.

Torch imports a part of itself in the first backward pass. That takes most of a second with the interpreter lock held,
for which the first frames of all streams would wait.
"""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np

from schemas.bundle import Preprocess
from schemas.frame import Position
from worker.batch.batcher import MicroBatch
from worker.decode.image import DecodedFrame
from worker.engine.engine import Engine

STREAM = "warm-up"
FRAMES = 4


def warm_up(engine: Engine, preprocess: Preprocess) -> None:
    """Predict noise, adapt to it, and forget it. Call it before any stream is resident."""
    engine.admit(engine.begun(STREAM), token=0, stored=False)
    shape = (preprocess.height, preprocess.width) + ((3,) if preprocess.mode == "RGB" else ())
    random, now = np.random.default_rng(0), datetime.now(UTC)
    frames = [
        DecodedFrame(STREAM, Position("", 0, i), random.integers(0, 255, shape, np.uint8), now, 0.0)
        for i in range(FRAMES)
    ]
    engine.adapt(engine.predict([MicroBatch(STREAM, frames, adapt=True, fold=True)]))
    engine.release([STREAM])
