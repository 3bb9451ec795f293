"""What a stream's events say, in short: spans of events of one kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from schemas.update import Decision, Proxies, UpdateEvent

ROUTINE = frozenset({"applied", "partial", "skipped"})


@dataclass
class Span:
    """Events in a row that decided the same for the same kind of reason; `layers` moved so far in all of them."""

    decision: Decision
    reason: str
    begin: datetime
    end: datetime
    first: str
    events: int = 0
    frames: int = 0
    flipped: int = 0
    compared: bool = False
    step: int = 0
    distance: float | None = None
    layers: Counter[str] = field(default_factory=Counter)
    before: Proxies | None = None
    after: Proxies | None = None
    answers: str = ""

    def add(self, event: UpdateEvent) -> None:
        """The next event of the span."""
        self.end, self.step, self.answers = event.time, event.step, event.parameters
        self.events += 1
        self.frames += len(event.frames)
        self.flipped += event.flipped or 0
        self.compared |= event.flipped is not None
        self.distance = event.source_distance if event.source_distance is not None else self.distance
        self.layers.update(event.layers)
        self.after = event.after or self.after

    def most_moved(self, count: int = 3) -> list[tuple[str, float]]:
        """The layers that moved furthest, counted along the way."""
        return [(layer, moved) for layer, moved in self.layers.most_common(count) if moved > 0]


def spans(events: Iterable[UpdateEvent]) -> list[Span]:
    """A stream's events in order, those of one kind together; what people and the guard undid stands alone."""
    found: list[Span] = []
    for event in events:
        last = found[-1] if found else None
        alike = (
            last is not None
            and event.decision in ROUTINE
            and event.command is None
            and (last.decision, kind(last.reason), last.answers)
            == (event.decision, kind(event.reason), event.parameters)
        )
        if last is None or not alike:
            last = Span(event.decision, event.reason, event.time, event.time, event.id, before=event.before)
            found.append(last)
        last.add(event)
    return found


def kind(reason: str) -> str:
    """A reason without its numbers."""
    return "".join(letter for letter in reason if not letter.isdigit() and letter not in ".,%-+e")


def within(
    histories: dict[str, list[UpdateEvent]], streams: Sequence[str], since: datetime | None, until: datetime | None
) -> dict[str, list[UpdateEvent]]:
    """Only these streams (all where none is named), and only this time."""
    chosen = {stream: events for stream, events in histories.items() if not streams or stream in streams}
    return {
        stream: kept
        for stream, events in chosen.items()
        if (kept := [e for e in events if (not since or e.time >= since) and (not until or e.time < until)])
    }
