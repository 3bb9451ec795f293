"""What is known of a stream once frames have been folded in: its header, and how well it is estimated to do."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from meta.estimator import AccuracyModel
from meta.proxies import WINDOW, folded
from monitoring.drift import observe
from schemas.state import DriftWatch, GuardState, RunningProxies, StreamHeader
from worker.engine.passes import Outlook


def next_header(
    header: StreamHeader,
    outlook: Outlook,
    applied: bool,
    drift_frames: int = 0,
    proxies: RunningProxies | None = None,
    guard: GuardState | None = None,
) -> StreamHeader:
    """The header after these frames have been folded in, with or without an update.

    `proxies` and `guard` are what is known after them; as before where None. `drift_frames`: of a signal of drift
    detection; 0 where nothing is watched.
    """
    frames = outlook.batch.frames
    positions, chain = dict(header.positions), header.folded
    for frame in frames:
        positions[frame.position.log] = frame.position.offset
        chain = hashlib.sha256(f"{chain}{frame.position}".encode()).hexdigest()
    watches = drift_frames > 0 and not outlook.batch.hurried
    return header.model_copy(
        update={
            "positions": positions,
            "folded": chain,
            "frames": header.frames + len(frames),
            "step": header.step + applied,
            "events": header.events + 1,
            "proxies": proxies or header.proxies,
            "guard": guard or header.guard,
            "drift": _next_watch(header.drift, outlook, drift_frames) if watches else header.drift,
            "probation": max(0, header.probation - len(frames)),
        }
    )


def _next_watch(drift: DriftWatch | None, outlook: Outlook, frames: int) -> DriftWatch | None:
    """The watch after this micro-batch: a larger one gives several signals, each of about so many frames, because the
    fewer frames there are, the more a mean spreads."""
    total = len(outlook.batch.frames)
    parts = max(1, round(total / frames))
    for part in range(parts):
        rows = outlook.signals[part * total // parts : (part + 1) * total // parts]
        drift = observe(drift, [sum(values) / len(rows) for values in zip(*rows, strict=True)], outlook.batch.adapt)
    return drift


def next_proxies(
    proxies: RunningProxies, outlook: Outlook, generated: Mapping[str, float], model: AccuracyModel | None
) -> RunningProxies:
    """What is known of the stream's accuracy after these frames; `generated` are the signals of their update."""
    frames = len(outlook.batch.frames)
    if not (math.isfinite(outlook.mean_confidence) and math.isfinite(outlook.mean_entropy)):
        return proxies
    # A plain mean until the window is full, then an exponential one.
    weight = frames / (frames + max(0, min(proxies.frames, WINDOW - frames)))
    moved: dict[str, Any] = {
        "frames": proxies.frames + frames,
        "confidence": proxies.confidence + weight * (outlook.mean_confidence - proxies.confidence),
        "entropy": max(0.0, proxies.entropy + weight * (outlook.mean_entropy - proxies.entropy)),
    }
    if outlook.observed is not None:
        moved |= folded(proxies, outlook.observed, generated, model)
    return proxies.model_copy(update=moved)
