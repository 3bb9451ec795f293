"""Model outputs that are selected, concatenated and used again, so that no frame runs twice without need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Output:
    """A model's output for n frames.

    logits (n, classes), features (n, F or more), and `head` (n, d), the input of the last linear layer; None if that
    layer does not get one row per frame.
    """

    logits: Tensor
    features: Tensor
    head: Tensor | None

    def rows(self, start: int, end: int) -> Output:
        """The frames from `start` to before `end`, as views."""
        rows = slice(start, end)
        return Output(self.logits[rows], self.features[rows], None if self.head is None else self.head[rows])

    def select(self, places: Tensor) -> Output:
        """The frames at indices `places` (m,), copied."""
        logits, features = self.logits.index_select(0, places), self.features.index_select(0, places)
        return Output(logits, features, None if self.head is None else self.head.index_select(0, places))

    def clone(self) -> Output:
        """A copy in memory of its own."""
        return Output(self.logits.clone(), self.features.clone(), None if self.head is None else self.head.clone())


@dataclass(frozen=True)
class Known:
    """Outputs of an earlier pass under the same parameters, for the frames at indices `places` (n,) of this pass.

    The features include those of the first layer's input.
    """

    places: Tensor
    output: Output

    def without(self, places: Tensor) -> Known:
        """The frames that are not at indices `places` (m,)."""
        rows = torch.isin(self.places, places, invert=True).nonzero().flatten()
        return Known(self.places[rows], self.output.select(rows))


def concatenated(parts: Sequence[Output]) -> Output:
    """The frames of all parts in turn, without a graph; `head` is None if a part has none."""
    heads = [part.head for part in parts if part.head is not None]
    return Output(
        torch.cat([part.logits.detach() for part in parts]),
        torch.cat([part.features.detach() for part in parts]),
        torch.cat(heads) if len(heads) == len(parts) else None,
    )


def order_of(count: int, parts: Sequence[Known]) -> Tensor:
    """The row (count,) of each of `count` frames in the concatenated parts, which have every frame at least once."""
    places = torch.cat([part.places for part in parts])
    return places.new_empty(count).index_copy_(0, places, torch.arange(len(places), device=places.device))


def all_but(count: int, known: Sequence[Tensor]) -> Tensor:
    """The indices (m,) of a pass's `count` frames that are in none of `known`.

    If none is left, that of the first frame: not every model can run on an empty batch.
    """
    others = torch.ones(count, dtype=torch.bool, device=known[0].device)
    for places in known:
        others.index_fill_(0, places, False)
    left = others.nonzero().flatten()
    return left if len(left) else left.new_zeros(1)
