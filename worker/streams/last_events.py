"""A stream's last events, one per line, as they lie beside its state in the store, or in place of a deleted one."""

from __future__ import annotations

from pydantic import ValidationError

from schemas.state import MAX_COUNT, StreamHeader
from schemas.update import SealedEvent, UpdateEvent

MAX_EVENT_BYTES = 1_000_000  # no worker writes a larger one, and brokers would refuse it for ever
MAX_EVENTS = 1 << 14  # lines: an event has more than 256 bytes, so that no more fit into MAX_EVENTS_BYTES


def after_last_event(header: StreamHeader, content: bytes | None) -> StreamHeader:
    """The header with the number and the hash of the last event beside it, where the stored header is lost."""
    events = events_beside(header.stream, content)
    return header.behind(events[-1]) if events else header


def events_beside(stream: str, content: bytes | None) -> list[SealedEvent]:
    """The events beside a stream's state, or in its place. What no worker wrote is left out: events of other streams,
    events that no broker takes, and numbers that are too large for a header."""
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
    """The lines beside a state. If there are more than MAX_EVENTS, the last one has the rest."""
    return content.split(b"\n", MAX_EVENTS) if content else []
