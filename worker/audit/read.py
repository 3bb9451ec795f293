"""Update events as published, byte by byte, from their topic or from a file with one per line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from pydantic import ValidationError

from schemas.config import Kafka
from schemas.errors import StateError
from schemas.frame import Position
from schemas.update import UpdateEvent
from worker.kafka.batches import Unreadable
from worker.kafka.topic import records_now

MAX_LINE_BYTES = 4 << 20


@dataclass(frozen=True)
class Record:
    """Bytes that should be an event, and where they were found.

    A run of `records` records that could not be read is one Record without bytes, and `damage` says why.
    """

    content: bytes
    where: str
    damage: str = ""
    records: int = 1

    @property
    def event(self) -> UpdateEvent | None:
        """The event; None if the bytes are not one."""
        try:
            return UpdateEvent.model_validate_json(self.content)
        except ValidationError:
            return None


def read_topic(settings: Kafka, since: datetime | None = None) -> Iterator[Record]:
    """All records that are in the updates topic now, each partition in order, unreadable ones too.

    With `since`, most events before that time are left out, and none after it. Raises ConfigError if there is no such
    topic, UnreachableError if the broker is away.
    """
    yield from map(_found, records_now(settings, settings.topics.updates, since))


def _found(record: Any) -> Record:
    where = str(Position.of(record))
    if isinstance(record.value, Unreadable):
        return Record(b"", where, record.value.reason, record.value.records)
    return Record(record.value or b"", where)


def read_file(path: Path) -> Iterator[Record]:
    """The records of a file that `driftkeel audit export` wrote, one per line. Raises StateError."""
    try:
        with path.open("rb") as lines:
            number = 0
            while line := lines.readline(MAX_LINE_BYTES):
                number += 1
                if not line.endswith(b"\n") and len(line) == MAX_LINE_BYTES:
                    raise StateError(f"{path}, line {number} is longer than any event; is it one event a line?")
                if line.strip():
                    yield Record(line.rstrip(b"\r\n"), f"{path.name}, line {number}")
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class EventFilter:
    """Which events are wanted; all by default. `since` is included, `until` is not."""

    streams: Set[str] = frozenset()
    since: datetime | None = None
    until: datetime | None = None

    def takes(self, event: UpdateEvent) -> bool:
        """Whether the event is wanted."""
        return (
            (not self.streams or event.stream in self.streams)
            and (self.since is None or event.time >= self.since)
            and (self.until is None or event.time < self.until)
        )

    def may_take(self, content: bytes) -> bool:
        """Whether the bytes may be a wanted event. Saves parsing most records if one camera of many is wanted."""
        return not self._needles or any(needle in content for needle in self._needles)

    @cached_property
    def _needles(self) -> tuple[bytes, ...]:
        """Bytes of which a wanted event contains at least one; empty if JSON could escape a letter of a name."""
        plain = all(name.isascii() and name.isprintable() and not {'"', "\\"} & set(name) for name in self.streams)
        return tuple(name.encode() for name in self.streams) if plain else ()


ALL_EVENTS = EventFilter()


@dataclass
class Coverage:
    """What was read besides the wanted events. `events` counts update events that were not wanted."""

    events: int = 0
    strays: int = 0  # records that are no update events
    first_stray: str = ""  # where the first of them was


class History(Sequence[UpdateEvent]):
    """A stream's events in order, each once. Kept as bytes and parsed at each access, as objects take six times the
    memory."""

    def __init__(self, contents: Mapping[int, bytes]) -> None:
        self._contents = [contents[number] for number in sorted(contents)]

    def __len__(self) -> int:
        return len(self._contents)

    def __iter__(self) -> Iterator[UpdateEvent]:
        return map(UpdateEvent.model_validate_json, self._contents)

    @overload
    def __getitem__(self, place: int) -> UpdateEvent: ...
    @overload
    def __getitem__(self, place: slice) -> list[UpdateEvent]: ...
    def __getitem__(self, place: int | slice) -> UpdateEvent | list[UpdateEvent]:
        found = self._contents[place]
        if isinstance(found, bytes):
            return UpdateEvent.model_validate_json(found)
        return [UpdateEvent.model_validate_json(content) for content in found]


def histories(
    records: Iterable[Record], wanted: EventFilter = ALL_EVENTS, coverage: Coverage | None = None
) -> dict[str, History]:
    """The wanted events of every stream, by its name.

    If a number has several contents, because the store had fallen behind, the last one counts.
    """
    found: dict[str, dict[int, bytes]] = {}
    for event, content in events_of(records, wanted, coverage):
        found.setdefault(event.stream, {})[event.number] = content
    return {stream: History(contents) for stream, contents in sorted(found.items())}


def events_of(
    records: Iterable[Record], wanted: EventFilter, coverage: Coverage | None = None
) -> Iterator[tuple[UpdateEvent, bytes]]:
    """The wanted events in the order of the records, with their bytes."""
    coverage = coverage or Coverage()
    for record in records:
        if not wanted.may_take(record.content):
            continue
        event = record.event
        if event is None:
            coverage.strays += 1
            coverage.first_stray = coverage.first_stray or record.where
        elif wanted.takes(event):
            yield event, record.content
        else:
            coverage.events += 1
