"""What a stream's events say of its state, rebuilt from them alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from schemas.update import UpdateEvent, seal


@dataclass(frozen=True)
class Outline:
    """What the stored header must say, from the events alone."""

    step: int
    events: int
    frames: int
    folded: str
    last_event: str


def chained(frames: Iterable[str], before: str = "") -> str:
    """The hash that a header has of these positions, folded in one after the other."""
    for position in frames:
        before = hashlib.sha256(f"{before}{position}".encode()).hexdigest()
    return before


def rebuilt(events: Sequence[UpdateEvent]) -> Outline:
    """Of a stream whose events are all there, in order."""
    folded, frames = "", 0
    for event in events:
        if event.decision == "deleted":
            folded, frames = "", 0
        frames += len(event.frames)
        folded = chained(event.frames, folded)
    last = events[-1]
    return Outline(last.step, last.number, frames, folded, seal(last).digest)
