"""The example's source model, an ordinary supervised classifier, and the images that it is trained and tested on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta.data import MEAN, STD, LabelledImages
from schemas.bundle import Preprocess


def as_frames(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Images in [0, 1], float (B, ch, h, w), standardised per channel and laid out channels-last."""
    return ((images - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Preprocessing:
    """The standardisation of frames: mean and standard deviation (ch,) of images in [0, 1]."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, preprocess: Preprocess) -> Preprocessing:
        """That of a bundle's manifest."""
        return cls(torch.tensor(preprocess.mean), torch.tensor(preprocess.std))

    def frames(self, images: Tensor) -> Tensor:
        """Standardised frames of images (B, ch, h, w), uint8 or float in [0, 1]."""
        return as_frames(images.float() / 255 if images.dtype == torch.uint8 else images, self.mean, self.std)


def frames_at_once(images: Tensor) -> int:
    """The batch size for images (N, ch, h, w) in passes without a gradient."""
    return max(1, 400_000 // (images.shape[2] * images.shape[3]))


def image_tensor(images: np.ndarray) -> Tensor:
    """Images uint8 (N, h, w) or (N, h, w, 3) as (N, ch, h, w), copied."""
    tensor = torch.from_numpy(images.copy())
    return tensor.unsqueeze(1) if tensor.dim() == 3 else tensor.permute(0, 3, 1, 2)


def train_source(
    network: nn.Module,
    data: LabelledImages,
    epochs: int,
    seed: int,
    batch: int = 128,
    peak_rate: float = 4e-3,
    say: Callable[[str], None] = print,
    mean: Sequence[float] = (MEAN,),
    std: Sequence[float] = (STD,),
) -> nn.Module:
    """Train in place with AdamW, one-cycle learning rate, label smoothing 0.05, flips, and shifts of up to two pixels.

    mean and std, per channel, are those of the training images in [0, 1].
    """
    random = torch.Generator().manual_seed(seed)
    images, labels = image_tensor(data.images), torch.from_numpy(data.labels)
    channel_mean, channel_std = torch.tensor(mean), torch.tensor(std)
    network = network.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=peak_rate, weight_decay=0.02)
    steps = len(labels) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=epochs * steps)
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=random)
        total = 0.0
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            frames = as_frames(_augmented(images[chosen].float() / 255, random), channel_mean, channel_std)
            loss = F.cross_entropy(network(frames), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        say(f"source model: epoch {epoch + 1}/{epochs}, loss {total / steps:.3f}")
    return network.eval()


def _augmented(images: Tensor, random: torch.Generator) -> Tensor:
    if torch.rand((), generator=random) < 0.5:
        images = images.flip(3)
    down, right = (int(v) for v in torch.randint(0, 5, (2,), generator=random))
    return F.pad(images, (2, 2, 2, 2))[:, :, down : down + images.shape[2], right : right + images.shape[3]]


@torch.inference_mode()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor, preprocessing: Preprocessing) -> float:
    """The share of images uint8 (N, ch, h, w) whose predicted class is that of `labels` (N,)."""
    size = frames_at_once(images)
    right = [
        int((network(preprocessing.frames(part)).argmax(1) == truth).sum())
        for part, truth in zip(images.split(size), labels.split(size), strict=True)
    ]
    return sum(right) / len(labels)
