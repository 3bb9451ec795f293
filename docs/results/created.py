"""Bundles for the benchmark's CIFAR-10 nets, made by `driftkeel bundle create` as anybody makes one of their own net.

python docs/results/created.py            # all three; or name some: groupnorm-cnn

Reads $DRIFTKEEL_CIFAR10, and writes build/created/NAME. The images are the quarter of those for training that trained
no net.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from meta.benchmark.datasets import open_dataset
from meta.benchmark.plan import read_benchmark
from meta.benchmark.sources import open_source
from meta.data import cache_folder

OUTPUT = Path("build/created")


def main(names: list[str]) -> None:
    """Make the bundles of the nets with these names, or of all."""
    plan = read_benchmark(Path("docs/results/accuracy.yaml"))
    dataset = open_dataset("cifar10", plan.data["cifar10"])
    OUTPUT.mkdir(parents=True, exist_ok=True)
    labels, images = OUTPUT / "labels.txt", OUTPUT / "images.npz"
    labels.write_text("\n".join(dataset.labels) + "\n", encoding="utf-8")
    for model in plan.models:
        if model.data != "cifar10" or (names and model.name not in names):
            continue
        cache = cache_folder() / "benchmark"
        unseen = open_source(model, dataset, cache, print).tuning
        np.savez(images, images=unseen.images, labels=unseen.labels)
        trained = (cache / "sources").glob(f"cifar10-{model.name}-*.safetensors")
        weights = model.weights or next(trained)
        command = ["driftkeel", "bundle", "create", "--model", model.architecture]
        command += ["--model-args", json.dumps(model.arguments), "--weights", str(weights)]
        command += ["--data", str(images), "--labels", str(labels)]
        command += [f"--mean={','.join(map(str, dataset.mean))}", f"--std={','.join(map(str, dataset.std))}"]
        subprocess.run([*command, "--output", str(OUTPUT / model.name)], check=True)  # noqa: S603 - our own command


if __name__ == "__main__":
    main(sys.argv[1:])
