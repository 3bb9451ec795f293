"""What one step of adaptation costs, against the model's own work on the same frames.

python docs/results/step.py docs/results/step.json

For the nets of the three example bundles and for an untrained net of ResNet-18's size with either kind of
normalisation, one thread, all taking turns. Those with BatchNorm and LayerNorm have the correction of single frames.
`generator` is the meta gradient generator for all coordinates of all streams, from their gradients to their next
parameters; `step` is all that a site does with a pass: answers, gradient of every fourth frame, generator.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta.benchmark.report import commit
from meta.bundle import load_bundle
from meta.correction import Correction
from meta.learned import GeneratorSettings, LearnedOptimizer
from meta.mgg import MGG
from meta.norms import AdaptableModel
from meta.objective import entropy, feature_statistics
from worker.process import keep_freed_memory

BUNDLES = {"example": "fashion-mnist", "batchnorm": "fashion-mnist-batchnorm", "transformer": "fashion-mnist-vit"}
SIZES = {(1, 16): 201, (4, 16): 101, (64, 4): 51}  # streams, frames of each: repetitions
LARGE = {(1, 16): 9}
GROUP = 32  # groups a layer (Wu and He, ECCV 2018)


class Block(nn.Module):
    """Two 3x3 convolutions with norm layers beside a shortcut (He et al., CVPR 2016)."""

    def __init__(self, before: int, width: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.first_norm = norm(width)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.second_norm = norm(width)
        self.shortcut = nn.Sequential()
        if (before, stride) != (width, 1):
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), norm(width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(out)) + self.shortcut(x))


def resnet18(norm: Callable[[int], nn.Module], classes: int = 1000) -> nn.Sequential:
    """1.8 billion multiply-adds on 224 x 224 pixels, 9,600 coordinates."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), norm(64), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    before = 64
    for width in (64, 128, 256, 512):
        layers += [Block(before, width, 1 if width == 64 else 2, norm), Block(width, width, 1, norm)]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def group_norm(width: int) -> nn.Module:
    """As many groups as Wu and He have."""
    return nn.GroupNorm(GROUP, width)


def untrained(network: nn.Module, frames: Tensor, corrected: bool) -> MGG:
    """A method for it that has learned nothing: for its speed. `corrected`: with a correction that changes nothing."""
    model = AdaptableModel(network)
    model.fit_layout(frames)
    if corrected:
        filled = {"deviation": torch.ones, "spread": torch.ones}
        shapes = Correction.shapes(model.feature_count).items()
        model.correction = Correction(**{name: filled.get(name, torch.zeros)(shape) for name, shape in shapes})
    with torch.no_grad():
        source = feature_statistics(model.forward_with_features(frames)[1])
    return MGG(model, source, LearnedOptimizer(GeneratorSettings(), model).eval(), 1000).for_site(1.0)


def parts(method: MGG, frames: Tensor, streams: int) -> dict[str, Callable[[], Any]]:
    """What is timed."""
    state, stream = method.fresh(streams), torch.arange(streams).repeat_interleave(len(frames) // streams)
    forward = method.predict(frames, stream, state)
    gradient, moved, signals = method.gradient(forward)
    affine = method.model.source_affine.expand(len(frames), -1).clone().requires_grad_()

    def predict() -> None:
        with torch.inference_mode():
            method.model(frames)

    def backward() -> None:
        logits, _ = method.model.forward_with_features(frames, affine)
        torch.autograd.grad(entropy(logits).sum(), affine)

    def generate() -> None:
        with torch.inference_mode():
            method.generate(forward, gradient, moved, signals)

    def step() -> None:
        method.update(method.serve(frames, stream, state))

    return {"forward": predict, "forward_and_backward": backward, "generator": generate, "step": step}


def measured(method: MGG, frames: Tensor, streams: int, rounds: int) -> dict[str, float]:
    """Medians in milliseconds, and what is made of them."""
    timed = parts(method, frames, streams)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(rounds + 2):
        for name, run in timed.items():
            started = time.perf_counter()
            run()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - started)
    ms = {f"{name}_ms": 1000 * statistics.median(values) for name, values in seconds.items()}
    return {
        "coordinates": method.model.coordinates,
        **ms,
        "generator_over_forward_and_backward": ms["generator_ms"] / ms["forward_and_backward_ms"],
        "step_over_forward": ms["step_ms"] / ms["forward_ms"],
    }


def main(report: Path) -> None:
    """Measure all cases and write the report."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    found: dict[str, Any] = {"commit": commit()}

    def measure(name: str, method: MGG, shape: tuple[int, ...], sizes: dict[tuple[int, int], int]) -> None:
        for (streams, each), rounds in sizes.items():
            case = f"{name}, {streams} x {each}"
            found[case] = measured(method, torch.randn(streams * each, *shape), streams, rounds)
            print(case, json.dumps(found[case], indent=1))  # noqa: T201

    for name, folder in BUNDLES.items():
        method = load_bundle(Path("bundles") / folder).method
        assert isinstance(method, MGG)  # noqa: S101 - its manifest says so
        measure(name, method.for_site(1.0), (1, 28, 28), SIZES)
    few = torch.randn(4, 3, 224, 224)
    measure("resnet18", untrained(resnet18(group_norm), few, corrected=False), few.shape[1:], LARGE)
    measure("resnet18 batchnorm", untrained(resnet18(nn.BatchNorm2d), few, corrected=True), few.shape[1:], LARGE)
    report.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
