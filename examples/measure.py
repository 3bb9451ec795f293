"""Speed and memory of adapting a bundle's model, through the engine as the worker runs it, in one thread.

python examples/measure.py my-bundle --factory efficientnet_lite0:build --code examples --report speed.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from meta.bundle import load_bundle
from meta.imports import import_from
from worker.benchmark.throughput_engine import Case, engine_pass, forward_pass, frames_per_second
from worker.engine.engine import Engine
from worker.process import keep_freed_memory


def peak_megabytes() -> float:
    """The most resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure, print, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--factory", action="append", default=[])
    parser.add_argument("--code", type=Path, default=Path())
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    import_from(options.code)
    bundle = load_bundle(options.bundle, options.factory)
    peaks = {"loaded": peak_megabytes()}
    case = Case(bundle, 1, options.batch)
    predict = forward_pass(case)
    predict()
    peaks["predicting"] = peak_megabytes()
    adapt = engine_pass(case)
    adapt()
    peaks["adapting"] = peak_megabytes()
    speed = frames_per_second({"predict": (case, predict), "adapt": (case, adapt)}, options.repetitions)
    found = {
        "bundle": bundle.manifest.name,
        "coordinates": bundle.model.coordinates,
        "frames_in_pass": options.batch,
        "frames_per_second": speed,
        "cost_of_adapting_in_forwards": speed["predict"] / speed["adapt"],
        "state_bytes": Engine(bundle).state_bytes,
        "peak_megabytes": peaks,
    }
    text = json.dumps(found, indent=2)
    print(text)
    if options.report is not None:
        options.report.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
