"""Update events from their topic, or from a file with one a line, as they were published: byte by byte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from schemas.config import Kafka
from schemas.errors import StateError
from schemas.update import UpdateEvent
from worker.kafka.batches import Unreadable
from worker.kafka.topic import records_now

MAX_LINE_BYTES = 4 << 20


@dataclass(frozen=True)
class Record:
    """Bytes that should be an event, and where they were found.

    Where `records` records of the topic could not be read, they are one of these without bytes, and `damage` says why.
    """

    content: bytes
    where: str
    damage: str = ""
    records: int = 1

    @property
    def event(self) -> UpdateEvent | None:
        """None where they are no event."""
        try:
            return UpdateEvent.model_validate_json(self.content)
        except ValidationError:
            return None


def read_topic(settings: Kafka) -> Iterator[Record]:
    """All records that are in the updates topic now, each partition in its order; also what cannot be read of it.

    Raises ConfigError where there is no such topic, UnreachableError where the broker is away.
    """
    yield from map(_found, records_now(settings, settings.topics.updates))


def _found(record: Any) -> Record:
    where = f"{record.topic}/{record.partition}/{record.offset}"
    if isinstance(record.value, Unreadable):
        return Record(b"", where, record.value.reason, record.value.records)
    return Record(record.value or b"", where)


def read_file(path: Path) -> Iterator[Record]:
    """One record a line, as `driftkeel audit export` writes them. Raises StateError where it cannot be read."""
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


def histories(records: Iterable[Record], strays: list[str] | None = None) -> dict[str, list[UpdateEvent]]:
    """The events of every stream, in order, each once; what is no event is left out, and its place added to `strays`.

    Where a number has several contents, because the store had fallen behind, the last one counts.
    """
    found: dict[str, dict[int, UpdateEvent]] = {}
    for record in records:
        event = record.event
        if event is not None:
            found.setdefault(event.stream, {})[event.number] = event
        elif strays is not None:
            strays.append(record.where)
    return {stream: [events[n] for n in sorted(events)] for stream, events in sorted(found.items())}
