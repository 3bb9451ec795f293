"""Deletes streams. All that is stored of one is removed, and its last event says so.

That event stays in the store in place of the stream. If the stream begins again, the numbers and the chain of its
events go on from there. If the event did not reach the topic, deleting the stream again sends it.
"""

from __future__ import annotations

import contextlib
import threading
from shlex import quote

from schemas.config import Kafka
from schemas.errors import StateError, UnreachableError
from schemas.state import StreamHeader, decode_header
from schemas.update import SealedEvent, UpdateEvent, seal
from worker.control.stored import listed, unknown
from worker.publish.publisher import ACKNOWLEDGE_TIMEOUT_S, Publisher
from worker.store.store import Claimed, Overview, StateStore
from worker.streams.last_events import after_last_event, events_beside


def delete(store: StateStore, stream: str, reason: str, name: str) -> list[SealedEvent]:
    """Remove a stream. Returns the events to publish: those that may not be in the topic yet, and its last one.

    Raises StateError where nothing is stored of it, and where a worker has claimed it at the same moment.
    """
    if store.read(stream).token == 0:
        before = store.deleted(stream)
        if before is None:
            raise unknown(store, stream)
        return events_beside(stream, before)
    (claimed,) = store.claim([stream], name, "last")
    waiting = events_beside(stream, claimed.event)
    last = _last(stream, claimed, waiting, reason, name)
    if not store.delete(stream, claimed.token, last.content):
        raise StateError(f"a worker claimed stream {stream!r} at the same moment and nothing was deleted; try again")
    return [*waiting, last]


def of_few_frames(store: StateStore, most: int, among: list[str] | None = None) -> list[str]:
    """Streams with at most so many frames, `among` these or all, in the order of their names. A stream that cannot be
    read or used is not among them, as nobody knows how many frames it has had."""
    found = [one for one in listed(store, among) if one.condition == "ok"]
    return [one.stream for one in found if one.header is not None and one.header.frames <= most]


def described(store: StateStore, stream: str, found: Overview) -> str:
    """What there is to delete, in short. Raises StateError where there is nothing, or what no worker wrote."""
    if found.foreign:
        raise StateError(f"stream {stream!r} cannot be deleted: {found.foreign}")
    if found.token:
        return f"{found.tensor_bytes:,} bytes, {found.snapshots} snapshots, last with {found.owner}"
    if store.deleted(stream) is None:
        raise unknown(store, stream)
    return "deleted before; its last event will be sent again"


def publish(kafka: Kafka, name: str, events: list[SealedEvent]) -> None:
    """Send events and wait until the broker has them. Raises UnreachableError where it does not take them."""
    stop = threading.Event()
    publisher = Publisher(kafka, name, stop, stop_patience_s=ACKNOWLEDGE_TIMEOUT_S)
    stop.set()  # So `settle` tries once, for half a minute at most. The command can be given again.
    for sealed in events:
        publisher.update(sealed)
    try:
        publisher.settle(lambda: None)
    except UnreachableError as error:
        stream = events[-1].event.stream
        what = f"stream {stream!r} is deleted, 'driftkeel streams delete -- {quote(stream)}' sends its last event"
        raise UnreachableError(f"{error}; {what}") from error
    finally:
        publisher.close()


def _last(stream: str, claimed: Claimed, waiting: list[SealedEvent], reason: str, name: str) -> SealedEvent:
    bundle = waiting[-1].event.bundle if waiting else ""
    header = after_last_event(StreamHeader(stream=stream, bundle=bundle, method=""), claimed.event)
    # A header that cannot be read is deleted, too. The event beside it tells where the chain is.
    with contextlib.suppress(StateError):
        header = decode_header(claimed.header) if claimed.header else header
    return seal(
        UpdateEvent(
            **header.next_in_chain(),
            decision="deleted",
            reason=reason,
            frames=[],
            step=0,
            parameters="source",
            token=claimed.token,
            bundle=header.bundle,
            worker=name,
        )
    )
