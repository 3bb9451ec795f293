"""`python -m tests.scale.traffic --report docs/results/traffic.json`: the store's share of a worker's time, and bytes.

The demo's cameras at default settings, through a worker of its own between an embedded broker and store. The store
itself counts what reaches it by wire; raw are the same states' numbers in float32, for every write.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import redis

from meta.bundle import load_bundle
from meta.data import fashion_mnist
from tests.conftest import SHIPPED_BUNDLE
from worker.benchmark.throughput_worker import Bench
from worker.demo.cameras import CAMERAS, film
from worker.embedded import start_broker, start_store


def total(metrics: dict[str, float], name: str) -> float:
    """Over all labels."""
    return sum(value for key, value in metrics.items() if key.partition("{")[0] == name)


def measure(frames: int, seed: int) -> dict[str, Any]:
    data = fashion_mnist("test")
    reels = {camera.stream: film(camera, data, frames, seed).frames for camera in CAMERAS}
    sent = [(stream, reel[i]) for i in range(frames) for stream, reel in reels.items()]
    raw = sum(4 * tensor.numel() for tensor in load_bundle(SHIPPED_BUNDLE).method.fresh(1).values())
    with tempfile.TemporaryDirectory() as folder:
        broker, store = start_broker(), start_store(Path(folder))
        admin = redis.Redis(port=store.port)
        before = admin.info("stats")["total_net_input_bytes"]
        seen = Bench(broker, store, Path(folder)).run(SHIPPED_BUNDLE, sent, grown=False)
        wire = admin.info("stats")["total_net_input_bytes"] - before
        admin.close()
        broker.child.stop(0)
        store.child.stop()
    writes = total(seen.metrics, "driftkeel_state_bytes_count")
    store_seconds = total(seen.metrics, "driftkeel_store_seconds_sum")
    step_seconds = total(seen.metrics, "driftkeel_step_seconds_sum")
    return {
        "frames": len(sent),
        "seed": seed,
        "writes": int(writes),
        "store_share_of_step_time": round(store_seconds / step_seconds, 4),
        "raw_float32_bytes_per_write": raw,
        "stored_ratio": round(total(seen.metrics, "driftkeel_state_bytes_sum") / writes / raw, 4),
        "wire_ratio": round(wire / writes / raw, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.scale.traffic")
    parser.add_argument("--frames", type=int, default=3_000, help="of each camera")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    rows = []
    for seed in range(arguments.seeds):
        rows.append(measure(arguments.frames, seed))
        print(rows[-1], flush=True)
    if arguments.report:
        arguments.report.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
