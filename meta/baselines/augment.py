"""The augmentations of CoTTA, for RoTTA and ROID too: colour jitter, a small affine move, a mirror.

After Wang et al., CVPR 2022: brightness 0.6-1.4, contrast 0.7-1.3, saturation 0.5-1.5, gamma 0.7-1.3, rotation up to
15 degrees, displacement up to 1/16, scale 0.9-1.1, mirrored half of the time. What differs from the published codes:

- They pad images to twice their side before they move them by 1/16 of it, which is 1/8 of the image.
- Changes of hue are left out, and so are blur up to 0.5 pixels and noise of 0.005, which CoTTA and RoTTA have.
- They change brightness, contrast, saturation and gamma in a random order; here the order is fixed.
- ROID reflects images at their border. Here pixels of the border are repeated, as in CoTTA and RoTTA.
- They draw once for all images of a batch; here each image has a draw of its own.
- Grey is the plain mean of the colours here; theirs weights them by luminance.

Only the effect of drawing once for a batch was measured (docs/benchmark.md).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from meta.baselines.base import uniforms

NUMBERS = 9  # random numbers per frame: four of colour, five of the affine map


def augmented(frames: Tensor, mean: Tensor, std: Tensor, keys: Tensor) -> Tensor:
    """Augmented copies of standardised frames (B, ch, h, w), standardised again; `keys` (B,) as in `uniforms`."""
    chance = uniforms(keys, NUMBERS)
    images = (frames * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)).clamp(0, 1)
    images = _moved(_jittered(images, chance[:, :4]), chance[:, 4:])
    return (images.clamp(0, 1) - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def _between(low: float, high: float, chance: Tensor) -> Tensor:
    return (low + (high - low) * chance).view(-1, 1, 1, 1)


def _jittered(images: Tensor, chance: Tensor) -> Tensor:
    images = (images * _between(0.6, 1.4, chance[:, 0])).clamp(0, 1)
    grey = images.mean(1, keepdim=True)
    centre = grey.mean((2, 3), keepdim=True)
    images = (centre + (images - centre) * _between(0.7, 1.3, chance[:, 1])).clamp(0, 1)
    if images.shape[1] == 3:
        grey = images.mean(1, keepdim=True)
        images = (grey + (images - grey) * _between(0.5, 1.5, chance[:, 2])).clamp(0, 1)
    return images.clamp_min(1e-4) ** _between(0.7, 1.3, chance[:, 3])


def _moved(images: Tensor, chance: Tensor) -> Tensor:
    angle = math.radians(15) * (2 * chance[:, 0] - 1)
    scale = 1 / (0.9 + 0.2 * chance[:, 1])
    mirror = torch.where(chance[:, 2] < 0.5, -1.0, 1.0)
    matrices = images.new_zeros(len(images), 2, 3)
    matrices[:, 0, 0], matrices[:, 0, 1] = scale * torch.cos(angle) * mirror, -scale * torch.sin(angle)
    matrices[:, 1, 0], matrices[:, 1, 1] = scale * torch.sin(angle) * mirror, scale * torch.cos(angle)
    matrices[:, :, 2] = (2 * chance[:, 3:5] - 1) / 8  # of a width of 2: one sixteenth
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
