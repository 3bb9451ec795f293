"""Train the example source model: an ordinary supervised classifier that knows nothing of drift."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta.data import MEAN, STD, LabelledImages


def as_frames(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Images in [0, 1], float (B, ch, h, w), standardised per channel and laid out channels-last."""
    return ((images - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)).contiguous(memory_format=torch.channels_last)


def frames_at_once(images: Tensor) -> int:
    """How many images (N, ch, h, w) of this size to pass at a time where no gradient is wanted."""
    return max(1, 400_000 // (images.shape[2] * images.shape[3]))


def image_tensor(images: np.ndarray) -> Tensor:
    """Images uint8 (N, h, w) or (N, h, w, 3) as (N, ch, h, w)."""
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
    """AdamW with a one-cycle rate, label smoothing 0.05, flips and shifts of up to two pixels.

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
def accuracy(network: nn.Module, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor) -> float:
    """Share of images (N, ch, h, w) in [0, 1] that the network labels as `labels` (N,) says."""
    right, size = 0, frames_at_once(images)
    for start in range(0, len(labels), size):
        frames = as_frames(images[start : start + size], mean, std)
        right += int((network(frames).argmax(1) == labels[start : start + size]).sum())
    return right / len(labels)
