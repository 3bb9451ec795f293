"""Which of a pass's frames give the gradient, evenly spread over each stream's, and which are run without a graph."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Division(NamedTuple):
    """Of the B frames of S streams: how many each has, `counts` (S,); the places of those that are `chosen` (b,), their
    `stream` (b,) and how many each has of them, `few` (S,); the places of the `rest` (m,), and where each frame lies
    in rest and chosen joined, `order` (B,)."""

    counts: Tensor
    chosen: Tensor
    stream: Tensor
    few: Tensor
    rest: Tensor
    order: Tensor


def divided(stream: Tensor, streams: int, share: int, adapts: Sequence[bool] | None = None) -> Division:
    """One of `share` frames is chosen, and one at least, of each stream that `adapts` (S,); None: all. stream (B,)."""
    wanted = None if adapts is None else tuple(adapts)
    return _divided(tuple(stream.tolist()), streams, share, wanted, stream.device)


@lru_cache(32)  # a worker's next pass is mostly of as many frames; made anew, this was a hundredth of a lone step
@torch.inference_mode(False)
def _divided(
    stream: tuple[int, ...], streams: int, share: int, adapts: tuple[bool, ...] | None, device: torch.device
) -> Division:
    own: list[list[int]] = [[] for _ in range(streams)]
    for place, number in enumerate(stream):
        own[number].append(place)
    spread = [evenly(places, -(-len(places) // share)) for places in own]
    if adapts is not None:
        spread = [places if adapting else [] for places, adapting in zip(spread, adapts, strict=True)]
    chosen = [place for places in spread for place in places]
    rest = sorted(set(range(len(stream))) - set(chosen))
    lies = {place: row for row, place in enumerate(rest + chosen)}
    return Division(
        torch.tensor([len(places) for places in own], dtype=torch.float32, device=device),
        torch.tensor(chosen, dtype=torch.long, device=device),
        torch.tensor([stream[place] for place in chosen], dtype=torch.long, device=device),
        torch.tensor([len(places) for places in spread], dtype=torch.float32, device=device),
        torch.tensor(rest, dtype=torch.long, device=device),
        torch.tensor([lies[place] for place in range(len(stream))], dtype=torch.long, device=device),
    )


def evenly(places: Sequence[int], wanted: int) -> list[int]:
    """So many `wanted` of these, evenly spread."""
    return [places[(2 * i + 1) * len(places) // (2 * wanted)] for i in range(wanted)]
