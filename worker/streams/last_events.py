"""The last events of a stream, as they lie beside its state in the store, or in its place: one a line."""

from __future__ import annotations

from pydantic import ValidationError

from schemas.state import MAX_COUNT, StreamHeader
from schemas.update import SealedEvent, UpdateEvent

MAX_EVENT_BYTES = 1_000_000  # a larger one is none of a worker's, and brokers refuse it for ever
MAX_EVENTS = 1 << 14  # in as many bytes as they may have beside a state; none has 256 bytes or fewer


def after_last_event(header: StreamHeader, content: bytes | None) -> StreamHeader:
    """A header that is lost still has its last event beside it: the numbers and the chain go on from there."""
    events = events_beside(header.stream, content)
    return header.behind(events[-1]) if events else header


def events_beside(stream: str, content: bytes | None) -> list[SealedEvent]:
    """The events that lie beside the state of a stream, one a line, or in its place. What no worker wrote there is left
    out: another stream's, one that no broker takes, or a number that no header has room for."""
    found = []
    for line in lines_beside(content):
        if len(line) > MAX_EVENT_BYTES:
            continue
        try:
            event = UpdateEvent.model_validate_json(line)
        except ValidationError:
            continue
        if event.stream == stream and event.id == f"{stream}@{event.number}" and event.number < MAX_COUNT:
            found.append(SealedEvent(event, line))
    return found


def lines_beside(content: bytes | None) -> list[bytes]:
    """What lies beside a state, one event a line. Where there are more than can be, the last line has the rest."""
    return content.split(b"\n", MAX_EVENTS) if content else []
