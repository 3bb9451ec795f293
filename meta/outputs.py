"""What a model has put out for the frames of a pass, so that none of them is run a second time for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Output:
    """What a model puts out for some frames: logits (n, classes), features (n, F or more), and what went into its last
    linear layer (n, d), if that could be seen."""

    logits: Tensor
    features: Tensor
    head: Tensor | None

    def of(self, start: int, end: int) -> Output:
        """Its frames from `start` to before `end`."""
        rows = slice(start, end)
        return Output(self.logits[rows], self.features[rows], None if self.head is None else self.head[rows])

    def at(self, places: Tensor) -> Output:
        """Its frames at the places (m,)."""
        logits, features = self.logits.index_select(0, places), self.features.index_select(0, places)
        return Output(logits, features, None if self.head is None else self.head.index_select(0, places))

    def copied(self) -> Output:
        """The same in memory of its own."""
        return Output(self.logits.clone(), self.features.clone(), None if self.head is None else self.head.clone())


@dataclass(frozen=True)
class Known:
    """What the model has put out already for some frames of a pass, under the same parameters: their places (n,) in
    it, and the features with those of the first layer's input."""

    places: Tensor
    output: Output

    def but(self, places: Tensor) -> Known:
        """Without the frames at these places (m,)."""
        rows = torch.isin(self.places, places, invert=True).nonzero().flatten()
        return Known(self.places[rows], self.output.at(rows))


def joined(parts: Sequence[Output]) -> Output:
    """The frames of all parts, one after the other; without a graph."""
    heads = [part.head for part in parts if part.head is not None]
    return Output(
        torch.cat([part.logits.detach() for part in parts]),
        torch.cat([part.features.detach() for part in parts]),
        torch.cat(heads) if len(heads) == len(parts) else None,
    )


def order_of(count: int, parts: Sequence[Known]) -> Tensor:
    """Where each of `count` frames (count,) lies in the parts joined, which have all of them, some perhaps twice."""
    places = torch.cat([part.places for part in parts])
    return places.new_empty(count).index_copy_(0, places, torch.arange(len(places), device=places.device))


def all_but(count: int, known: Sequence[Tensor]) -> Tensor:
    """The places (m,) of a pass's `count` frames that are in none of `known`; the first frame's where that leaves none,
    for not every model can run on nothing."""
    others = torch.ones(count, dtype=torch.bool, device=known[0].device)
    for places in known:
        others.index_fill_(0, places, False)
    left = others.nonzero().flatten()
    return left if len(left) else left.new_zeros(1)
