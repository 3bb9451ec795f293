"""What metrics cost: python -m tests.scale.metrics --report docs/results/metrics.json

A scrape over HTTP with many streams, and the time of all observations of a pass against the time of the pass itself:
one thread, the shipped bundle, 64 frames of four streams, every micro-batch adapting. All times are of one run.
"""

from __future__ import annotations

import argparse
import json
import os

os.environ["OMP_WAIT_POLICY"] = "passive"

import statistics
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meta.bundle import load_bundle
from monitoring import observe
from monitoring.http import serve_metrics
from monitoring.metrics import WorkerMetrics
from schemas.frame import Position
from schemas.state import DriftWatch, StreamHeader
from schemas.update import Proxies, UpdateEvent
from tests.conftest import SHIPPED_BUNDLE
from worker.batch.batcher import MicroBatch
from worker.decode.image import DecodedFrame
from worker.engine.engine import Engine

STREAMS, BATCH, INTERVAL_S = 4, 16, 15
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def event(stream: str, random: np.random.Generator) -> UpdateEvent:
    accuracy = float(random.uniform(0.5, 0.95))
    proxies = Proxies(
        estimated_accuracy=accuracy,
        low=accuracy - 0.05,
        high=min(1.0, accuracy + 0.05),
        source_accuracy=accuracy - 0.1,
        confidence=accuracy,
        entropy=0.4,
        marginal_entropy=2.1,
        flip_rate=0.2,
    )
    return UpdateEvent(
        id=f"{stream}@12",
        stream=stream,
        time=datetime.now(UTC),
        decision="applied",
        reason="within limits",
        frames=[f"frames/3/{i}" for i in range(BATCH)],
        step=12,
        raw_gradient_norm=float(random.exponential()),
        generated_gradient_norm=float(random.exponential()),
        cosine=0.3,
        source_distance=float(random.exponential()),
        after=proxies,
        token=1,
        bundle="b",
        worker="w",
    )


def header(stream: str) -> StreamHeader:
    watch = DriftWatch(adapting=False, mean=[1.0, 1.0], variance=[0.1, 0.1], rise=[0.5, 0.1], fall=[0.0, 0.2])
    return StreamHeader(stream=stream, bundle="b", method="mgg", drift=watch)


def scrapes(streams: int, shown: int, accept: str) -> dict[str, Any]:
    """Twenty scrapes of a worker with so many streams, of which so many have series."""
    random, metrics = np.random.default_rng(0), WorkerMetrics(shown)
    for i in range(streams):
        stream = f"plant-7/line-{i % 20}/camera-{i}"
        observe.decided(metrics, event(stream, random), header(stream))
    server = serve_metrics(metrics.registry, "127.0.0.1", 0, lambda: True, lambda: "")
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/metrics", headers={"Accept": accept})
    seconds, size = [], 0
    for _ in range(20):
        started = time.perf_counter()
        with urllib.request.urlopen(request) as answer:
            size = len(answer.read())
        seconds.append(time.perf_counter() - started)
    server.close()
    return {
        "streams": streams,
        "with_series": shown,
        "milliseconds_median": round(1000 * statistics.median(seconds), 1),
        "milliseconds_most": round(1000 * max(seconds), 1),
        "bytes": size,
    }


def micro_batches(engine: Engine, random: np.random.Generator) -> list[MicroBatch]:
    batches = []
    for i in range(STREAMS):
        now = time.monotonic()
        pixels = random.integers(0, 255, (BATCH, 28, 28), np.uint8)
        frames = [
            DecodedFrame(f"s{i}", Position("frames", i, n), pixels[n], datetime.now(UTC), now, sent=time.time())
            for n in range(BATCH)
        ]
        batches.append(MicroBatch(f"s{i}", frames, adapt=True, fold=True))
        if f"s{i}" not in engine:
            engine.admit(engine.begun(f"s{i}"), 1, True)
    return batches


def share_of_a_pass(rounds: int = 60) -> dict[str, float]:
    """Processor time of a pass, and of all that the worker observes of it."""
    torch.set_num_threads(1)
    engine, metrics = Engine(load_bundle(SHIPPED_BUNDLE)), WorkerMetrics(50)
    random = np.random.default_rng(1)
    passes, observing = [], []
    for _ in range(rounds):
        batches = micro_batches(engine, random)
        events = [event(batch.stream, random) for batch in batches]
        headers = [header(batch.stream) for batch in batches]
        started = time.process_time()
        passed = engine.predict(batches)
        engine.adapt(passed)
        middle = time.process_time()
        answers = observe.Answers(time.monotonic())
        for prediction in passed.predictions:
            for frame, confidence in zip(prediction.batch.frames, prediction.top_confidence, strict=True):
                answers.by[prediction.parameters] += 1
                answers.add(frame.position, frame.received, frame.sent, confidence[0])
        observe.answered(metrics, answers)
        observe.took(metrics, predict=0.01, publish=0.01)
        for one, its_header in zip(events, headers, strict=True):
            observe.decided(metrics, one, its_header)
            observe.judged(metrics, one, 0.5, "adapted")
        observe.took(metrics, adapt=0.01, settle=0.01, store=0.01, all=0.05)
        done = time.process_time()
        passes.append(middle - started)
        observing.append(done - middle)
    return {
        "pass_milliseconds": round(1000 * statistics.median(passes), 2),
        "observing_milliseconds": round(1000 * statistics.median(observing), 3),
        "share_of_pass": round(statistics.median(observing) / statistics.median(passes), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path)
    report = parser.parse_args().report
    text, default, openmetrics = scrapes(500, 500, "*/*"), scrapes(500, 50, "*/*"), scrapes(500, 500, OPENMETRICS)
    observing = share_of_a_pass()
    scraping = openmetrics["milliseconds_median"] / 1000 / INTERVAL_S  # what Prometheus asks for
    results = {
        "command": "python -m tests.scale.metrics --report docs/results/metrics.json",
        "scrape_text": text,
        "scrape_text_default_series": default,
        "scrape_openmetrics": openmetrics,
        "observing": observing,
        "scrape_share_of_a_core_every_15_s": round(scraping, 4),
        "share_of_worker_processor": round(observing["share_of_pass"] + scraping, 4),
    }
    print(json.dumps(results, indent=2))
    if report:
        report.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
