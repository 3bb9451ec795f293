"""Classifiers as somebody else would write them, and images for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

LABELS = ["bolt", "nut", "washer"]
SIDE = 12


class BatchNormNet(nn.Module):
    """Takes pictures apart with `view`, and names its norm layers in another order than it runs them."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.last_norm = nn.BatchNorm1d(16)
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Linear(4 * 36, 16)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.norm(self.first(x))), 2)
        x = self.second(x.view(x.shape[0], -1))
        return self.head(self.drop(torch.relu(self.last_norm(x))))


class LayerNormNet(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 3, stride=3)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 16)
        self.out_norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(self.out_norm(F.gelu(self.mix(tokens))).amax(1))


class ChannelNorm(nn.Module):
    """Over the channels of each place of a picture, (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        deviation = torch.sqrt((x - mean).square().mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * (x - mean) / deviation + self.bias[:, None, None]


class LayerNorm2d(nn.LayerNorm):
    """The same, by torch's LayerNorm, which wants the channels last."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class RootMeanSquare(nn.Module):
    """Over tokens (B, n, C); it has no shift."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class FrozenBatchNorm2d(nn.Module):
    """As detectors have it: everything is a buffer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        factor = self.weight * torch.rsqrt(self.running_var + 1e-5)
        offset = self.bias - self.running_mean * factor
        return x * factor[:, None, None] + offset[:, None, None]


class OwnNormNet(nn.Module):
    """All but one of its norm layers are of classes of its own."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(1, 8, 3, padding=1), ChannelNorm(8)
        self.second, self.second_norm = nn.Conv2d(8, 12, 3, stride=2, padding=1), LayerNorm2d(12)
        self.third, self.frozen_norm = nn.Conv2d(12, 12, 1), FrozenBatchNorm2d(12)
        self.token_norm, self.last_norm = RootMeanSquare(12), nn.LayerNorm(12)
        self.head = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first_norm(self.first(x)))
        x = torch.relu(self.second_norm(self.second(x)))
        tokens = torch.relu(self.frozen_norm(self.third(x))).flatten(2).transpose(1, 2)
        return self.head(self.last_norm(self.token_norm(tokens).amax(1)))


def own_norm_net(classes: int = 3) -> nn.Module:
    return OwnNormNet(classes)


def batchnorm_net(classes: int = 3) -> nn.Module:
    return BatchNormNet(classes)


def ordered_net(classes: int = 3) -> nn.Module:
    """The same network, which names its norm layers as it runs them."""
    network = BatchNormNet(classes)
    last = network.last_norm
    del network.last_norm
    network.last_norm = last
    return network


def layernorm_net(classes: int = 3) -> nn.Module:
    return LayerNormNet(classes)


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (count, SIDE, SIDE) of horizontal bars, vertical bars and squares, in noise; and which, (count,)."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % len(LABELS)
    images = random.normal(60, 20, (count, SIDE, SIDE))
    for image, label in zip(images, labels, strict=True):
        row, column = random.integers(1, SIDE - 5, 2)
        height, width = ((2, 8), (8, 2), (4, 4))[label]
        image[row : row + height, column : column + width] += random.uniform(80, 140)
    return images.clip(0, 255).astype(np.uint8), labels


def write_folder(folder: Path, count: int = 150, seed: int = 0) -> Path:
    """A PNG for each picture, in a folder for each class."""
    for i, (image, label) in enumerate(zip(*pictures(count, seed), strict=True)):
        place = folder / LABELS[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i:04d}.png")
    return folder


def trained(build: Callable[[], nn.Module], steps: int = 150) -> nn.Module:
    """Trained on other pictures, to about nine in ten."""
    torch.manual_seed(0)
    network = build().train()
    images, labels = pictures(600, 1)
    frames = (torch.from_numpy(images).unsqueeze(1).float() / 255 - 0.3) / 0.2
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (64,))
        loss = F.cross_entropy(network(frames[chosen]), torch.from_numpy(labels)[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()
