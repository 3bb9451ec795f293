"""Is the audit trail whole, and as it was written? Each event carries the hash of its stream's previous one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from schemas.heads import Head
from schemas.state import StreamHeader
from schemas.update import UpdateEvent, digest
from worker.audit.read import Record

Kind = Literal["unreadable", "altered", "missing", "forked", "reordered", "beginning", "waiting", "unstored"]


@dataclass(frozen=True)
class Finding:
    """What is wrong with which event."""

    kind: Kind
    event: str
    text: str


@dataclass
class Verdict:
    """All that was found. `beginning`s are no faults where the topic keeps events for a limited time, `waiting` ones
    never."""

    streams: int = 0
    events: int = 0
    copies: int = 0
    findings: list[Finding] = field(default_factory=list)
    heads: dict[str, Head] = field(default_factory=dict)  # of streams with events here, the newest

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong but for what is older than the topic keeps."""
        return all(finding.kind in {"beginning", "waiting"} for finding in self.findings)

    @property
    def complete(self) -> bool:
        """Whether every stream begins with its first event."""
        return all(finding.kind != "beginning" for finding in self.findings)


@dataclass
class _Stream:
    contents: dict[int, list[tuple[bytes, UpdateEvent, str]]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)


def verify(
    records: Iterable[Record],
    stored: Mapping[str, StreamHeader] | None = None,
    beside: Iterable[Record] = (),
    now: Callable[[], Mapping[str, StreamHeader]] | None = None,
    heads: Mapping[str, Head] | None = None,
) -> Verdict:
    """Check all records, in the order in which they lie in the topic or the file.

    The chain cannot tell what is wrong with a stream's last events, as none follows them: `stored`, the headers in
    the store, can. `beside` are the events that lie there beside the states: one that is not in the topic yet comes
    with the stream's next worker, and is a link of the chain all the same. `now`: the headers once the records are
    read, as workers may have written more since `stored` was; where None, they have not. `heads`: what the trail ended
    with at some time before, kept where nobody could change it.
    """
    verdict, streams = Verdict(), dict[str, _Stream]()
    for record in records:
        if (event := _event(record, verdict)) is not None:
            _collect(streams.setdefault(event.stream, _Stream()), event, record, verdict)
    for record in beside:
        if (event := _event(record, verdict)) is not None:
            _add_waiting(streams.setdefault(event.stream, _Stream()), event, record, verdict)
    verdict.streams = len(streams)
    for name, stream in sorted(streams.items()):
        verdict.findings += _links(name, stream)
        verdict.findings += _order(name, stream.order)
        verdict.heads[name] = _head(stream)
    for name, header in sorted((stored or {}).items()):
        if header.events:
            stream, what = streams.get(name, _Stream()), "the newest in the store"
            verdict.findings += _end(name, stream, header.events, header.last_event, what)
    for name, head in sorted((heads or {}).items()):
        verdict.findings += _since(name, streams, head)
    if stored is not None:
        newest = stored if now is None else now()
        for name, stream in sorted(streams.items()):
            verdict.findings += _beyond(name, stream, newest[name].events if name in newest else 0)
    return verdict


def _event(record: Record, verdict: Verdict) -> UpdateEvent | None:
    event = record.event
    if event is None:
        verdict.findings.append(Finding("unreadable", record.where, record.damage or "is no update event"))
    elif event.id != f"{event.stream}@{event.number}":
        verdict.findings.append(Finding("altered", event.id, f"says it is of stream {event.stream!r}"))
        return None
    return event


def _add_waiting(stream: _Stream, event: UpdateEvent, record: Record, verdict: Verdict) -> None:
    if event.number not in stream.contents:
        text = f"is {record.where}; the stream's next worker publishes it"
        verdict.findings.append(Finding("waiting", event.id, text))
        stream.contents[event.number] = [(record.content, event, record.where)]


def _collect(stream: _Stream, event: UpdateEvent, record: Record, verdict: Verdict) -> None:
    versions = stream.contents.setdefault(event.number, [])
    if any(content == record.content for content, _, _ in versions):
        verdict.copies += 1  # Published again after a crash.
        return
    if not versions:
        verdict.events += 1
        stream.order.append(event.number)
    else:
        places = ", ".join(where for _, _, where in versions)
        text = f"another content at {record.where} than at {places}"
        verdict.findings.append(Finding("forked", event.id, text))
    versions.append((record.content, event, record.where))


def _links(name: str, stream: _Stream) -> list[Finding]:
    """Gaps in the numbers, and events that do not carry the hash of the one before them."""
    findings = []
    numbers = sorted(stream.contents)
    if numbers[0] > 1:
        text = f"is the oldest here; {numbers[0] - 1} before it are not"
        findings.append(Finding("beginning", f"{name}@{numbers[0]}", text))
    elif any(event.previous for _, event, _ in stream.contents[1]):
        findings.append(Finding("altered", f"{name}@1", "is the first, and names a previous one"))
    for before, after in pairwise(numbers):
        if after > before + 1:
            last = f" to {name}@{after - 1}" if after > before + 2 else ""
            findings.append(Finding("missing", f"{name}@{before + 1}{last}", f"between {name}@{before} and @{after}"))
            continue
        known = {digest(content) for content, _, _ in stream.contents[before]}
        if any(event.previous not in known for _, event, _ in stream.contents[after]):
            text = f"does not have the hash that {name}@{after} carries: one of the two was altered"
            findings.append(Finding("altered", f"{name}@{before}", text))
    return findings


def _order(name: str, order: list[int]) -> list[Finding]:
    findings, newest = [], 0
    for number in order:
        if number < newest:
            findings.append(Finding("reordered", f"{name}@{number}", f"comes after {name}@{newest}"))
        newest = max(newest, number)
    return findings


def _head(stream: _Stream) -> Head:
    content, event, _ = stream.contents[max(stream.contents)][-1]
    return Head(event=event.number, time=event.time, hash=digest(content))


def _end(name: str, stream: _Stream, number: int, expected: str, what: str) -> list[Finding]:
    """Compare with what somebody else says was the last event."""
    last = f"{name}@{number}"
    if number not in stream.contents:
        return [Finding("missing", last, f"is {what}")]
    if expected not in {digest(content) for content, _, _ in stream.contents[number]}:
        return [Finding("altered", last, f"does not have the hash of {what}")]
    return []


def _since(name: str, streams: Mapping[str, _Stream], head: Head) -> list[Finding]:
    """Compare with what was the last event once. Where that is older than what the topic keeps, nothing follows from
    it."""
    stream = streams.get(name, _Stream())
    if _older(head, stream, streams.values()):
        return [
            Finding("beginning", f"{name}@{head.event}", f"is the stream's head of {head.time}, older than all here")
        ]
    return _end(name, stream, head.event, head.hash, "the stream's head")


def _older(head: Head, stream: _Stream, streams: Iterable[_Stream]) -> bool:
    if stream.contents:
        return head.event < min(stream.contents)
    kept = (event.time for other in streams for versions in other.contents.values() for _, event, _ in versions)
    return head.time < min(kept, default=head.time)


def _beyond(name: str, stream: _Stream, newest: int) -> list[Finding]:
    """Events that come after the newest in the store, where each is before it is published."""
    found = sorted(number for number in stream.contents if number > newest)
    if not found:
        return []
    last = f" to {name}@{found[-1]}" if len(found) > 1 else ""
    text = f"is after @{newest}, the newest in the store" if newest else "is of a stream that the store does not know"
    return [Finding("unstored", f"{name}@{found[0]}{last}", text)]
