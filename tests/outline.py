"""What a stream's events say of its state, rebuilt from them alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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


def rebuilt(events: Sequence[UpdateEvent]) -> Outline:
    """Of a stream whose events are all there, in order."""
    folded, frames = "", 0
    for event in events:
        if event.decision == "deleted":
            folded, frames = "", 0
        frames += len(event.frames)
        for position in event.frames:
            folded = hashlib.sha256(f"{folded}{position}".encode()).hexdigest()
    last = events[-1]
    return Outline(last.step, last.number, frames, folded, seal(last).digest)
