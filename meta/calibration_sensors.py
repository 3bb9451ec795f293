"""Simulated shifts for the accuracy estimate alone: those of sensors, video links and automatic controls.

`meta.calibration_shifts` has those of the scene and the optics, and the rule that both follow.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meta.shifts import each_image, fixed_random

BAYER = ((0, 8, 2, 10), (12, 4, 14, 6), (3, 11, 1, 9), (15, 7, 13, 5))
TILES = 4  # along each side


def equalised(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Automatic contrast, frame by frame: grey levels become their ranks, through a curve."""
    flat = images.flatten(1)
    ranks = (flat.argsort(1).argsort(1).float() / flat.shape[1]) ** (0.5 + 1.2 * traits[0])
    return images + each_image(severity) * (ranks.view_as(images) - images)


def outlines(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Only edges come through, dark or on grey."""
    detail = images - F.avg_pool2d(F.pad(images, (1,) * 4, mode="replicate"), 3, 1)
    edges = 4 * detail.abs() if traits[0] < 0.5 else 0.5 + 2 * detail
    return images + each_image(severity) * (edges.clamp(0, 1) - images)


def dithered(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """One bit per pixel, by an ordered pattern (Bayer, 1973)."""
    height, width = images.shape[2:]
    level = (torch.tensor(BAYER) + 0.5) / 16
    tiled = level.repeat(height // 4 + 1, width // 4 + 1)[:height, :width]
    return images + each_image(severity) * ((images > tiled).float() - images)


def fixed_pattern(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Columns or rows of a sensor have gains and offsets of their own, the same in every frame."""
    height, width = images.shape[2:]
    shape = (1, 1, 1, width) if traits[1] < 0.5 else (1, 1, height, 1)
    gain, offset = (torch.randn(shape, generator=fixed_random(traits, number)) for number in (1.0, 0.7))
    return (images * (1 + 0.6 * each_image(severity) * gain) + 0.15 * each_image(severity) * offset).clamp(0, 1)


def smear(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Charge runs over: bright parts leave trails along columns or rows."""
    trail = images.mean(2 if traits[0] < 0.5 else 3, keepdim=True)
    return (images + (0.7 + traits[1]) * each_image(severity) * trail).clamp(0, 1)


def ringing(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """A sharp cut in frequency, along one axis or both: detail is lost and edges echo."""
    height, width = images.shape[2:]
    down, across = torch.fft.fftfreq(height).abs().view(-1, 1), torch.fft.fftfreq(width).abs().view(1, -1)
    reach = torch.maximum(down * (traits[0] < 0.7), across * (traits[0] > 0.3))
    kept = reach <= 0.5 - 0.42 * each_image(severity)
    return torch.fft.ifft2(torch.fft.fft2(images) * kept).real.clamp(0, 1)


def middle_value(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """A filter against noise that is set too strong: medians over small windows."""
    side = 3 if traits[0] < 0.4 else 5
    padded = F.pad(images, (side // 2,) * 4, mode="replicate")
    medians = padded.unfold(2, side, 1).unfold(3, side, 1).flatten(4).median(4).values
    return images + each_image(severity) * (medians - images)


def exchanged(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Blocks arrive in the wrong order: up to three pairs of tiles change places, the same ones in every frame."""
    height, width = images.shape[2] // TILES, images.shape[3] // TILES
    order = torch.randperm(TILES * TILES, generator=fixed_random(traits)).tolist()
    made = images.clone()
    for number in range(3):
        first, second = (_tile(place, height, width) for place in order[2 * number : 2 * number + 2])
        hit = each_image(severity >= 0.375 * (number + 1))
        made[first] = torch.where(hit, images[second], images[first])
        made[second] = torch.where(hit, images[first], images[second])
    return made


def _tile(place: int, height: int, width: int) -> tuple[Any, ...]:
    top, left = place // TILES * height, place % TILES * width
    return ..., slice(top, top + height), slice(left, left + width)


def hunting(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """An exposure that hunts: every frame has a gain and a black level of its own."""
    gain, black = torch.randn((2, len(images), 1, 1, 1), generator=random)
    return (images * torch.exp(1.4 * each_image(severity) * gain) + 0.25 * each_image(severity) * black).clamp(0, 1)


SENSORS = (equalised, outlines, dithered, fixed_pattern, smear, ringing, middle_value, exchanged, hunting)
