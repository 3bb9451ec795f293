"""Controls: what else could explain a gain. Adaptation itself, or the labels and shifts that meta-training saw; the
gradient memory, or the paths beside it. The class filter's control is `meta.baselines.filtered`."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from meta.data import LabelledImages
from meta.mgg import MGG
from meta.paper import PaperMGG
from meta.shifts import TUNING
from meta.simulate import SimulatedStream
from meta.source import Preprocessing, image_tensor
from meta.train import draw
from schemas.errors import BundleError

CAMERAS, FRAMES = 16, 4  # simulated cameras, and frames of each in one step
PEAK_RATE = 1.5e-3


def train_on_shifts(
    network: nn.Module,
    data: LabelledImages,
    steps: int,
    seed: int,
    preprocessing: Preprocessing,
    say: Callable[[str], None],
) -> None:
    """Train a network on, in place, with labels, under the simulated shifts that meta-training sees.

    64 frames a step from cameras like those of meta-training; AdamW with a one-cycle rate and label smoothing 0.05, as
    source models are trained. The same every time for a seed on one machine.
    """
    random = torch.Generator().manual_seed(seed)
    images, labels = image_tensor(data.images), torch.from_numpy(data.labels)
    cameras = [SimulatedStream(images, labels, TUNING, random) for _ in range(CAMERAS)]
    network.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    every, total = max(1, steps // 5), 0.0
    for step in range(1, steps + 1):
        for camera in cameras:
            if camera.over:
                camera.begin()
        frames, truth, _ = draw(cameras, FRAMES, preprocessing)
        loss = F.cross_entropy(network(frames), truth, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += float(loss.detach())
        if step % every == 0:
            say(f"source model under simulated shifts: step {step}/{steps}, loss {total / every:.3f}")
            total = 0.0
    network.eval()


def without_memory(method: MGG | PaperMGG) -> MGG:
    """The same method, whose rule reads nothing from its gradient memory; nothing is trained anew.

    Raises BundleError for the paper's generator, which has nothing but its memory.
    """
    if not isinstance(method, MGG):
        raise BundleError("generators: memory: false is for generators of ours; the paper's has nothing else")
    cut = copy.copy(method)
    cut.learned = copy.deepcopy(method.learned)
    with torch.no_grad():
        cut.learned.rule.output.zero_()
    return cut
