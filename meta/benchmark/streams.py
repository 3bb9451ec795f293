"""The streams of the benchmark: the order of images, shifts and labels in each setting.

continual   the fifteen corruptions at severity 5 in a row, without a reset
timed       the same, but a method that takes C times as long adapts on every C-th batch (Alfarra et al., ICML 2024)
reset       one stream per corruption, each from a fresh state
gradual     the severity of each corruption goes 1, 2, 3, 4, 5, 4, 3, 2, 1
recurring   the fifteen corruptions ten times over, with a tenth of the frames each time
mixed       the corruption differs from frame to frame
correlated  as continual, but labels come in runs: Dirichlet 0.1 over slots, as in RoTTA (CVPR 2023): one
            per class, and at most 100
healthy     a long stream of clean frames
long        a long stream of random corruptions and severities
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from meta.benchmark.datasets import CLEAN

Setting = Literal["continual", "timed", "reset", "gradual", "recurring", "mixed", "correlated", "healthy", "long"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)
DRIFT: tuple[Setting, ...] = tuple(s for s in SETTINGS if s not in ("healthy", "long"))
Condition = tuple[str, int]  # shift and severity
VISITS = 10
DIRICHLET, MOST_SLOTS = 0.1, 100


@dataclass(frozen=True)
class Stream:
    """For each of L frames: `image` (L,) int64, its index in the pool; `condition` (L,) int64, its index in
    `conditions`."""

    setting: Setting
    seed: int
    conditions: tuple[Condition, ...]
    condition: np.ndarray
    image: np.ndarray

    def __len__(self) -> int:
        return len(self.image)


def make_streams(
    setting: Setting, seed: int, shifts: list[str], labels: np.ndarray, frames: int, long_frames: int
) -> list[Stream]:
    """The streams of a setting and seed; deterministic. `frames`: per shift; labels (N,): of the pool.

    With seed 0 the shifts come in the order given, with other seeds in a random order.
    """
    random = np.random.default_rng([seed, zlib.crc32(setting.encode())])
    order = shifts if seed == 0 else [shifts[i] for i in np.random.default_rng(seed).permutation(len(shifts))]
    if setting == "reset":
        return [_joined(setting, seed, [_visit((shift, 5), frames, labels, random)]) for shift in order]
    if setting == "mixed":
        images = np.concatenate([_drawn(frames, labels, random) for _ in order])
        mixture = random.permutation(np.arange(len(images)) % len(order))
        return [Stream(setting, seed, tuple((shift, 5) for shift in order), mixture, images)]
    return [_joined(setting, seed, _visits(setting, order, labels, frames, long_frames, random))]


Visit = tuple[Condition, np.ndarray]


def _visits(
    setting: Setting,
    order: list[str],
    labels: np.ndarray,
    frames: int,
    long_frames: int,
    random: np.random.Generator,
) -> list[Visit]:
    if setting in ("continual", "timed"):
        return [_visit((shift, 5), frames, labels, random) for shift in order]
    if setting == "correlated":
        visits = [_visit((shift, 5), frames, labels, random) for shift in order]
        return [(condition, _in_runs(images, labels, random)) for condition, images in visits]
    if setting == "gradual":
        course = (1, 2, 3, 4, 5, 4, 3, 2, 1)
        each = max(1, frames // len(course))
        return [_visit((shift, severity), each, labels, random) for shift in order for severity in course]
    if setting == "recurring":
        each = max(1, frames // VISITS)
        return [_visit((shift, 5), each, labels, random) for _ in range(VISITS) for shift in order]
    if setting == "healthy":
        return [_visit((CLEAN, 0), frames, labels, random) for _ in range(max(1, long_frames // frames))]
    chosen = random.integers(len(order), size=max(1, long_frames // frames))
    return [_visit((order[i], int(random.integers(1, 6))), frames, labels, random) for i in chosen]


def _visit(condition: Condition, frames: int, labels: np.ndarray, random: np.random.Generator) -> Visit:
    return condition, _drawn(frames, labels, random)


def _drawn(frames: int, labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Indices (frames,) of images, drawn from the pool without replacement until it is exhausted, then again."""
    rounds = [random.permutation(len(labels)) for _ in range(-(-frames // len(labels)))]
    return np.concatenate(rounds)[:frames]


def _in_runs(images: np.ndarray, labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The images ordered so that labels come in runs: each class is divided among slots by a Dirichlet draw, and a slot
    shows one class after the other."""
    classes = np.unique(labels)
    slots: list[list[np.ndarray]] = [[] for _ in classes[:MOST_SLOTS]]
    for label in classes:
        own = images[labels[images] == label]
        cuts = np.cumsum(random.dirichlet([DIRICHLET] * len(slots)))[:-1] * len(own)
        for slot, part in zip(slots, np.split(own, np.round(cuts).astype(int)), strict=True):
            slot.append(part)
    return np.concatenate([slot[i] for slot in slots for i in random.permutation(len(slot))])


def _joined(setting: Setting, seed: int, visits: list[Visit]) -> Stream:
    conditions = tuple(dict.fromkeys(condition for condition, _ in visits))
    place = {condition: i for i, condition in enumerate(conditions)}
    codes = np.concatenate([np.full(len(images), place[condition]) for condition, images in visits])
    return Stream(setting, seed, conditions, codes, np.concatenate([images for _, images in visits]))
