"""Attacks: sequences of frames, uint8 (N, h, w), that a guard has to survive. Faults of a camera, or done on purpose.

All images are test images, or made by the attack.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from meta.benchmark.datasets import CIFAR10_VARIABLE, read_archive
from meta.data import LabelledImages
from meta.shifts import HELD_OUT
from meta.source import image_tensor

Attack = Callable[[LabelledImages, int, np.random.Generator], np.ndarray]
NAN_MARK = 255  # a frame with this value in every pixel stands for one that makes the model's input not finite
LONG = 10_000


def constant_frame(pool: LabelledImages, frames: int, random: np.random.Generator) -> np.ndarray:
    """The camera hangs and repeats one picture."""
    frame = np.array(pool.images[random.integers(len(pool))])
    return np.repeat(frame[None], frames, 0)


def covered(pool: LabelledImages, frames: int, random: np.random.Generator) -> np.ndarray:
    """A cap on the lens; the sensor's own noise is left."""
    return random.normal(6, 1.5, (frames, *pool.images.shape[1:])).clip(0, 255).astype(np.uint8)


def one_class(pool: LabelledImages, frames: int, random: np.random.Generator) -> np.ndarray:
    """Frames of one class only."""
    own: np.ndarray = pool.images[pool.labels == random.integers(int(pool.labels.max()) + 1)]
    chosen: np.ndarray = own[random.integers(len(own), size=frames)]
    return chosen


def uniform_noise(pool: LabelledImages, frames: int, random: np.random.Generator) -> np.ndarray:
    """Random pixels."""
    return random.integers(0, 256, (frames, *pool.images.shape[1:]), np.uint8)


def ordered_classes(pool: LabelledImages, frames: int, random: np.random.Generator) -> np.ndarray:
    """Class after class in long runs, in random order."""
    classes = random.permutation(int(pool.labels.max()) + 1)
    run = max(1, frames // len(classes))
    parts = []
    for label in classes:
        own = pool.images[pool.labels == label]
        parts.append(own[random.integers(len(own), size=run)])
    return np.concatenate(parts)


def exposure_flicker(pool: LabelledImages, frames: int, random: np.random.Generator) -> np.ndarray:
    """Exposure oscillates: frames are far too dark and far too bright in turns."""
    images = pool.images[random.integers(len(pool), size=frames)].astype(np.float32)
    gain = np.where(np.arange(frames) % 2 == 0, 0.25, 3.0)[:, None, None]
    return (images * gain).clip(0, 255).astype(np.uint8)


def not_finite(pool: LabelledImages, frames: int, random: np.random.Generator) -> np.ndarray:
    """Every fourth frame makes the model's input not finite."""
    images = pool.images[random.integers(len(pool), size=frames)].copy()
    images[::4] = NAN_MARK
    return images


def sudden_shift(pool: LabelledImages, frames: int, random: np.random.Generator) -> np.ndarray:
    """From the first frame on the lamp has failed and the camera is tilted."""
    images = pool.images[random.integers(len(pool), size=frames)]
    return _shifted(_shifted(images, "tilt", random), "light_failing", random)


def recurring_shift(pool: LabelledImages, frames: int, random: np.random.Generator) -> np.ndarray:
    """Haze comes and goes every 200 frames."""
    images = pool.images[random.integers(len(pool), size=frames)]
    hazy = _shifted(images, "haze", random)
    made: np.ndarray = np.where((np.arange(frames) // 200 % 2 == 0)[:, None, None], hazy, images)
    return made


def wrong_camera(pool: LabelledImages, frames: int, random: np.random.Generator) -> np.ndarray:
    """Another data set: CIFAR-10 in grey if $DRIFTKEEL_CIFAR10 names it, else drawn textures."""
    archive = _cifar10()
    height, width = pool.images.shape[1:]
    if archive is not None:
        colour = read_archive(archive).images
        grey = colour[random.integers(len(colour), size=frames)].mean(3)
        top, left = (grey.shape[1] - height) // 2, (grey.shape[2] - width) // 2
        middle: np.ndarray = grey[:, top : top + height, left : left + width].astype(np.uint8)
        return middle
    coarse = torch.from_numpy(random.normal(0, 1, (frames, 1, 7, 7)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").squeeze(1).numpy()
    return (127 + 80 * smooth).clip(0, 255).astype(np.uint8)


def slow_poison(pool: LabelledImages, frames: int, random: np.random.Generator) -> np.ndarray:
    """Frames of one class turn into another's little by little, so that none differs much from the one before."""
    first, second = random.permutation(int(pool.labels.max()) + 1)[:2]
    parts = [pool.images[pool.labels == label] for label in (first, second)]
    begin, end = (own[random.integers(len(own), size=frames)].astype(np.float32) for own in parts)
    share = np.linspace(0, 1, frames)[:, None, None]
    mixed = (begin * (1 - share) + end * share).clip(0, 255).astype(np.uint8)
    # Half of the frames are ordinary, as otherwise this would be the attack `one_class` again.
    ordinary = pool.images[random.integers(len(pool), size=frames)]
    return np.where((random.random(frames) < 0.5)[:, None, None], mixed, ordinary)


def other_images() -> str:
    """The images of `wrong_camera` in this run, for the report."""
    return "CIFAR-10 test images in grey" if _cifar10() else "drawn textures"


def _cifar10() -> Path | None:
    folder = os.environ.get(CIFAR10_VARIABLE)
    archive = Path(folder or "") / "test.npz"
    return archive if folder and archive.exists() else None


ATTACKS: dict[str, tuple[Attack, int]] = {
    "constant_frame": (constant_frame, 2_000),
    "covered": (covered, 2_000),
    "one_class": (one_class, LONG),
    "uniform_noise": (uniform_noise, 2_000),
    "ordered_classes": (ordered_classes, 5_000),
    "exposure_flicker": (exposure_flicker, 2_000),
    "not_finite": (not_finite, 2_000),
    "sudden_shift": (sudden_shift, 2_000),
    "recurring_shift": (recurring_shift, 4_000),
    "wrong_camera": (wrong_camera, 2_000),
    "slow_poison": (slow_poison, 5_000),
}


def _shifted(images: np.ndarray, shift: str, random: np.random.Generator) -> np.ndarray:
    generator = torch.Generator().manual_seed(int(random.integers(1 << 30)))
    traits = torch.rand(4, generator=generator)
    frames = image_tensor(images).float() / 255
    out = HELD_OUT[shift](frames, torch.full((len(frames),), 0.9), traits, generator)
    return (out * 255).round().clamp(0, 255).to(torch.uint8).squeeze(1).numpy()
