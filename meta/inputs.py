"""The inputs of the generator: what it is given for each coordinate of the affine, beside its memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from meta.method import State
from meta.norms import AdaptableModel

# fmt: off
Input = Literal[
    "momentum", "gradient", "agreement", "offset", "size", "raw", "gap_mean", "gap_std", "kind", "depth",
    "norm", "entropy", "discrepancy", "age", "batch",
]
# fmt: on
ALL_INPUTS: tuple[Input, ...] = get_args(Input)
PER_STREAM = ("norm", "entropy", "discrepancy", "age", "batch")  # the same for all coordinates of a stream
TINY = 1e-8


class Inputs:
    """Computes the inputs `names` for one model. `decays`: of the gradient's running first and second moment."""

    def __init__(
        self, model: AdaptableModel, names: Sequence[Input], decays: tuple[float, float], classes: int
    ) -> None:
        self._decays, self._classes = decays, classes
        self._coordinate = [name for name in names if name not in PER_STREAM]
        self._stream = [name for name in names if name in PER_STREAM]
        made = [*self._coordinate, *self._stream]
        order = [made.index(name) for name in names]
        self._order = None if made == list(names) else torch.tensor(order, device=model.device)
        self._kind = 2 * model.is_scale - 1
        self._root = model.coordinates**0.5
        self._channel, self._depth = _layout(model)

    def of(
        self,
        counts: Tensor,
        gradient: Tensor,
        norm: Tensor,
        power: Tensor,
        moments: tuple[Tensor, Tensor],
        age: Tensor,
        offset: Tensor,
        signals: State,
    ) -> Tensor:
        """Inputs (S, d, P), in the order of `names`; those of a stream are repeated for all P coordinates.

        counts (S,): frames of each stream
        gradient (S, P): sum of the frames' gradients, in units of `gradient_scale`
        norm (S,): its Euclidean norm
        power (S, P): sum of the frames' squared gradients
        moments: running first and second moment of the gradient, (S, P) each
        age (S,): updates, this one included
        offset (S, P): what past updates have added to the source affine, before anchor and dose
        signals: of the `Objective`
        """
        (first, second), (b1, b2) = moments, self._decays
        steps = age.unsqueeze(1)
        root = (second / _bias_correction(b2, steps)).sqrt() + TINY
        counts = counts.clamp_min(1)
        coordinate: dict[str, Callable[[], Tensor]] = {
            "momentum": lambda: first / _bias_correction(b1, steps) / root,
            "gradient": lambda: gradient / root,
            # +-1 if the gradients of all frames agree, near 0 if they cancel out.
            "agreement": lambda: gradient / ((counts.unsqueeze(1) * power).sqrt() + TINY),
            "offset": lambda: (5 * offset).clamp(-3, 3),
            "size": lambda: (gradient.abs() + TINY).log10().clamp(-3, 3) / 2,
            "raw": lambda: gradient.clamp(-3, 3),
            "gap_mean": lambda: signals["gap_mean"].index_select(1, self._channel) / 2,
            "gap_std": lambda: signals["gap_std"].index_select(1, self._channel),
            "kind": lambda: self._kind.expand_as(gradient),
            "depth": lambda: self._depth.expand_as(gradient),
        }
        stream: dict[str, Callable[[], Tensor]] = {
            "norm": lambda: (norm / self._root + TINY).log10().clamp(-3, 3),
            "entropy": lambda: signals["entropy"] / math.log(self._classes),
            "discrepancy": lambda: torch.log1p(signals["discrepancy"]).clamp(max=5),
            "age": age.rsqrt,
            "batch": lambda: counts.log2() / 6,
        }
        parts = []
        if self._coordinate:
            parts.append(torch.stack([coordinate[name]() for name in self._coordinate], 1))
        if self._stream:
            numbers = torch.stack([stream[name]() for name in self._stream], 1)
            parts.append(numbers.unsqueeze(2).expand(-1, -1, gradient.shape[1]))
        inputs = torch.cat(parts, 1)
        return inputs if self._order is None else inputs.index_select(1, self._order)


def _bias_correction(decay: float, steps: Tensor) -> Tensor:
    """1 - decay^steps, Adam's correction of a running mean that starts at zero."""
    return torch.expm1(steps * math.log(decay)).neg() if decay else torch.ones_like(steps)


def _layout(model: AdaptableModel) -> tuple[Tensor, Tensor]:
    """For every coordinate (P,): the index of its channel's feature, and the depth of its layer, from -1 to 1."""
    channel, depth, first = [], [], 0
    last = max(1, len(model.layers) - 1)
    for number, layer in enumerate(model.layers):
        mine = torch.arange(layer.feature_count) + first
        copies = layer.scale.numel() // layer.feature_count
        for _ in range(1 + layer.has_shift):
            channel.append(mine.repeat(copies))
            depth.append(torch.full((layer.scale.numel(),), 2 * number / last - 1))
        first += layer.feature_count
    return torch.cat(channel).to(model.device), torch.cat(depth).to(model.device)
