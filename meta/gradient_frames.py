"""Which frames of a pass give the gradient, evenly spread over each stream's, and which run without a graph."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class GradientFrames(NamedTuple):
    """A pass of B frames from S streams, divided into b frames that give the gradient and m = B - b others.

    Counts are float32, indices int64. An index is a frame's position in the pass.

    counts (S,): frames of each stream
    chosen (b,): indices of the frames that give the gradient, stream by stream
    chosen_stream (b,): the stream of each
    chosen_counts (S,): how many of them each stream has
    rest (m,): indices of the other frames
    order (B,): where each frame of the pass lies in `rest` and `chosen` concatenated
    """

    counts: Tensor
    chosen: Tensor
    chosen_stream: Tensor
    chosen_counts: Tensor
    rest: Tensor
    order: Tensor


def gradient_frames(stream: Tensor, streams: int, share: int, adapts: Sequence[bool] | None = None) -> GradientFrames:
    """Choose every `share`-th frame, and at least one, of each stream that `adapts`.

    stream (B,) int64 in [0, streams); adapts (S,), None for all streams.
    """
    wanted = None if adapts is None else tuple(adapts)
    return _gradient_frames(tuple(stream.tolist()), streams, share, wanted, stream.device)


@lru_cache(32)  # A worker's next pass mostly has as many frames; without the cache this took 1% of a lone step.
@torch.inference_mode(False)
def _gradient_frames(
    stream: tuple[int, ...], streams: int, share: int, adapts: tuple[bool, ...] | None, device: torch.device
) -> GradientFrames:
    frames_of: list[list[int]] = [[] for _ in range(streams)]
    for index, number in enumerate(stream):
        frames_of[number].append(index)
    chosen_of = [_evenly(frames, -(-len(frames) // share)) for frames in frames_of]
    if adapts is not None:
        chosen_of = [frames if adapting else [] for frames, adapting in zip(chosen_of, adapts, strict=True)]
    chosen = [index for frames in chosen_of for index in frames]
    rest = sorted(set(range(len(stream))) - set(chosen))
    row = {index: row for row, index in enumerate(rest + chosen)}
    return GradientFrames(
        torch.tensor([len(frames) for frames in frames_of], dtype=torch.float32, device=device),
        torch.tensor(chosen, dtype=torch.long, device=device),
        torch.tensor([stream[index] for index in chosen], dtype=torch.long, device=device),
        torch.tensor([len(frames) for frames in chosen_of], dtype=torch.float32, device=device),
        torch.tensor(rest, dtype=torch.long, device=device),
        torch.tensor([row[index] for index in range(len(stream))], dtype=torch.long, device=device),
    )


def _evenly(frames: Sequence[int], wanted: int) -> list[int]:
    """`wanted` of the frames, at even distances."""
    return [frames[(2 * i + 1) * len(frames) // (2 * wanted)] for i in range(wanted)]
