"""`driftkeel benchmark throughput`: what the engine and the whole worker cost, as ratios within one run.

Wall times on a shared machine mean little; ratios of runs that take turns mean something. The bare loop is the plain
way to adapt the same net on the same micro-batches: frames in memory, torch's own threads, no broker, no store. It is
compared with workers run as docs/performance.md recommends: one for every processor, of one thread each. The cost of a
frame is measured with one of them.
"""

from __future__ import annotations

import io
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from meta.benchmark.report import commit
from meta.bundle import Bundle, load_bundle, write_bundle
from meta.learned import GeneratorSettings, LearnedOptimizer
from meta.models import build_network
from meta.norms import AdaptableModel
from meta.objective import feature_statistics
from schemas.bundle import Limits, MethodPart, Preprocess
from worker.benchmark.throughput_demo import on_demand
from worker.benchmark.throughput_engine import (
    CYCLE,
    Case,
    bare_pass,
    engine_memory,
    engine_pass,
    forward_pass,
    frames_per_second,
    stream_loop,
    write_trace,
)
from worker.benchmark.throughput_worker import DROPPED, PARTITIONS, WINDOW, Bench, Measured, Sent, Window
from worker.embedded import embedded_services
from worker.process import keep_freed_memory

LARGE_WIDTHS = (32, 64, 96, 128)  # on 64 x 64 pixels: 150 million multiply-adds, 300 MFLOPs a frame
LARGE_SIDE, LARGE_SOURCE_SIDE = 64, 128
LARGE_STREAMS = 16
CAMERAS, FRAMES_A_SECOND = 100, (1, 5)  # a site of slow cameras, and the rates of each
DEMO_RATE = 60.0  # frames a second of each of the demo's cameras
PICTURES = 199  # prime, so that each stream gets all of them: the guard refuses updates from repeated frames
MAX_WAIT_MS, BUDGET_MS = 100, 1_000
FLOOD = 1.6  # times the throughput of a backlog: more than the workers keep up with
FLOODED = (0.1, 0.35)  # window of predictions that are made while frames still come
PODS = min(PARTITIONS, os.cpu_count() or 1)


@dataclass(frozen=True)
class Plan:
    """The extent of a run. `more`: measure also what is part of no ratio."""

    more: bool
    repetitions: int
    small_frames: int
    large_frames: int
    few_frames: int
    many_streams_each: int
    paced_seconds: float
    demo_frames: int
    demo_seeds: tuple[int, ...]


QUICK = Plan(False, 5, 6_000, 768, 2_000, 16, 4.0, 2_000, (0,))
FULL = Plan(True, 11, 24_000, 2_048, 8_000, 32, 20.0, 4_000, (0, 1, 2))


def run_throughput(bundle_path: Path, report: Path | None, profile: Path | None, quick: bool) -> int:
    """Measure everything, print the ratios, write the report. Returns the exit code."""
    console = Console(highlight=False, soft_wrap=True)
    began = time.monotonic()
    keep_freed_memory()  # as the worker does, so that the bare loop has it too
    plan = QUICK if quick else FULL
    with (
        tempfile.TemporaryDirectory(prefix="driftkeel-bench-") as scratch,
        embedded_services() as (broker, store, logs),
    ):
        large_path = Path(scratch) / "large"
        small = load_bundle(bundle_path)
        large = make_large_bundle(small, large_path)
        bench = Bench(broker, store, logs)
        results: dict[str, Any] = {"machine": _machine(), "bundle": small.hash, "commit": commit(), "quick": quick}
        results["idle_stream_bytes"] = engine_memory(
            small
        )  # first, as memory freed by other measurements would be reused
        parts: list[tuple[str, Callable[[], dict[str, Any]]]] = [
            ("engine", lambda: _engine(small, large, plan)),
            ("small", lambda: _small(bench, bundle_path, small, plan)),
            ("large", lambda: _large(bench, large_path, large, plan)),
            ("streams", lambda: _streams(bench, bundle_path, plan)),
            ("latency", lambda: _latency(bench, bundle_path, plan, results["small"]["worker"]["frames_per_second"])),
            ("on_demand", lambda: on_demand(bench, bundle_path, plan.demo_frames, plan.demo_seeds, DEMO_RATE)),
        ]
        if plan.more:
            backlog = partial(on_demand, bench, bundle_path, plan.demo_frames, plan.demo_seeds, None)
            parts += [("on_demand_backlog", backlog), ("cameras", lambda: _cameras(bench, bundle_path, plan))]
        for name, measure in parts:
            results[name] = measure()
            console.print(f"{time.monotonic() - began:4.0f} s  {name} measured")
    results["ratios"] = _ratios(results)
    results["seconds"] = time.monotonic() - began
    for name, value in results["ratios"].items():
        console.print(f"{name:28s} {value:.3f}")
    if report:
        report.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if profile:
        write_trace(Case(small, 16, 4), profile)
        console.print(f"trace of an engine pass: {profile}; open it in ui.perfetto.dev or chrome://tracing")
    return 0


def make_large_bundle(small: Bundle, folder: Path) -> Bundle:
    """An untrained net of about 300 MFLOPs a frame with an untrained generator: for speed, not for accuracy."""
    torch.manual_seed(0)
    settings = GeneratorSettings()
    arguments = {"classes": len(small.labels), "channels": 3, "widths": LARGE_WIDTHS, "group": 8}
    network = build_network("groupnorm-cnn", arguments)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    model = AdaptableModel(network)
    with torch.no_grad():
        noise = torch.randn(16, 3, LARGE_SIDE, LARGE_SIDE)
        source = feature_statistics(model.forward_with_features(noise)[1])
    old = small.manifest
    manifest = old.model_copy(
        update={
            "name": "large-untrained",
            "model": old.model.model_copy(update={"arguments": {**arguments, "widths": list(LARGE_WIDTHS)}}),
            "method": MethodPart(name="mgg", settings=settings.model_dump(mode="json")),
            "preprocess": Preprocess(mode="RGB", width=LARGE_SIDE, height=LARGE_SIDE, mean=[0.5] * 3, std=[0.25] * 3),
            "limits": Limits(raw_gradient_norm=1e9, source_distance=1e9),
        }
    )
    tensors = {
        "model": weights,
        "generator": dict(LearnedOptimizer(settings, model).state_dict()),
        "statistics": source.as_tensors(),
    }
    write_bundle(folder, manifest, tensors, small.labels)
    return load_bundle(folder)


def pictures(count: int, side: int, mode: str, format: str) -> list[bytes]:
    """Encoded images of random blobs."""
    random = np.random.default_rng(0)
    encoded = []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 255, (7, 7, 3), np.uint8))
        buffer = io.BytesIO()
        coarse.resize((side, side), Image.Resampling.BILINEAR).convert(mode).save(buffer, format)
        encoded.append(buffer.getvalue())
    return encoded


def frames_of(streams: int, total: int, images: list[bytes]) -> list[Sent]:
    """`total` frames of streams that take turns."""
    return [(f"cam-{i % streams}", images[i % len(images)]) for i in range(total)]


def _engine(small: Bundle, large: Bundle, plan: Plan) -> dict[str, Any]:
    """Engine, bare loop and loop over streams, torch's own threads for each."""
    cases: dict[str, tuple[Case, Callable[[], None]]] = {}
    shapes = ((1, 256), (8, 32), (64, 4), (256, 1)) if plan.more else ((1, 256), (64, 4))
    for streams, frames in shapes:
        case = Case(small, streams, frames)
        cases[f"bare {streams}x{frames}"] = case, bare_pass(case)
        cases[f"engine {streams}x{frames}"] = case, engine_pass(case)
    found = frames_per_second(cases, max(3, plan.repetitions // 2), CYCLE)
    case = Case(small, 64, 4)
    cases = {"loop 64x4": (case, stream_loop(case)), "forward 256": (case, forward_pass(case))}
    found |= frames_per_second(cases, plan.repetitions)
    if plan.more:
        case = Case(large, 4, 16)
        cases = {"bare large 4x16": (case, bare_pass(case)), "engine large 4x16": (case, engine_pass(case))}
        found |= frames_per_second(cases, 3, CYCLE)
    return {"frames_per_second": found}


def _against_bare(bench: Bench, path: Path, bundle: Bundle, frames: list[Sent], repetitions: int) -> dict[str, Any]:
    """The workers, between two measurements of the bare loop, on micro-batches as large as a backlog makes them."""
    case = Case(bundle, 4, 16)
    bare: list[float] = []

    def measure() -> None:
        bare.append(frames_per_second({"bare": (case, bare_pass(case))}, repetitions)["bare"])

    measure()
    seen = bench.run(path, frames, pods=PODS)
    measure()
    return {"bare_frames_per_second": bare, "worker": seen.summary(), "stages": stages(seen)}


def _small(bench: Bench, path: Path, bundle: Bundle, plan: Plan) -> dict[str, Any]:
    frames = frames_of(64, plan.small_frames, pictures(PICTURES, 28, "L", "PNG"))
    results = _against_bare(bench, path, bundle, frames, 4 * plan.repetitions)
    if plan.more:
        results["one_process"] = bench.run(path, frames, threads=0).summary()
        results["predict_only"] = bench.run(path, frames, pods=PODS, adapt={"enabled": False}).summary()
    return results


def _large(bench: Bench, path: Path, bundle: Bundle, plan: Plan) -> dict[str, Any]:
    images = pictures(PICTURES, LARGE_SOURCE_SIDE, "RGB", "JPEG")
    results = _against_bare(bench, path, bundle, frames_of(LARGE_STREAMS, plan.large_frames, images), plan.repetitions)
    if plan.more:
        big = frames_of(LARGE_STREAMS, plan.large_frames // 2, pictures(PICTURES, 640, "RGB", "JPEG"))
        results["worker_640x640_jpeg"] = bench.run(path, big, pods=PODS).summary()
    return results


def _streams(bench: Bench, path: Path, plan: Plan) -> dict[str, Any]:
    """Eight streams are measured before and after the thousand they are compared with, as a machine's speed changes."""
    images = pictures(PICTURES, 28, "L", "PNG")
    each = plan.many_streams_each
    more = {"1": 1, "256": 256} if plan.more else {}
    return {
        name: bench.run(path, frames_of(streams, max(plan.few_frames, each * streams), images)).summary()
        for name, streams in (more | {"8": 8, "1000": 1_000, "8 (again)": 8}).items()
    }


def _latency(bench: Bench, path: Path, plan: Plan, backlog: float) -> dict[str, Any]:
    """Latency at 70% of the capacity with and without a budget, and at 200% with one, late frames answered or dropped.

    Capacity is the throughput while frames keep coming. It is less than that of a backlog, as sender and broker take a
    part of the same processors. Measured again at the end, it shows whether the machine has kept its speed.
    """
    images = pictures(PICTURES, 28, "L", "PNG")

    def paced(pace: float, budget: int, window: Window = WINDOW, drop: bool = False) -> Measured:
        frames = frames_of(64, int(pace * plan.paced_seconds), images)
        batch = {"max_wait_ms": MAX_WAIT_MS, "latency_budget_ms": budget, "drop_late": drop}
        return bench.run(path, frames, pace, pods=PODS, window=window, batch=batch)

    def limit() -> float:
        return paced(FLOOD * backlog, 0, FLOODED).frames_per_second

    capacity = limit()
    results: dict[str, Any] = {"max_wait_ms": MAX_WAIT_MS, "budget_ms": BUDGET_MS, "capacity": capacity}
    loads = ((0.7, 0, False), (0.7, BUDGET_MS, False), (2.0, BUDGET_MS, False), (2.0, BUDGET_MS, True))
    for share, budget, drop in loads:
        seen = paced(share * capacity, budget, drop=drop)
        late = sum(latency > BUDGET_MS for latency in seen.latencies_ms)
        results[f"load_{share:.0%}" + ("_budget" if budget else "") + ("_dropping" if drop else "")] = {
            **seen.summary(),
            "offered_frames_per_second": share * capacity,
            "step_ms": 1000 * stages(seen)["all"],
            "share_within_budget": 1 - late / len(seen.latencies_ms),
            "dropped": seen.metrics[DROPPED],
            "shed": seen.metrics.get('driftkeel_adaptations_left_out_total{reason="overload"}', 0.0),
        }
    if plan.more:
        results["capacity_again"] = limit()
    return results


def _cameras(bench: Bench, path: Path, plan: Plan) -> dict[str, Any]:
    """One worker and many slow cameras, whose micro-batches close by time with few frames."""
    images = pictures(PICTURES, 28, "L", "PNG")
    found = {}
    for rate in FRAMES_A_SECOND:
        pace = CAMERAS * rate
        seen = bench.run(path, frames_of(CAMERAS, int(pace * plan.paced_seconds), images), pace)
        found[str(rate)] = seen.summary()
    return found


def stages(seen: Measured) -> dict[str, float]:
    """Mean seconds of a step's stages."""
    found = {}
    for stage in ("predict", "publish", "adapt", "settle", "store", "all"):
        total = seen.metrics.get(f'driftkeel_step_seconds_sum{{stage="{stage}"}}', 0.0)
        found[stage] = total / max(1.0, seen.metrics.get(f'driftkeel_step_seconds_count{{stage="{stage}"}}', 0.0))
    return found


def _ratios(results: dict[str, Any]) -> dict[str, float]:
    engine = results["engine"]["frames_per_second"]
    worker = {size: results[size]["worker"]["frames_per_second"] for size in ("small", "large")}
    bare = {size: float(np.mean(results[size]["bare_frames_per_second"])) for size in ("small", "large")}
    cost = {name: 1 / seen["frames_per_second"] for name, seen in results["streams"].items()}
    few = (cost["8"] + cost["8 (again)"]) / 2
    demo = {name: found for name, found in results.items() if name.startswith("on_demand")}
    return {
        "engine_vs_bare": engine["engine 64x4"] / engine["bare 64x4"],
        "streams64_vs_one": engine["engine 64x4"] / engine["engine 1x256"],
        "streams64_vs_loop": engine["engine 64x4"] / engine["loop 64x4"],
        "worker_vs_bare_small": worker["small"] / bare["small"],
        "worker_vs_bare_large": worker["large"] / bare["large"],
        **{f"{name}_gain_share": found["gain_share"] for name, found in demo.items()},
        **{f"{name}_cpu_vs_predict": found["cpu_vs_predict"] for name, found in demo.items()},
        "cost_1000_vs_8_streams": cost["1000"] / few,
    }


def _machine() -> dict[str, Any]:
    return {
        "processors": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
