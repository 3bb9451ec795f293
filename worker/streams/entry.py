"""What one write stores of a stream, and as which bytes."""

from __future__ import annotations

from dataclasses import dataclass

from meta.method import State
from schemas.state import Snapshot, StreamHeader, encode_header
from schemas.state_tensors import encode_tensors
from schemas.update import SealedEvent
from worker.store.compress import Compression, pack
from worker.store.store import Write


@dataclass(frozen=True)
class Entry:
    """A stream's next header, the events that explain it, and its tensors where they change.

    `approved`: parameters that a person has just approved. `snapshot`: keep the tensors for rollback, described so.
    `waiting`: earlier events, one per line, that lie beside the state and may not be in the topic yet.
    """

    header: StreamHeader
    events: tuple[SealedEvent, ...]
    tensors: State | None = None
    approved: State | None = None
    snapshot: Snapshot | None = None
    waiting: bytes = b""


def as_write(entry: Entry, token: int, compression: Compression) -> Write:
    """The entry as bytes for the store."""
    header, tensors, approved = entry.header, entry.tensors, entry.approved
    return Write(
        header.stream,
        token,
        header.events,
        encode_header(header),
        b"\n".join(filter(None, (entry.waiting, *(sealed.content for sealed in entry.events)))),
        pack(encode_tensors(tensors, header.step), compression) if tensors is not None else None,
        entry.snapshot.model_dump_json().encode() if entry.snapshot else None,
        pack(encode_tensors(approved, header.approved or 0), compression) if approved is not None else None,
    )
