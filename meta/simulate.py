"""Simulated streams for meta-training and calibration: labelled images, seen by cameras that drift."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from meta.shifts import Shift


class SimulatedStream:
    """One camera. It plays episodes, in which severities of a mixture of shifts and the class mix change over time.

    images uint8 (N, ch, h, w), labels (N,)
    repeat: frames in a row that show the same image; above 1 they are moved by up to a pixel
    strength: factor on severities, which stay at or below 1

    A third of the episodes have no shift, so that a generator also learns when not to adapt.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        shifts: dict[str, Shift],
        random: torch.Generator,
        repeat: int = 1,
        strength: float = 1.0,
    ) -> None:
        self.repeat, self.strength = repeat, strength
        self.images, self.labels, self.random = images, labels, random
        self.shifts = list(shifts.values())
        self.by_class = [torch.nonzero(labels == c).flatten() for c in labels.unique()]
        self.begin()

    def begin(self) -> None:
        """Start an episode: draw shifts, the course of their severity, and a length of 20 to 160 micro-batches."""
        self.step, self.length = 0, int(self._number(20, 160))
        how_many = [0, 0, 1, 1, 2, 3][int(self._number(0, 6))]
        order = torch.randperm(len(self.shifts), generator=self.random)[:how_many]
        self.active = [(self.shifts[int(i)], torch.rand(4, generator=self.random)) for i in order]
        self.peak = min(1.0, self.strength * self._number(0.3, 1.0) / max(1, how_many) ** 0.5)
        self.course = int(self._number(0, 5))
        self.onset = self._number(0, 0.4)
        self._remix()

    @property
    def over(self) -> bool:
        """Whether the episode has ended."""
        return self.step >= self.length

    def next(self, frames: int) -> tuple[Tensor, Tensor]:
        """The next `frames` images in [0, 1], float (b, ch, h, w), and their labels (b,)."""
        if self.step >= self.next_mix:
            self._remix()
        items = -(-frames // self.repeat)
        classes = torch.multinomial(self.mix, items, replacement=True, generator=self.random)
        if self.in_runs:
            classes = classes.sort().values
        chosen = torch.stack([self._one_of(self.by_class[int(c)]) for c in classes])
        if self.repeat > 1:
            chosen = chosen.repeat_interleave(self.repeat)[:frames]
        images = self.images[chosen].float() / 255
        if self.repeat > 1:
            images = self._moved(images)
        severity = torch.full((frames,), self.severity())
        if self.course == 4:  # mixed: each frame has a severity of its own
            severity = severity * torch.rand(frames, generator=self.random)
        for shift, traits in self.active:
            images = shift(images, severity, traits, self.random)
        self.step += 1
        return images, self.labels[chosen]

    def severity(self) -> float:
        """Gradual onset, sudden onset, there and back, recurring, or mixed from frame to frame."""
        progress = self.step / self.length
        if self.course == 0:
            share = min(1.0, max(0.0, (progress - self.onset) / 0.3))
        elif self.course == 1:
            share = float(progress >= self.onset)
        elif self.course == 2:
            share = math.sin(math.pi * progress)
        elif self.course == 3:
            share = float(math.sin(6 * math.pi * progress) > 0)
        else:
            share = 1.0
        return self.peak * share

    def _number(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.random))

    def _one_of(self, indices: Tensor) -> Tensor:
        return indices[torch.randint(len(indices), (), generator=self.random)]

    def _moved(self, images: Tensor) -> Tensor:
        """Each frame displaced by up to one pixel, as on a belt."""
        moves = torch.randint(-1, 2, (len(images), 2), generator=self.random).tolist()
        return torch.stack([torch.roll(image, move, (1, 2)) for image, move in zip(images, moves, strict=True)])

    def _remix(self) -> None:
        """Draw a class mix from a Dirichlet distribution that is even, moderately or strongly concentrated."""
        concentration = [0.2, 1.0, 100.0][int(self._number(0, 3))]
        gammas = torch._standard_gamma(torch.full((len(self.by_class),), concentration), generator=self.random)
        self.mix = gammas + 1e-6
        self.in_runs = self._number(0, 1) < 0.5
        self.next_mix = self.step + int(self._number(2, 20))
