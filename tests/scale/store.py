"""`python -m tests.scale.store --report docs/results/store.json`: bytes and milliseconds of state writes."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import redis
import torch

from meta.bundle import load_bundle
from schemas.config import Store
from schemas.state_tensors import encode_tensors
from tests.conftest import SHIPPED_BUNDLE
from worker.embedded import start_store
from worker.store.compress import Compression, pack
from worker.store.store import StateStore, Write

HEADER, EVENT = b"h" * 450, b"e" * 1_050  # as long as the demo's
ROUNDS = 60


def a_state(coordinates: int) -> dict[str, torch.Tensor]:
    """Tensors as the shipped method keeps them after updates: numbers that look like noise, memory in float16."""
    torch.manual_seed(0)
    like = load_bundle(SHIPPED_BUNDLE).method.fresh(1)
    shipped = like["affine"].shape[1]

    def sized(tensor: torch.Tensor) -> torch.Tensor:
        shape = [coordinates if n == shipped else n for n in tensor.shape[1:]]
        return torch.randn(shape).to(tensor.dtype)

    return {name: sized(tensor) for name, tensor in like.items()}


class Neighbour:
    """Another client's round trips meanwhile, in milliseconds: does a large write hold it up?"""

    def __init__(self, port: int) -> None:
        self._client, self._stop = redis.Redis(port=port), threading.Event()
        self.times: list[float] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.001):
            began = time.perf_counter()
            self._client.ping()
            self.times.append(1_000 * (time.perf_counter() - began))

    def stop(self) -> float:
        self._stop.set()
        self._thread.join()
        self._client.close()
        return statistics.quantiles(self.times, n=100)[98]


def measure(coordinates: int, compression: Compression) -> dict[str, Any]:
    tensors = a_state(coordinates)
    raw = sum(4 * tensor.numel() for tensor in tensors.values())
    content = encode_tensors(tensors, 1)
    with tempfile.TemporaryDirectory() as folder:
        server = start_store(Path(folder))
        store = StateStore(Store(url=server.url))
        store.claim(["cam"], "w")
        admin = redis.Redis(port=server.port)
        before = admin.info("stats")["total_net_input_bytes"]
        neighbour = Neighbour(server.port)
        packing, writing = [], []
        for number in range(1, ROUNDS + 1):
            began = time.perf_counter()
            packed = pack(content, compression)
            packing.append(time.perf_counter() - began)
            assert store.write([Write("cam", 1, number, HEADER, EVENT, packed)]) == [True]
            writing.append(time.perf_counter() - began - packing[-1])
        held_up = neighbour.stop()
        pings = 14 * len(neighbour.times)
        sent = (admin.info("stats")["total_net_input_bytes"] - before - pings) / ROUNDS
        began = time.perf_counter()
        store.read("cam")
        loading = time.perf_counter() - began
        store.close()
        admin.close()
        server.child.stop()
    return {
        "coordinates": coordinates,
        "compression": compression,
        "raw_float32_bytes": raw,
        "stored_bytes": len(packed),
        "stored_ratio": round(len(packed) / raw, 3),
        "wire_ratio": round(sent / raw, 3),  # header, update event and script included
        "pack_ms": round(1_000 * statistics.median(packing), 2),
        "write_ms": round(1_000 * statistics.median(writing), 2),
        "load_ms": round(1_000 * loading, 2),
        "neighbour_p99_ms": round(held_up, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.scale.store")
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    rows = []
    choices: tuple[Compression, ...] = ("none", "deflate")
    for coordinates in (448, 5_000, 50_000, 200_000):
        for compression in choices:
            rows.append(measure(coordinates, compression))
            print(rows[-1], flush=True)
    if arguments.report:
        arguments.report.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
