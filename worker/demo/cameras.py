"""Six cameras of a sorting line. Five drift and recover; one stays healthy.

Their shifts are the held-out ones of `meta.shifts`: neither model nor generator was trained on them, and the images
are test images.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from meta.data import LabelledImages
from meta.shifts import HELD_OUT

ITEM_FRAMES = 2  # frames that show one garment
RUN_ITEMS = 40  # consecutive garments that share a mix of classes
MIX = 1.0  # Dirichlet concentration of that mix; lower is more one-sided


@dataclass(frozen=True)
class DemoCamera:
    """A camera: what goes wrong with it, how severely, and when (as shares of the replay)."""

    stream: str
    shift: str | None
    peak: float = 0.0
    begins: float = 0.1
    full: float = 0.25
    heals: float = 0.82
    healed: float = 0.9
    format: str = "PNG"

    def severity(self, progress: Tensor) -> Tensor:
        """Severity at `progress` in [0, 1]: a ramp up, a plateau, a ramp down."""
        if self.shift is None:
            return torch.zeros_like(progress)
        rising = (progress - self.begins) / (self.full - self.begins)
        falling = (self.healed - progress) / (self.healed - self.heals)
        return self.peak * torch.minimum(rising, falling).clamp(0, 1)


CAMERAS = (
    DemoCamera("cam-1-light-failing", "light_failing", 0.85, begins=0.08, full=0.35),
    DemoCamera("cam-2-focus-loss", "focus_loss", 1.0, begins=0.12, full=0.22, format="JPEG"),
    DemoCamera("cam-3-sensor-noise", "shot_noise", 0.9, begins=0.10, full=0.30),
    DemoCamera("cam-4-haze", "haze", 0.3, begins=0.15, full=0.25),
    DemoCamera("cam-5-tilted", "tilt", 0.8, begins=0.12, full=0.14),
    DemoCamera("cam-6-healthy", None),
)


@dataclass(frozen=True)
class Reel:
    """All frames of one camera, encoded, with their labels and severities."""

    camera: DemoCamera
    frames: list[bytes]
    labels: npt.NDArray[np.int64]
    severity: npt.NDArray[np.float32]


def film(camera: DemoCamera, data: LabelledImages, frames: int, seed: int) -> Reel:
    """Make `frames` frames: garments in runs of similar classes, each seen twice, slightly moved."""
    random = torch.Generator().manual_seed(seed * 1_000 + CAMERAS.index(camera))
    chosen = _items(data.labels, -(-frames // ITEM_FRAMES), random)
    order = np.repeat(chosen, ITEM_FRAMES)[:frames]
    images = torch.from_numpy(data.images[order]).unsqueeze(1).float() / 255
    images = _jitter(images, random)
    severity = camera.severity(torch.linspace(0, 1, frames))
    if camera.shift is not None:
        traits = torch.rand(4, generator=random)
        images = HELD_OUT[camera.shift](images, severity, traits, random)
    pixels = (images * 255).round().clamp(0, 255).to(torch.uint8).squeeze(1).numpy()
    encoded = [_encode(picture, camera.format) for picture in pixels]
    return Reel(camera, encoded, data.labels[order], severity.numpy())


def _items(labels: npt.NDArray[np.int64], count: int, random: torch.Generator) -> npt.NDArray[np.int64]:
    """Indices of the garments. Every run draws its own mix of classes."""
    by_class = [np.flatnonzero(labels == c) for c in range(int(labels.max()) + 1)]
    parts = []
    for start in range(0, count, RUN_ITEMS):
        mix = torch._standard_gamma(torch.full((len(by_class),), MIX), generator=random) + 1e-6
        classes = torch.multinomial(mix, min(RUN_ITEMS, count - start), replacement=True, generator=random)
        picks = torch.rand(len(classes), generator=random)
        parts += [by_class[c][int(p * len(by_class[c]))] for c, p in zip(classes.tolist(), picks.tolist(), strict=True)]
    return np.array(parts, np.int64)


def _jitter(images: Tensor, random: torch.Generator) -> Tensor:
    """Move each frame by up to one pixel, as on a belt."""
    moves = torch.randint(-1, 2, (len(images), 2), generator=random).tolist()
    return torch.stack([torch.roll(image, move, (1, 2)) for image, move in zip(images, moves, strict=True)])


def _encode(picture: npt.NDArray[np.uint8], format: str) -> bytes:
    buffer = io.BytesIO()
    options = {"quality": 95} if format == "JPEG" else {"compress_level": 1}
    Image.fromarray(picture).save(buffer, format, **options)
    return buffer.getvalue()
