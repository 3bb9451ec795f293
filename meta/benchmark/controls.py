"""Control experiments for other explanations of a gain.

`train_on_shifts`: is it adaptation, or the labels and shifts that meta-training has seen? `without_memory`: is it the
gradient memory, or the paths beside it? The control for the class filter is `meta.baselines.filtered`.
"""

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
    """Fine-tune a network in place, with labels, under the simulated shifts of meta-training.

    64 frames per step from cameras like those of meta-training. AdamW with one-cycle learning rate and label smoothing
    0.05, as for source models. Deterministic for a seed on one machine.
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
    """A copy of the method, without new training, whose rule gets nothing from its gradient memory.

    Raises BundleError for the paper's generator, which has no other input.
    """
    if not isinstance(method, MGG):
        raise BundleError("generators: memory: false is for generators of ours; the paper's has nothing else")
    cut = copy.copy(method)
    cut.learned = copy.deepcopy(method.learned)
    with torch.no_grad():
        cut.learned.rule.output.zero_()
    return cut
