"""Adapting on demand, on the demo's cameras: what it keeps of the gain of always adapting, and what it costs.

Measured at the pace of cameras, as on a site, and for a backlog. There frames wait, settled streams have larger
micro-batches, and alarms come later.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meta.data import fashion_mnist
from worker.benchmark.throughput_worker import Bench, Measured
from worker.demo.cameras import CAMERAS, Reel, film

MODES: dict[str, dict[str, Any]] = {
    "predict": {"enabled": False},
    "on_demand": {"mode": "on_demand"},
    "always": {"mode": "always"},
}


def on_demand(bench: Bench, path: Path, frames: int, seeds: Sequence[int], rate: float | None) -> dict[str, Any]:
    """The three modes on the same reels, for each seed. A predict-only worker answers as the source model.

    `rate`: frames a second of each camera; None: all at once.
    """
    runs = [_seed(bench, path, frames, seed, rate) for seed in seeds]
    gains = {mode: [run[mode]["accuracy"] - run["predict"]["accuracy"] for run in runs] for mode in MODES}
    cpu = {mode: [run[mode]["cpu_seconds_per_1000_frames"] for run in runs] for mode in MODES}
    return {
        "seeds": list(seeds),
        "frames_a_second": rate,
        "runs": runs,
        "gain_share": float(np.mean(gains["on_demand"]) / np.mean(gains["always"])),
        "cpu_vs_predict": float(np.mean(cpu["on_demand"]) / np.mean(cpu["predict"])),
        "always_cpu_vs_predict": float(np.mean(cpu["always"]) / np.mean(cpu["predict"])),
    }


def _seed(bench: Bench, path: Path, frames: int, seed: int, rate: float | None) -> dict[str, Any]:
    data = fashion_mnist("test")
    reels = {camera.stream: film(camera, data, frames, seed) for camera in CAMERAS}
    sent = [(stream, reel.frames[i]) for i in range(frames) for stream, reel in reels.items()]
    results = {}
    # The order alternates, as the machine's speed changes. The first two modes are compared, so they run in succession.
    for mode in reversed(MODES) if seed % 2 else MODES:
        seen = bench.run(path, sent, None if rate is None else rate * len(reels), grown=False, adapt=MODES[mode])
        results[mode] = {**seen.summary(), **_accuracy(seen, reels)}
        results[mode]["updates"] = seen.metrics.get(
            'driftkeel_updates_total{decision="applied",reason="within_limits"}', 0.0
        )
    return {mode: results[mode] for mode in MODES}


def _accuracy(seen: Measured, reels: dict[str, Reel]) -> dict[str, Any]:
    """Over all frames, and per stream. A stream's predictions are in the order of its frames' offsets."""
    by_stream: dict[str, list[tuple[int, int]]] = {stream: [] for stream in reels}
    for frame_id, prediction in seen.predictions.items():
        by_stream[prediction["stream"]].append((int(frame_id.rsplit("/", 1)[1]), prediction["index"]))
    right = {
        stream: float(np.mean(np.array([index for _, index in sorted(found)]) == reels[stream].labels))
        for stream, found in by_stream.items()
    }
    return {"accuracy": float(np.mean(list(right.values()))), "streams": right}
