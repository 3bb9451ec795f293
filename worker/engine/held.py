"""Keeps the model's outputs for frames that are predicted and held until there are `min_adapt`.

Otherwise the first frame of a slow camera would be run again in each pass until there are enough for an update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from meta.outputs import Known, Output, concatenated
from schemas.state import StreamHeader
from worker.batch.batcher import MicroBatch
from worker.decode.image import DecodedFrame


@dataclass(frozen=True)
class Seen:
    """The outputs for a stream's held frames, under its parameters as they were after so many `events`."""

    frames: Sequence[DecodedFrame]
    output: Output
    events: int

    def begins(self, batch: MicroBatch, header: StreamHeader) -> bool:
        """Whether these outputs hold for the first frames of the micro-batch: the frames are the same, and so are the
        parameters, as nothing changes them without an event."""
        same = all(ours is theirs for ours, theirs in zip(self.frames, batch.frames, strict=False))
        return same and self.events == header.events


def known(batches: Sequence[MicroBatch], seen: Sequence[Seen | None], headers: Sequence[StreamHeader]) -> Known | None:
    """The outputs that are known of a part's frames, from what was `seen` of each micro-batch's stream."""
    places: list[int] = []
    outputs: list[Output] = []
    start = 0
    for batch, before, header in zip(batches, seen, headers, strict=True):
        if before is not None and before.begins(batch, header):
            places += range(start, start + len(before.frames))
            outputs.append(before.output)
        start += len(batch.frames)
    return Known(torch.tensor(places), concatenated(outputs)) if places else None


def kept(batches: Sequence[MicroBatch], headers: Sequence[StreamHeader], output: Output) -> list[Seen | None]:
    """The outputs to keep of each micro-batch that will be held; `output` is of all frames of the part.

    They are copied: views would keep the memory of all streams until the last one has made its update.
    """
    found: list[Seen | None] = []
    start = 0
    for batch, header in zip(batches, headers, strict=True):
        end = start + len(batch.frames)
        own = None if batch.fold else output.rows(start, end).clone()
        found.append(None if own is None else Seen(batch.frames, own, header.events))
        start = end
    return found
