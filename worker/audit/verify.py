"""Whether the audit trail is complete and unaltered. Each event carries the hash of its stream's previous one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Literal

from schemas.heads import Head
from schemas.state import StreamHeader
from schemas.update import UpdateEvent, digest
from worker.audit.read import Record

HASH_BYTES = 32  # SHA-256
Kind = Literal["unreadable", "altered", "missing", "forked", "reordered", "beginning", "waiting", "unstored"]


@dataclass(frozen=True)
class Finding:
    """What is wrong with which event."""

    kind: Kind
    event: str
    text: str


@dataclass
class Verification:
    """The result. `beginning` findings are no faults if the topic keeps events for a limited time, `waiting` ones never
    are."""

    streams: int = 0
    events: int = 0
    copies: int = 0
    findings: list[Finding] = field(default_factory=list)
    heads: dict[str, Head] = field(default_factory=dict)  # the newest event of every stream in the trail

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong, apart from events that are older than the topic keeps."""
        return all(finding.kind in {"beginning", "waiting"} for finding in self.findings)

    @property
    def complete(self) -> bool:
        """Whether every stream begins with its first event."""
        return all(finding.kind != "beginning" for finding in self.findings)


@dataclass
class _Stream:
    """What is kept of a stream's events: only hashes, as a trail may have millions of events.

    `hashes`: by number, concatenated if an event has several contents. `unlinked`: by number, the previous hashes that
    did not match when the event came. `last`: the highest number in the trail so far.
    """

    hashes: dict[int, bytes] = field(default_factory=dict)
    unlinked: dict[int, list[bytes]] = field(default_factory=dict)
    newest: UpdateEvent | None = None
    misplaced: list[Finding] = field(default_factory=list)
    last: int = 0

    def knows(self, number: int, hash: bytes) -> bool:
        """Whether event `number` has a content with this hash."""
        found = self.hashes.get(number, b"")
        return any(found[i : i + HASH_BYTES] == hash for i in range(0, len(found), HASH_BYTES))

    def add(self, event: UpdateEvent, hash: bytes) -> None:
        """Add a content that the event has not had so far."""
        number, previous = event.number, _hash_bytes(event.previous)
        self.hashes[number] = self.hashes.get(number, b"") + hash
        # The previous event, or its content with this hash, may still come.
        if not self.knows(number - 1, previous):
            self.unlinked.setdefault(number, []).append(previous)
        if self.newest is None or number >= self.newest.number:
            self.newest = event


def verify(
    records: Iterable[Record],
    stored: Mapping[str, StreamHeader] | None = None,
    beside: Iterable[Record] = (),
    now: Callable[[], Mapping[str, StreamHeader]] | None = None,
    heads: Mapping[str, Head] | None = None,
) -> Verification:
    """Check all records, in the order of the topic or the file.

    The chain cannot show that a stream's last event is missing or altered, because no event follows it; three other
    witnesses can. `stored` are the headers in the store, and `beside` the events stored beside them: one that is not in
    the topic yet is published by the stream's next worker, and belongs to the chain. `now` gives the headers after the
    records were read, as workers may have written more meanwhile; None: they have not. `heads` are the newest events
    at an earlier time, kept where nobody could change them.
    """
    verification, streams = Verification(), dict[str, _Stream]()
    oldest: datetime | None = None
    for record in records:
        if (event := _event(record, verification)) is not None:
            _collect(streams.setdefault(event.stream, _Stream()), event, record, verification)
            oldest = event.time if oldest is None else min(oldest, event.time)
    for record in beside:
        if (event := _event(record, verification)) is not None:
            _add_waiting(streams.setdefault(event.stream, _Stream()), event, record, verification)
    verification.streams = len(streams)
    for name, stream in sorted(streams.items()):
        verification.findings += _broken_links(name, stream)
        verification.findings += stream.misplaced
        if stream.newest is not None:
            hash = stream.hashes[stream.newest.number][-HASH_BYTES:].hex()
            verification.heads[name] = Head(event=stream.newest.number, time=stream.newest.time, hash=hash)
    for name, header in sorted((stored or {}).items()):
        if header.events:
            stream, what = streams.get(name, _Stream()), "the newest in the store"
            verification.findings += _compare_last(name, stream, header.events, header.last_event, what)
    for name, head in sorted((heads or {}).items()):
        verification.findings += _compare_head(name, streams.get(name, _Stream()), head, oldest)
    if stored is not None:
        newest = stored if now is None else now()
        for name, stream in sorted(streams.items()):
            verification.findings += _unstored(name, stream, newest[name].events if name in newest else 0)
    return verification


def _event(record: Record, verification: Verification) -> UpdateEvent | None:
    event = record.event
    if event is None:
        verification.findings.append(Finding("unreadable", record.where, record.damage or "is no update event"))
    elif event.id != f"{event.stream}@{event.number}":
        verification.findings.append(Finding("altered", event.id, f"says it is of stream {event.stream!r}"))
        return None
    return event


def _add_waiting(stream: _Stream, event: UpdateEvent, record: Record, verification: Verification) -> None:
    if event.number not in stream.hashes:
        text = f"is {record.where}; the stream's next worker publishes it"
        verification.findings.append(Finding("waiting", event.id, text))
        stream.add(event, _hash_bytes(digest(record.content)))


def _collect(stream: _Stream, event: UpdateEvent, record: Record, verification: Verification) -> None:
    number, hash = event.number, _hash_bytes(digest(record.content))
    if stream.knows(number, hash):
        verification.copies += 1  # Published again after a crash.
        return
    if number in stream.hashes:
        verification.findings.append(Finding("forked", event.id, f"has another content at {record.where} than before"))
    else:
        verification.events += 1
        if number < stream.last:
            text = f"comes after {event.stream}@{stream.last}"
            stream.misplaced.append(Finding("reordered", event.id, text))
        stream.last = max(stream.last, number)
    stream.add(event, hash)


def _hash_bytes(hash: str) -> bytes:
    """A hash as bytes, half as long as its text; anything else becomes bytes that match no hash."""
    try:
        return bytes.fromhex(hash)
    except ValueError:
        return b"no hash"


def _broken_links(name: str, stream: _Stream) -> list[Finding]:
    """Gaps in the numbers, and events that do not carry the hash of the one before them."""
    findings = []
    numbers = sorted(stream.hashes)
    if numbers[0] > 1:
        text = f"is the oldest here; {numbers[0] - 1} before it are not"
        findings.append(Finding("beginning", f"{name}@{numbers[0]}", text))
    elif any(stream.unlinked.get(1, ())):
        findings.append(Finding("altered", f"{name}@1", "is the first, and names a previous one"))
    for before, after in pairwise(numbers):
        if after > before + 1:
            last = f" to {name}@{after - 1}" if after > before + 2 else ""
            findings.append(Finding("missing", f"{name}@{before + 1}{last}", f"between {name}@{before} and @{after}"))
        elif any(not stream.knows(before, previous) for previous in stream.unlinked.get(after, ())):
            text = f"does not have the hash that {name}@{after} carries: one of the two was altered"
            findings.append(Finding("altered", f"{name}@{before}", text))
    return findings


def _compare_last(name: str, stream: _Stream, number: int, expected: str, what: str) -> list[Finding]:
    """Compare with what another witness, `what`, says is the last event."""
    last = f"{name}@{number}"
    if number not in stream.hashes:
        return [Finding("missing", last, f"is {what}")]
    if not stream.knows(number, _hash_bytes(expected)):
        return [Finding("altered", last, f"does not have the hash of {what}")]
    return []


def _compare_head(name: str, stream: _Stream, head: Head, oldest: datetime | None) -> list[Finding]:
    """Compare with the last event of an earlier time, unless it is older than what the topic keeps."""
    older = head.event < min(stream.hashes) if stream.hashes else oldest is not None and head.time < oldest
    if older:
        return [
            Finding("beginning", f"{name}@{head.event}", f"is the stream's head of {head.time}, older than all here")
        ]
    return _compare_last(name, stream, head.event, head.hash, "the stream's head")


def _unstored(name: str, stream: _Stream, newest: int) -> list[Finding]:
    """Events after the newest in the store. There can be none, as each is stored before it is published."""
    found = sorted(number for number in stream.hashes if number > newest)
    if not found:
        return []
    last = f" to {name}@{found[-1]}" if len(found) > 1 else ""
    text = f"is after @{newest}, the newest in the store" if newest else "is of a stream that the store does not know"
    return [Finding("unstored", f"{name}@{found[0]}{last}", text)]
