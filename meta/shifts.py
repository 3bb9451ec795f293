"""Simulated shifts of cameras, as functions on batches of images.

A shift takes four arguments and returns images of the same shape in [0, 1]:

images (B, ch, h, w): float, in [0, 1]
severity (B,): in [0, 1], one per image
traits (4,): uniform in [0, 1), constant for a stream; how the shift looks there (direction, place, sign)
random: a generator for what differs from frame to frame

`TUNING` shifts are for training and tuning, `HELD_OUT` shifts for measurements and the demo. No shift is in both, and
none is one of the fifteen common corruptions on which the accuracy benchmark tests. The functions differ, but their
effects need not: some resemble a corruption closely (docs/science.md, "What the generator has seen").
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Shift = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]


def each_image(values: Tensor) -> Tensor:
    """One value per image (B,), shaped to be multiplied with images (B, ch, h, w)."""
    return values.view(-1, 1, 1, 1)


def fixed_random(traits: Tensor, number: float = 1.0) -> torch.Generator:
    """A generator for what is random but the same in every frame of a stream; `number` gives another one."""
    return torch.Generator().manual_seed(int(traits[0] * number * 1e6))


def _grid(images: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column coordinates in [-1, 1], (h, 1) and (1, w)."""
    height, width = images.shape[2:]
    return torch.linspace(-1, 1, height).view(-1, 1), torch.linspace(-1, 1, width).view(1, -1)


def _noise(images: Tensor, random: torch.Generator) -> Tensor:
    return torch.randn(images.shape, generator=random)


def _warp(images: Tensor, matrices: Tensor) -> Tensor:
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


# --- for training and tuning -----------------------------------------------------------------------------------


def light_level(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Gain down to 0.25 or up to 3, with a small offset."""
    gain = 1 - 0.75 * severity if traits[0] < 0.5 else 1 + 2 * severity
    return (images * each_image(gain) + each_image((traits[1] - 0.5) * 0.3 * severity)).clamp(0, 1)


def colour_cast(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Another lot or another lamp: each channel has its own gain, between 0.4 and 1.9, and bends a little."""
    channels = images.shape[1]
    wanted = torch.exp(1.3 * (traits[:3] - 0.5))[:channels].view(1, -1, 1, 1)
    bend = torch.exp(0.8 * (traits[3] - 0.5) * each_image(severity))
    return (images.clamp_min(1e-4) ** bend * (1 + each_image(severity) * (wanted - 1))).clamp(0, 1)


def gamma(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Response curve bent either way, exponent up to 3 or down to 1/3."""
    sign = 1.0 if traits[0] < 0.5 else -1.0
    return images.clamp_min(1e-4) ** each_image(torch.exp(sign * severity * math.log(3)))


def uneven_light(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Light that falls off, and stray light that comes up, across the picture in one direction."""
    rows, columns = _grid(images)
    angle = 2 * math.pi * traits[0]
    ramp = (torch.cos(angle) * columns + torch.sin(angle) * rows) / 2 + 0.5
    dark = images * (1 - 0.9 * each_image(severity) * ramp)
    return (dark + 0.6 * traits[1] * each_image(severity) * (1 - ramp)).clamp(0, 1)


def grain(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Noise of a gained-up sensor: it grows with the light (speckle), and whole rows or columns wander."""
    speckle = 1 + 0.9 * each_image(severity) * _noise(images, random)
    lines = torch.randn((len(images), 1, images.shape[2], 1), generator=random)
    if traits[0] < 0.5:
        lines = torch.randn((len(images), 1, 1, images.shape[3]), generator=random)
    return (images * speckle + 0.2 * traits[1] * each_image(severity) * lines).clamp(0, 1)


def interference(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Noise in coarse patches, different in every frame, added or in stripes."""
    height, width = images.shape[2:]
    side = 3 + int(traits[0] * height / 3)
    field = torch.randn((len(images), 1, side, side if traits[1] < 0.7 else 1), generator=random)
    patches = F.interpolate(field, (height, width), mode="bilinear", align_corners=False)
    return (images + 0.3 * each_image(severity) * patches).clamp(0, 1)


def droplets(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Wet or dirty glass: soft blobs of one grey level, elsewhere in every frame."""
    height, width = images.shape[2:]
    field = torch.randn((len(images), 1, max(1, height // 3), max(1, width // 3)), generator=random)
    smooth = F.interpolate(field, (height, width), mode="bicubic", align_corners=False)
    cover = torch.sigmoid(8 * (smooth - 2.2 + 1.6 * each_image(severity))) * each_image(severity).sqrt()
    return images + cover * (traits[0] - images)


def gaussian_blur(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Gaussian blur, sigma up to 7% of the width, possibly stretched along one axis."""
    width = images.shape[3]
    taps = torch.arange(-(width // 5), width // 5 + 1)
    stretch = 0.3 + 0.7 * traits[0]
    for axis, factor in ((2, 1.0 if traits[1] < 0.5 else stretch), (3, stretch if traits[1] < 0.5 else 1.0)):
        sigma = (0.07 * width * severity * factor).clamp_min(0.05).view(-1, 1)
        kernel = torch.exp(-0.5 * (taps / sigma) ** 2)
        kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(images.shape[1], 0)
        shape = (-1, 1, len(taps), 1) if axis == 2 else (-1, 1, 1, len(taps))
        pad = (0, 0, width // 5, width // 5) if axis == 2 else (width // 5, width // 5, 0, 0)
        flat = F.pad(images, pad, mode="replicate").flatten(0, 1)[None]
        images = F.conv2d(flat, kernel.view(shape), groups=flat.shape[1]).view(images.shape)
    return images


def occlusion(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """A bar of one grey level over part of the picture, up to 45% of it."""
    rows, columns = _grid(images)
    across = rows if traits[0] < 0.5 else columns
    middle = 1.6 * traits[1] - 0.8
    covered = (across - middle).abs() < 0.45 * each_image(severity)
    return torch.where(covered, traits[2].expand(()), images)


def dead_pixels(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Pixels stuck at black or white, the same ones in every frame, up to 30%."""
    field = torch.rand(images.shape[2:], generator=fixed_random(traits))
    stuck = field < 0.3 * each_image(severity)
    return torch.where(stuck, (field * 1e4 % 1 < traits[1]).float(), images)


def zoom_and_shift(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """The camera moved: magnified or shrunk by up to 35%, and displaced by up to 20%."""
    scale = torch.exp((2 * traits[0] - 1) * 0.35 * severity)
    matrices = torch.zeros(len(images), 2, 3)
    matrices[:, 0, 0] = matrices[:, 1, 1] = scale
    matrices[:, 0, 2] = 0.4 * (2 * traits[1] - 1) * severity
    matrices[:, 1, 2] = 0.4 * (2 * traits[2] - 1) * severity
    return _warp(images, matrices)


def ghost(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """A second, displaced and paler copy: a reflection, or a shaking mount."""
    reach = 0.18 * images.shape[3]
    down, right = round(float(reach * (2 * traits[0] - 1))), round(float(reach * (2 * traits[1] - 1)))
    copy = torch.roll(images, (down, right), (2, 3))
    return images + 0.55 * each_image(severity) * (copy - images)


def low_resolution(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """A starved video link: smooth loss of detail and few grey levels."""
    height, width = images.shape[2:]
    small = F.interpolate(images, (max(4, height // 3), max(4, width // 3)), mode="bilinear", antialias=True)
    smooth = F.interpolate(small, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)
    levels = 3 + 40 * (1 - each_image(severity))
    return torch.round((images + each_image(severity) * (smooth - images)) * levels) / levels


# --- held out ----------------------------------------------------------------------------------------------------


def light_failing(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """A lamp dies: dim, falling off from the middle, on a sensor whose own noise and black level then show."""
    rows, columns = _grid(images)
    vignette = torch.exp(-1.5 * each_image(severity) * (rows**2 + columns**2))
    dim = images * vignette * each_image(1 - 0.85 * severity)
    return (dim + each_image(severity) * (0.06 + 0.05 * _noise(images, random))).clamp(0, 1)


def focus_loss(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Defocus: a disc for a kernel, radius up to 9% of the width."""
    width = images.shape[3]
    reach = max(1, round(0.09 * width))
    offsets = torch.arange(-reach, reach + 1)
    distance = torch.sqrt(offsets.view(-1, 1) ** 2 + offsets.view(1, -1) ** 2.0)
    kernels = (each_image(0.09 * width * severity)[:, 0] + 0.5 - distance).clamp(0, 1)
    kernels = (kernels / kernels.sum((1, 2), keepdim=True)).repeat_interleave(images.shape[1], 0)
    flat = F.pad(images, (reach,) * 4, mode="replicate").flatten(0, 1)[None]
    return F.conv2d(flat, kernels.unsqueeze(1), groups=flat.shape[1]).view(images.shape)


def shot_noise(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Fewer photons: Poisson noise down to six at full scale, plus some read noise."""
    photons = each_image(torch.exp(math.log(6) * severity + math.log(2_000) * (1 - severity)))
    caught = torch.poisson(images * photons, generator=random) / photons
    return (caught + 0.12 * each_image(severity) * _noise(images, random)).clamp(0, 1)


def haze(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Airlight: a bright veil, denser on one side and slowly uneven, over the scene."""
    rows, columns = _grid(images)
    angle = 2 * math.pi * traits[0]
    depth = 1 + 0.4 * (torch.cos(angle) * columns + torch.sin(angle) * rows)
    depth = depth + 0.15 * torch.sin(3 * columns + 6 * traits[1]) * torch.cos(2 * rows + 6 * traits[2])
    passed = torch.exp(-1.8 * each_image(severity) * depth)
    return images * passed + (0.75 + 0.2 * traits[3]) * (1 - passed)


def tilt(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """A mount that gives: rotation up to 30 degrees, some shear, and a corner in shadow."""
    angle = severity * math.radians(30) * (1 if traits[0] < 0.5 else -1)
    shear = 0.25 * severity * (2 * traits[1] - 1)
    matrices = torch.zeros(len(images), 2, 3)
    matrices[:, 0, 0], matrices[:, 0, 1] = torch.cos(angle), -torch.sin(angle) + shear
    matrices[:, 1, 0], matrices[:, 1, 1] = torch.sin(angle), torch.cos(angle)
    rows, columns = _grid(images)
    shadow = 1 - 0.5 * each_image(severity) * ((rows + columns) / 2).clamp_min(0)
    return _warp(images, matrices) * shadow


TUNING: dict[str, Shift] = {
    shift.__name__: shift
    for shift in (
        *(light_level, colour_cast, gamma, uneven_light, grain, interference, droplets, gaussian_blur, ghost),
        *(occlusion, dead_pixels, zoom_and_shift, low_resolution),
    )
}
HELD_OUT: dict[str, Shift] = {shift.__name__: shift for shift in (light_failing, focus_loss, shot_noise, haze, tilt)}
