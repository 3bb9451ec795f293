"""More simulated shifts, for the accuracy estimate alone. No generator was trained and no result measured on them.

The relation of confidence and accuracy differs from shift to shift, so the estimate's calibration needs many shifts.
They have the form of those in `meta.shifts`, and follow the same rule: none is a held-out shift or one of the fifteen
common corruptions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from meta.calibration_sensors import SENSORS
from meta.shifts import TUNING, Shift, each_image, fixed_random


def _grid(images: Tensor) -> tuple[Tensor, Tensor]:
    """The coordinates x and y of each pixel, in [-1, 1], (B, h, w) each."""
    count, _, height, width = images.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return x.expand(count, -1, -1), y.expand(count, -1, -1)


def _looked_up(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The images with each pixel taken from the coordinates x and y (B, h, w)."""
    return F.grid_sample(images, torch.stack([x, y], 3), padding_mode="border", align_corners=True)


# --- geometry ------------------------------------------------------------------------------------------------------


def wobble(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """A rolling shutter on a machine that shakes: rows displaced along a wave, another one in every frame."""
    x, y = _grid(images)
    phase = 2 * math.pi * torch.rand(len(images), 1, 1, generator=random)
    wave = torch.sin(math.pi * (1 + 3 * traits[0]) * y + phase)
    return _looked_up(images, x + 0.3 * severity.view(-1, 1, 1) * wave, y)


def squeeze(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """A wrong aspect: one axis shrunk or stretched by up to 45%."""
    x, y = _grid(images)
    factor = torch.exp((0.45 if traits[0] < 0.5 else -0.45) * severity).view(-1, 1, 1)
    return _looked_up(images, x * factor, y) if traits[1] < 0.5 else _looked_up(images, x, y * factor)


def keystone(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Seen from one side: what is far gets narrower."""
    x, y = _grid(images)
    bend = 0.7 * severity.view(-1, 1, 1) * (1 if traits[0] < 0.5 else -1)
    return _looked_up(images, x * (1 + bend * y), y) if traits[1] < 0.5 else _looked_up(images, x, y * (1 + bend * x))


def lens(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Barrel or pincushion distortion."""
    x, y = _grid(images)
    bend = severity.view(-1, 1, 1) * (0.7 if traits[0] < 0.5 else -0.4)
    factor = 1 + bend * (x**2 + y**2)
    return _looked_up(images, x * factor, y * factor)


def jitter(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Items lie anywhere: every frame displaced by up to a quarter of its size."""
    x, y = _grid(images)
    moves = 0.5 * severity.view(-1, 1, 1, 1) * (2 * torch.rand(len(images), 2, 1, 1, generator=random) - 1)
    return _looked_up(images, x + moves[:, 0], y + moves[:, 1])


def swirl(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Water or old glass: turned around one place, the more the nearer."""
    x, y = _grid(images)
    middle_x, middle_y = (traits[:2] - 0.5).tolist()
    across, down = x - middle_x, y - middle_y
    turn = (2 if traits[2] < 0.5 else -2) * severity.view(-1, 1, 1) * torch.exp(-2 * (across**2 + down**2))
    new_x, new_y = across * turn.cos() - down * turn.sin(), across * turn.sin() + down * turn.cos()
    return _looked_up(images, middle_x + new_x, middle_y + new_y)


def seam(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Two sensors that do not match: one half of the picture is displaced along the seam."""
    x, y = _grid(images)
    step = 0.7 * severity.view(-1, 1, 1) * (1 if traits[0] < 0.5 else -1)
    if traits[2] < 0.5:
        return _looked_up(images, x, y + step * (x > 0.6 * (traits[1] - 0.5)))
    return _looked_up(images, x + step * (y > 0), y)


def mirrored(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """A mirror beside the item: one side, up to half of the picture, shows the other's image."""
    x, y = _grid(images)
    side, edge = 1 if traits[0] < 0.5 else -1, 0.9 - 0.9 * severity.view(-1, 1, 1)
    return _looked_up(images, side * torch.where(side * x > edge, 2 * edge - side * x, side * x), y)


def far_and_near(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Items at any distance: every frame has a magnification of its own."""
    x, y = _grid(images)
    power = 2 * torch.rand(len(images), generator=random) - 1 + 0.8 * (traits[0] - 0.5)
    factor = torch.exp(0.6 * severity * power).view(-1, 1, 1)
    return _looked_up(images, x * factor, y * factor)


# --- in front of the lens --------------------------------------------------------------------------------------------


def scratches(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Thin lines across the glass, the same ones in every frame."""
    x, y = _grid(images[:1])
    fixed, field = fixed_random(traits), torch.full_like(x, math.inf)
    for _ in range(5):
        angle, offset = (torch.rand(2, generator=fixed) * torch.tensor([math.pi, 1.6])).tolist()
        field = torch.minimum(field, (math.cos(angle) * x + math.sin(angle) * y - offset + 0.8).abs())
    return torch.where(field.unsqueeze(1) < 0.1 * each_image(severity), traits[1].expand(()), images)


def covers(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """A square somewhere else in every frame hides up to a third of it: hands, chips, flies."""
    x, y = _grid(images)
    middle = 2 * torch.rand(len(images), 2, 1, 1, generator=random) - 1
    side = (0.6 * severity).view(-1, 1, 1)
    hidden = ((x - middle[:, 0]).abs() < side) & ((y - middle[:, 1]).abs() < side)
    return torch.where(hidden.unsqueeze(1), traits[0].expand(()), images)


def window_frame(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """The edges of a housing in the picture: a border of one grey level."""
    x, y = _grid(images)
    inside = torch.maximum(x.abs(), y.abs()).unsqueeze(1) < 1 - 0.5 * each_image(severity)
    return torch.where(inside, images, 0.8 * traits[0])


def overlap(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Items lie on each other: another frame's shows through."""
    other = images.roll(1, 0)
    mixed = torch.maximum(images, other) if traits[0] < 0.5 else (images + other) / 2
    return images + 0.6 * each_image(severity) * (mixed - images)


def background(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Another belt: what was dark has a texture that stays put."""
    side = 2 + int(traits[1] * 8)
    coarse = torch.rand((1, 1, side, side), generator=fixed_random(traits))
    texture = F.interpolate(coarse, images.shape[2:], mode="bilinear", align_corners=False)
    return torch.maximum(images, 0.6 * each_image(severity) * texture)


def crowded(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """A neighbour reaches into the picture from one side, before or behind the item."""
    x, y = _grid(images)
    along, axis = (x, 3) if traits[0] < 0.5 else (y, 2)
    other = images.roll(1, 0).roll(images.shape[axis] // 2, axis)
    inside = along < 1 - 1.1 * severity.view(-1, 1, 1)
    return torch.where(inside.unsqueeze(1), images, torch.maximum(images * (traits[1] < 0.5), other))


def mesh(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """A grille before the lens: regular wires of one grey level."""
    height, width = images.shape[2:]
    period = max(3, int(height * (0.12 + 0.2 * float(traits[0]))))
    rows, columns = torch.arange(height).view(-1, 1), torch.arange(width).view(1, -1)
    wires = torch.minimum(rows % period, columns % period) < 1 + period // 5
    return images + each_image(severity) * wires * (traits[1] - images)


def stain(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Large soft stains on the glass that stay put."""
    side = 3 + int(traits[0] * 3)
    coarse = torch.randn((1, 1, side, side), generator=fixed_random(traits))
    smooth = F.interpolate(coarse, images.shape[2:], mode="bicubic", align_corners=False)
    cover = torch.sigmoid(6 * (smooth - 1.2 + 1.4 * each_image(severity))) * each_image(severity).sqrt()
    return images + 0.9 * cover * (traits[1] - images)


def threads(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Hairs and threads on the items: thin bent lines, others in every frame."""
    x, y = _grid(images)
    field = torch.full_like(x, math.inf)
    for _ in range(4):
        turn, offset, bow = torch.rand((3, len(images), 1, 1), generator=random)
        away = (math.pi * turn).cos() * x + (math.pi * turn).sin() * y - 1.6 * offset + 0.8
        field = torch.minimum(field, (away + 0.5 * (bow - 0.5) * (x**2 - y**2)).abs())
    grey = (traits[0] > 0.4).float()
    return torch.where((field < 0.09 * severity.view(-1, 1, 1)).unsqueeze(1), grey, images)


# --- light -----------------------------------------------------------------------------------------------------------


def glare(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """A lamp mirrored in the scene: a bright spot at one place."""
    x, y = _grid(images)
    distance = (x - 1.6 * traits[0] + 0.8) ** 2 + (y - 1.6 * traits[1] + 0.8) ** 2
    spot = torch.exp(-distance / (0.1 + 0.5 * traits[2])).unsqueeze(1)
    return (images + 1.2 * each_image(severity) * spot).clamp(0, 1)


def stripes(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Stripes of a mesh or of the mains over the scene, drifting from frame to frame."""
    x, y = _grid(images)
    along = torch.cos(math.pi * traits[0]) * x + torch.sin(math.pi * traits[0]) * y
    phase = 2 * math.pi * torch.rand(len(images), 1, 1, generator=random)
    wave = torch.sin(math.pi * (2 + 8 * traits[1]) * along + phase).unsqueeze(1)
    if traits[2] < 0.5:
        return (images * (1 + 0.9 * each_image(severity) * wave)).clamp(0, 1)
    return (images + 0.35 * each_image(severity) * wave).clamp(0, 1)


def backlight(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Light from behind over a part of the picture: what is bright there turns dark, and the reverse."""
    x, y = _grid(images)
    along = (x if traits[0] < 0.5 else y) * (1 if traits[1] < 0.5 else -1)
    inside = along > 1 - 1.2 * severity.view(-1, 1, 1)
    return torch.where(inside.unsqueeze(1), 0.9 - 0.8 * images, images)


# --- in the camera ---------------------------------------------------------------------------------------------------


def solarise(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """A response that folds: what is brighter than a level gets darker again."""
    return images - (1 + traits[0]) * (images - 1 + 0.5 * each_image(severity)).clamp_min(0)


def hard_knee(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Far too steep a response: nearly black and white."""
    middle = 0.25 + 0.5 * traits[0]
    return ((images - middle) * (1 + 7 * each_image(severity)) + middle).clamp(0, 1)


def local_gain(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Tone mapping: every place is brought to the same brightness."""
    reach = 2 * (images.shape[3] // 8) + 1
    padded = F.pad(images, (reach // 2,) * 4, mode="replicate")
    even = 0.4 * images / (F.avg_pool2d(padded, reach, 1) + 0.1)
    return images + each_image(severity) * (even.clamp(0, 1) - images)


def halo(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Too much sharpening: edges overshoot."""
    smooth = F.avg_pool2d(F.pad(images, (2,) * 4, mode="replicate"), 5, 1)
    return (images + (1 + 3 * traits[0]) * each_image(severity) * (images - smooth)).clamp(0, 1)


def bleeding(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Bright parts swell, or thin ones fade."""
    reach = 3 if traits[1] < 0.6 else 5
    sign = 1 if traits[0] < 0.5 else -1
    other = sign * F.max_pool2d(sign * images, reach, 1, reach // 2)
    return images + each_image(severity) * (other - images)


def late_lines(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Every other line, or lines at random, come from elsewhere in the picture."""
    late = images.roll(1 + int(0.25 * images.shape[3] * traits[0]), 3)
    rows = torch.rand((len(images), 1, images.shape[2], 1), generator=random) < 0.5
    if traits[1] < 0.7:
        rows = (torch.arange(images.shape[2]) % 2 == 0).view(1, 1, -1, 1)
    return images + each_image(severity) * rows * (late - images)


def lost_rows(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """A video link that drops out: from some row on, the rest of the frame repeats that row."""
    height = images.shape[2]
    first = torch.rand(len(images), generator=random) * (1 - severity) + (1 - 0.6 * severity)
    last = (first.clamp(max=1) * (height - 1)).long().view(-1, 1)
    rows = torch.minimum(torch.arange(height).view(1, -1), last)
    return images.gather(2, rows.view(-1, 1, height, 1).expand_as(images))


CALIBRATION: dict[str, Shift] = TUNING | {
    shift.__name__: shift
    for shift in (
        *(wobble, squeeze, keystone, lens, jitter, swirl, seam, mirrored, far_and_near),
        *(scratches, covers, window_frame, overlap, background, crowded, mesh, stain, threads),
        *(glare, stripes, backlight),
        *(solarise, hard_knee, local_gain, halo, bleeding, late_lines, lost_rows),
        *SENSORS,
    )
}
