"""A stream's events in short: a summary of all, and spans of consecutive events of one kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

from schemas.update import Decision, Proxies, UpdateEvent

ROUTINE = frozenset({"applied", "partial", "skipped"})


@dataclass
class Span:
    """Consecutive events with one decision for one kind of reason. `layers`: how far each moved, summed over them."""

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


class EventNumbers:
    """A set of event numbers that takes little memory while nearly all of them are consecutive."""

    def __init__(self) -> None:
        self._first = self._last = 0  # the ends of a run without gaps
        self._others: set[int] = set()

    def add(self, number: int) -> bool:
        """Add a number; False if it is there already."""
        if self._first <= number <= self._last or number in self._others:
            return False
        if not self._first:
            self._first = self._last = number
            return True
        self._others.add(number)
        while self._last + 1 in self._others:
            self._others.remove(self._last + 1)
            self._last += 1
        while self._first - 1 in self._others:
            self._others.remove(self._first - 1)
            self._first -= 1
        return True


@dataclass
class Summary:
    """Counts and ends of a stream's events. They may come in any order; each counts once."""

    decisions: Counter[Decision] = field(default_factory=Counter)
    commands: int = 0
    begun: UpdateEvent | None = None  # the first with estimates from before it
    last: UpdateEvent | None = None
    judged: UpdateEvent | None = None  # the last with estimates from after it
    measured: UpdateEvent | None = None  # the last with a distance
    numbers: EventNumbers = field(default_factory=EventNumbers)

    def add(self, event: UpdateEvent) -> None:
        """Take one event; one that has come before changes nothing."""
        if not self.numbers.add(event.number):
            return
        self.decisions[event.decision] += 1
        self.commands += event.command is not None
        self.last = _later(self.last, event)
        if event.before is not None and (self.begun is None or event.number < self.begun.number):
            self.begun = event
        if event.after is not None:
            self.judged = _later(self.judged, event)
        if event.source_distance is not None:
            self.measured = _later(self.measured, event)


def _later(known: UpdateEvent | None, event: UpdateEvent) -> UpdateEvent:
    return event if known is None or event.number > known.number else known


def summaries(events: Iterable[UpdateEvent]) -> dict[str, Summary]:
    """The summary of every stream, by name."""
    found: dict[str, Summary] = {}
    for event in events:
        found.setdefault(event.stream, Summary()).add(event)
    return dict(sorted(found.items()))


def spans(events: Iterable[UpdateEvent]) -> list[Span]:
    """Group a stream's events, given in order. Only routine events share a span; undone ones and commands do not."""
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
