"""Whether adapting helps: the trained method against the source model, on held-out images under held-out shifts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from meta.create.images import Images
from meta.create.piecewise import PiecewiseMGG, frames_in_pass
from meta.shifts import HELD_OUT, Shift
from meta.source import Preprocessing
from schemas.verdict import Measured, Recommendation

BATCH = 16
HEALTHY, IN_RUNS = "no shift", "no shift, classes in runs"
# Shares of accuracy. Below SOME_GAIN adapting is not worth its cost; from CLEAR_GAIN on it is.
SOME_GAIN, CLEAR_GAIN = 0.005, 0.02
SMALL_LOSS, LARGE_LOSS = 0.01, 0.03
Say = Callable[[str], None]


@dataclass(frozen=True)
class _Camera:
    """One stream: its shift with traits, and the index of the image that each frame shows (L,)."""

    setting: str
    shift: Shift | None
    traits: Tensor
    shown: Tensor


def measure(
    method: PiecewiseMGG, images: Images, preprocessing: Preprocessing, frames: int, repeats: int, seed: int, say: Say
) -> list[Measured]:
    """The accuracy of the source and the adapted model in each setting, on `repeats` cameras with `frames` each.

    Settings are the held-out shifts, whose severity rises over the first half of the frames and then stays, and no
    shift, with classes in random order and in runs. Micro-batches have 16 frames, and are predicted before the update.
    """
    labels = images.labels
    if labels is None:
        raise ValueError("images must be labelled")
    random = torch.Generator().manual_seed(seed)
    cameras = _cameras(labels, frames, repeats, random)
    state = method.fresh(len(cameras))
    stream = torch.arange(len(cameras)).repeat_interleave(BATCH)
    steps = math.ceil(frames / BATCH)
    right = torch.zeros(2, len(cameras), steps, BATCH)
    for step in range(steps):
        severity = torch.full((BATCH,), min(1.0, 2 * (step + 1) / steps))
        index = torch.cat([camera.shown[step * BATCH : (step + 1) * BATCH] for camera in cameras])
        pictures = images.images[index].float().div(255).split(BATCH)
        seen = [
            picture if camera.shift is None else camera.shift(picture, severity, camera.traits, random)
            for camera, picture in zip(cameras, pictures, strict=True)
        ]
        batch = preprocessing.frames(torch.cat(seen))
        truth = labels[index]
        right[0, :, step] = (_source(method, batch).argmax(1) == truth).view(len(cameras), BATCH).float()
        forward = method.serve(batch, stream, state)
        right[1, :, step] = (forward.answer.argmax(1) == truth).view(len(cameras), BATCH).float()
        state = method.update(forward).state
        if (step + 1) % max(1, steps // 5) == 0:
            say(f"measurement: {step + 1} of {steps} micro-batches of {len(cameras)} cameras")
    names = [camera.setting for camera in cameras]
    return [
        _measured(name, right[:, [n == name for n in names]].flatten(2), len(images)) for name in dict.fromkeys(names)
    ]


def _cameras(labels: Tensor, frames: int, repeats: int, random: torch.Generator) -> list[_Camera]:
    settings: list[tuple[str, Shift | None]] = [*HELD_OUT.items(), (HEALTHY, None), (IN_RUNS, None)]
    cameras = []
    count = BATCH * math.ceil(frames / BATCH)
    for name, shift in settings:
        for _ in range(repeats):
            rounds = math.ceil(count / len(labels))
            shown = torch.cat([torch.randperm(len(labels), generator=random) for _ in range(rounds)])[:count]
            if name == IN_RUNS:
                shown = shown[torch.sort(labels[shown], stable=True).indices]
            cameras.append(_Camera(name, shift, torch.rand(4, generator=random), shown))
    return cameras


@torch.inference_mode()
def _source(method: PiecewiseMGG, batch: Tensor) -> Tensor:
    return torch.cat([method.model(part) for part in batch.split(frames_in_pass(*batch.shape[2:]))])


def _measured(setting: str, right: Tensor, images: int) -> Measured:
    """right (2, cameras, frames): 1 where the source model, and the adapted one, were right."""
    return Measured(
        setting=setting,
        frames=right[0].numel(),
        source=float(right[0].mean()),
        adapted=float(right[1].mean()),
        error=standard_error(right[1] - right[0], images),
    )


def standard_error(difference: Tensor, images: int) -> float:
    """The standard error of the mean of `difference` (cameras, frames), from two components.

    One is from the sample of images: repetitions of an image are not counted as evidence. The other is from the sample
    of cameras: the variance of their means beyond that explained by their frames.
    """
    cameras, frames = difference.shape
    variance = float(difference.var(correction=0)) / min(difference.numel(), images)
    if cameras > 1:
        explained = float(difference.var(1, correction=0).mean()) / frames
        variance += max(0.0, float(difference.mean(1).var()) - explained) / cameras
    return math.sqrt(variance)


def total_gain(settings: list[Measured]) -> tuple[float, float]:
    """The mean gain over shifts, and its standard error with respect to images and cameras, but not to shifts."""
    shifts = [m for m in settings if m.setting in HELD_OUT]
    error = math.sqrt(sum(m.error**2 for m in shifts)) / len(shifts)
    return sum(m.gain for m in shifts) / len(shifts), error


def recommend(settings: list[Measured]) -> tuple[Recommendation, list[str]]:
    """The recommendation and its reasons. Of a loss, what exceeds two standard errors counts.

    If classes in runs are the worst setting, a reason also gives the recommendation without it: whether cameras show
    such runs is known at the site.
    """
    recommendation, reasons = _judged(settings)
    others = [m for m in settings if m.setting != IN_RUNS]
    if recommendation != "adapt" and len(others) < len(settings) and min(settings, key=lambda m: m.gain) not in others:
        reasons.append(f"for cameras that never show one class for long: {_judged(others)[0]}")
    return recommendation, reasons


def _judged(settings: list[Measured]) -> tuple[Recommendation, list[str]]:
    gain, error = total_gain(settings)
    worst = min(settings, key=lambda m: m.gain)
    certain = -worst.gain - 2 * worst.error
    gains = [m.gain for m in settings if m.setting in HELD_OUT]
    between = f"{100 * min(gains):+.1f} to {100 * max(gains):+.1f}"
    reasons = [
        f"{100 * gain:+.1f} ± {100 * error:.1f} points of accuracy on average under shifts it was not trained on, "
        f"{between} from shift to shift",
        f"worst setting: {worst.setting}, {100 * worst.gain:+.1f} ± {100 * worst.error:.1f} points",
    ]
    if gain - 2 * error <= 0 or gain < SOME_GAIN:
        return "do not adapt", [*reasons, "the gain is too small to be told from chance or to be worth it"]
    if certain > LARGE_LOSS and worst.gain < -gain:
        return "do not adapt", [*reasons, "it loses more there than it gains elsewhere"]
    if certain > SMALL_LOSS:
        return "adapt with care", [*reasons, "it loses there: watch such cameras, or begin with policy.mode: shadow"]
    if worst.gain < -SMALL_LOSS:
        return "adapt with care", [*reasons, "a loss there cannot be ruled out: more images would tell"]
    if gain < CLEAR_GAIN:
        return "adapt with care", [*reasons, "the gain is small"]
    return "adapt", reasons
