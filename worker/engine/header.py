"""A stream's header after frames were folded in."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from meta.estimator import AccuracyModel
from meta.proxies import WINDOW, folded
from monitoring.drift import observe
from schemas.state import DriftWatch, GuardState, RunningProxies, StreamHeader
from worker.engine.passes import BatchPrediction


def next_header(
    header: StreamHeader,
    prediction: BatchPrediction,
    applied: bool,
    drift_frames: int = 0,
    proxies: RunningProxies | None = None,
    guard: GuardState | None = None,
) -> StreamHeader:
    """The header after these frames were folded in, with or without an update.

    `proxies` and `guard`: those after the frames; None leaves them as they are. `drift_frames`: how many frames make
    one signal for drift detection; 0 switches it off.
    """
    frames = prediction.batch.frames
    positions, chain = dict(header.positions), header.folded
    for frame in frames:
        positions[frame.position.log] = frame.position.offset
        chain = hashlib.sha256(f"{chain}{frame.position}".encode()).hexdigest()
    watches = drift_frames > 0 and not prediction.batch.hurried
    return header.model_copy(
        update={
            "positions": positions,
            "folded": chain,
            "frames": header.frames + len(frames),
            "step": header.step + applied,
            "events": header.events + 1,
            "proxies": proxies or header.proxies,
            "guard": guard or header.guard,
            "drift": _next_watch(header.drift, prediction, drift_frames) if watches else header.drift,
            "probation": max(0, header.probation - len(frames)),
        }
    )


def _next_watch(drift: DriftWatch | None, prediction: BatchPrediction, frames: int) -> DriftWatch | None:
    """The watch after this micro-batch. A larger one is divided into several signals of about `frames` each, because
    the spread of a mean depends on how many frames it is of."""
    total = len(prediction.batch.frames)
    parts = max(1, round(total / frames))
    for part in range(parts):
        rows = prediction.signals[part * total // parts : (part + 1) * total // parts]
        drift = observe(drift, [sum(values) / len(rows) for values in zip(*rows, strict=True)], prediction.batch.adapt)
    return drift


def next_proxies(
    proxies: RunningProxies, prediction: BatchPrediction, generated: Mapping[str, float], model: AccuracyModel | None
) -> RunningProxies:
    """The running proxies after these frames; `generated` are the signals of their update."""
    frames = len(prediction.batch.frames)
    if not (math.isfinite(prediction.mean_confidence) and math.isfinite(prediction.mean_entropy)):
        return proxies
    # A plain mean until the window is full, then an exponential one.
    weight = frames / (frames + max(0, min(proxies.frames, WINDOW - frames)))
    moved: dict[str, Any] = {
        "frames": proxies.frames + frames,
        "confidence": proxies.confidence + weight * (prediction.mean_confidence - proxies.confidence),
        "entropy": max(0.0, proxies.entropy + weight * (prediction.mean_entropy - proxies.entropy)),
    }
    if prediction.observed is not None:
        moved |= folded(proxies, prediction.observed, generated, model)
    return proxies.model_copy(update=moved)
