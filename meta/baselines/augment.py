"""The augmentations of CoTTA, for RoTTA and ROID too: colour jitter, a small affine move, a mirror.

After Wang et al., CVPR 2022: brightness 0.6-1.4, contrast 0.7-1.3, saturation 0.5-1.5, gamma 0.7-1.3, rotation up to
15 degrees, displacement up to 1/16, scale 0.9-1.1, mirrored half of the time. What differs from the published codes:

- They pad pictures to twice their side before they move them by 1/16, which is 1/8 of the picture.
- Hue is left out, and of CoTTA's and RoTTA's also blur up to 0.5 pixels and noise of 0.005. ROID's has neither.
- They draw once for all pictures of a batch; here each picture has a draw of its own.
- They jitter in an order of chance; here brightness comes first, then contrast, saturation and gamma.
- Grey is the plain mean of the colours here; there green counts most, as to the eye.
- ROID's reflects pictures at their border. Here pixels there are repeated, as CoTTA's and RoTTA's do.

What any of it would do to the three was not measured.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from meta.baselines.base import uniforms

NUMBERS = 9


def augmented(frames: Tensor, mean: Tensor, std: Tensor, keys: Tensor) -> Tensor:
    """Standardised frames (B, ch, h, w), changed as `keys` (B,) int64 decide and standardised again."""
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
