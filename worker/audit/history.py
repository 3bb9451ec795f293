"""What a stream's events say, in short: spans of events of one kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
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


class EventNumbers:
    """Which numbers there were, in little memory where nearly all follow each other."""

    def __init__(self) -> None:
        self._first = self._last = 0  # all from the first to the last were there
        self._others: set[int] = set()

    def add(self, number: int) -> bool:
        """Whether it was not there before."""
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
    """A stream's events in short, in whatever order they come, each counted once."""

    decisions: Counter[Decision] = field(default_factory=Counter)
    commands: int = 0
    begun: UpdateEvent | None = None  # the first that has estimates of before
    last: UpdateEvent | None = None
    judged: UpdateEvent | None = None  # the last that has estimates of after
    measured: UpdateEvent | None = None  # the last that has a distance
    numbers: EventNumbers = field(default_factory=EventNumbers)

    def add(self, event: UpdateEvent) -> None:
        """One more; nothing where it came before."""
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
    """Of every stream, by name."""
    found: dict[str, Summary] = {}
    for event in events:
        found.setdefault(event.stream, Summary()).add(event)
    return dict(sorted(found.items()))


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
