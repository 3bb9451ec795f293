"""Streams between store and engine: claimed and loaded when a frame needs them, written after every step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial

from meta.method import State
from monitoring.metrics import WorkerMetrics
from monitoring.observe import decided
from schemas.config import Adapt
from schemas.config import Store as StoreSettings
from schemas.errors import StateError
from schemas.state import MAX_EVENTS_BYTES, Snapshot, StreamHeader, decode_header
from schemas.update import UpdateEvent
from worker.consume.short_logs import cure
from worker.engine.engine import Engine
from worker.engine.resident import Resident
from worker.guard.answer import Policies
from worker.publish.publisher import Publisher
from worker.store.retry import StoreRetry
from worker.store.store import Claimed, Overview, StateStore, Which, Write
from worker.streams.entry import Entry, as_write
from worker.streams.last_events import events_beside, lines_beside
from worker.streams.newcomers import Newcomers
from worker.streams.obey import Context, Subject, taken_in
from worker.streams.restore import Restored, Restorer, chosen_snapshot
from worker.streams.upgrade import Upgrade

log = logging.getLogger("driftkeel.streams")
LOOK_AGAIN_S = 30.0  # for streams that cannot be stored
LOST_EVENTS = (
    "the events beside the state of stream %s are empty or have more than %d bytes, and none of them is published; "
    "'driftkeel audit verify --store' says whether one is missing"
)
FORGOTTEN = "the stored state is gone, and all else that the store knew of the stream"
MOST_KNOWN = 100_000  # streams; of others it is not noticed that the store has lost them
CLAIM_BYTES = 16 << 20  # of states that one answer of the store brings, where none is larger


class Streams:
    """Which streams are resident, and that what is stored and what is in memory agree."""

    def __init__(
        self,
        engine: Engine,
        store: StateStore,
        publisher: Publisher,
        metrics: WorkerMetrics,
        worker: str,
        limits: Adapt,
        settings: StoreSettings,
        retry: StoreRetry,
        policies: Policies,
        upgrade: Upgrade,
        beyond: Callable[[Mapping[str, int]], str] = lambda positions: "",
    ) -> None:
        """`beyond` says what is wrong with a stream's positions; empty where nothing is known to be."""
        self._policies, self._beyond = policies, beyond
        self.engine, self._store, self._publisher, self._metrics = engine, store, publisher, metrics
        self._worker, self._restorer = worker, Restorer(engine, upgrade, settings.max_state_bytes)
        by_bytes = limits.max_resident_bytes // engine.state_bytes
        self._max_resident = max(1, min(limits.max_resident_streams, by_bytes))
        engine.reserve(self._max_resident)
        self._snapshot_every, self._max_state_bytes = settings.snapshot_every, settings.max_state_bytes
        self._compression = settings.compression
        self._retry = retry
        self._newcomers = Newcomers(settings.max_streams, lambda: retry(store.count))
        self._homeless: set[str] = set()
        self._contested: set[str] = set()
        # Of streams that the store has had: events, and the last one's hash.
        self._known: dict[str, tuple[int, str]] = {}
        self._looked = 0.0

    def ensure(self, wanted: Iterable[str]) -> list[str]:
        """Make streams resident; returns those that were not. New ones for which the store has no room stay away."""
        wanted = list(dict.fromkeys(wanted))
        new: dict[str, None] = {}
        refused: set[str] = set()
        # Again, because streams that were resident may go while a store that is away is waited for.
        while missing := [stream for stream in wanted if stream not in self.engine and stream not in refused]:
            refused |= self._claim(missing)
            new |= dict.fromkeys(stream for stream in missing if stream not in refused)
            self._metrics.resident.set(len(self.engine))
        return list(new)

    def _claim(self, streams: list[str]) -> set[str]:
        """Take streams in, but for new ones for which there is no room: these are returned."""
        new = self._take_in(streams, "known")
        begun = new[: self._newcomers.admit(len(new))]
        if begun:
            self._take_in(begun, "any")
        return set(new[len(begun) :])

    def _take_in(self, streams: list[str], which: Which) -> list[str]:
        """Claim streams and make them resident, piece by piece. Returns those that would have begun."""
        size = max(1, CLAIM_BYTES // self.engine.state_bytes)
        pieces = (streams[start : start + size] for start in range(0, len(streams), size))
        return [stream for piece in pieces for stream in self._take_in_at_once(piece, which)]

    def _take_in_at_once(self, streams: list[str], which: Which) -> list[str]:
        with self._metrics.store_seconds.labels("claim").time():
            claims = self._retry(lambda: self._store.claim(streams, self._worker, which))
        changed, new = [], []
        self._name_rivals(dict(zip(streams, claims, strict=True)))
        for stream, claimed in zip(streams, claims, strict=True):
            if claimed.foreign:
                self._take_in_homeless(stream, claimed.foreign)
                continue
            if not claimed.token:
                new.append(stream)
                continue
            self._publish_again(stream, claimed.event)
            restored = self._remembered(claimed, self._restorer.restored(stream, claimed))
            if wrong := self._beyond(restored.state.header.positions):
                self._take_in_homeless(stream, f"{wrong}; {cure(stream)}")
                continue
            stored = claimed.header is not None and not restored.change
            if claimed.event == b"" and restored.state.header.events:
                log.warning(LOST_EVENTS, stream, MAX_EVENTS_BYTES, extra=_of(stream))
            self.engine.admit(restored.state, claimed.token, stored, restored.approved)
            resident = self.engine.resident(stream)
            resident.lost = time.monotonic() if restored.lost else 0.0
            resident.contested = stream in self._contested
            self._contested.discard(stream)
            if restored.change:
                changed.append(replace(self._changed(restored, restored.change), waiting=claimed.event or b""))
        self._explain(changed)
        return new

    def _name_rivals(self, claims: Mapping[str, Claimed]) -> None:
        """Who had claimed streams of ours. Once it is a rebalance; without end, two sites that share a prefix."""
        by: dict[str, list[str]] = {}
        for stream in claims.keys() & self._contested:
            by.setdefault(claims[stream].before, []).append(stream)
        for owner in by.keys() - {"", self._worker}:  # A store that has lost the last claim names who had it before.
            log.warning("worker %s had claimed %d of our streams, such as %s", owner, len(by[owner]), min(by[owner]))

    def _remembered(self, claimed: Claimed, restored: Restored) -> Restored:
        """The same; but where the store knows nothing of a stream that it had, its numbers and chain go on, and an
        event says so. One that was deleted has left its last event."""
        header = restored.state.header
        if claimed.header is not None or claimed.event is not None:
            self._remember(header)
        elif header.stream in self._known:
            events, last = self._known[header.stream]
            header = header.model_copy(update={"events": events, "last_event": last})
            state = restored.state.model_copy(update={"header": header})
            return replace(restored, state=state, change=FORGOTTEN, lost=True)
        return restored

    def _remember(self, header: StreamHeader) -> None:
        self._known[header.stream] = header.events, header.last_event
        if len(self._known) > MOST_KNOWN:
            del self._known[next(iter(self._known))]

    def _take_in_homeless(self, stream: str, why: str) -> None:
        log.error("stream %s is answered by source, and nothing of it is kept: %s", stream, why, extra=_of(stream))
        self.engine.admit(self.engine.begun(stream), 0, False)
        self._homeless.add(stream)
        self._metrics.homeless.set(len(self._homeless))

    def returned(self) -> list[str]:
        """Streams that could not be stored and can be now: they are to be claimed, and their frames read again from
        the oldest that is not finished. The store is asked every half minute."""
        if not self._homeless or time.monotonic() - self._looked < LOOK_AGAIN_S:
            return []
        self._looked = time.monotonic()
        asked = list(self._homeless)
        found = self._retry(lambda: self._store.overview(asked))
        back = [stream for stream, seen in zip(asked, found, strict=True) if not seen.foreign and self._usable(seen)]
        for stream in back:
            log.info("stream %s can be stored again", stream, extra=_of(stream))
        return back

    def _usable(self, seen: Overview) -> bool:
        try:
            return not (seen.header and self._beyond(decode_header(seen.header).positions))
        except StateError:
            return True  # It begins anew.

    @property
    def crowded(self) -> bool:
        """Whether more streams are resident than may be."""
        return len(self.engine) > self._max_resident

    def trim(self, busy: Set[str]) -> list[str]:
        """Where too many streams are resident, the least recently used that are not `busy` go; returns these."""
        gone = self.engine.least_recent(len(self.engine) - self._max_resident, busy)
        self.release(gone)
        return gone

    def contest(self, fenced: Iterable[str]) -> None:
        """Another worker has claimed these streams. Where both have frames of one (it moved), each would claim it while
        the other holds its frames back, and neither ever write: once claimed again, nothing of it waits."""
        self._contested |= {stream for stream in fenced if stream not in self._homeless}

    def release(self, streams: Iterable[str]) -> None:
        """Forget streams; the store has them."""
        streams = list(streams)
        self.engine.release(streams)
        for stream in streams:
            self._metrics.streams.forget(stream)
        self._homeless.difference_update(streams)
        self._metrics.homeless.set(len(self._homeless))
        self._metrics.resident.set(len(self.engine))

    def write(self, entries: Sequence[Entry]) -> list[bool]:
        """Store states with the events that explain them; False for streams that another worker has claimed since.

        In memory headers and approved parameters follow; the engine's tensors are the caller's.
        """
        writes = [self._as_write(entry) for entry in entries]
        residents = [self.engine.resident(entry.header.stream) for entry in entries]
        with self._metrics.store_seconds.labels("write").time():
            outcomes = self._retry(lambda: self._store.write(writes))
        accepted = [
            self._write_whole(entry, resident) if good is None else good
            for entry, resident, good in zip(entries, residents, outcomes, strict=True)
        ]
        for entry, write, good in zip(entries, writes, accepted, strict=True):
            if good and entry.header.stream in self.engine:
                resident = self.engine.resident(entry.header.stream)
                resident.header, resident.stored, resident.written = entry.header, True, entry.header.events
                resident.approved = entry.approved or resident.approved
                resident.contested = False
                self._remember(entry.header)
            if write.tensors:
                self._metrics.state_bytes.observe(len(write.tensors))
        return accepted

    def _write_whole(self, entry: Entry, resident: Resident) -> bool:
        """The store has the stream's tensors no more, or those that are approved: they expired or were evicted, or the
        store has lost its last writes."""
        stream = entry.header.stream
        if not self.engine.holds(stream, resident):
            return False  # It went while the store was waited for.
        log.info("parameters of stream %s are gone from the store and written again", stream, extra=_of(stream))
        resident.stored = False
        if entry.header.approved is not None:
            entry = replace(entry, approved=entry.approved or resident.approved)
        write = self._as_write(entry)
        return bool(self._retry(lambda: self._store.write([write]))[0])

    def snapshot(self, before: StreamHeader, after: StreamHeader, event: UpdateEvent) -> Snapshot | None:
        """What to keep of an update for rollback: one every `store.snapshot_every` updates, of streams that do well."""
        due = self._snapshot_every > 0 and abs(after.step - before.snapshot) >= self._snapshot_every
        if not due or event.decision != "applied" or not _does_well(after, event):
            return None
        after.snapshot = after.step
        reason = f"{self._snapshot_every} updates since the last"
        return Snapshot(time=event.time, reason=reason, proxies=event.after, header=after)

    def kept(self, stream: str, back: int) -> tuple[Snapshot, State]:
        """The stream's `back`th newest snapshot. Raises StateError where there is none that fits."""
        like, bundle = self.engine.like, self.engine.bundle_hash
        return self._retry(lambda: chosen_snapshot(self._store, stream, back, like, bundle, self._max_state_bytes))

    def newest(self, stream: str) -> tuple[Snapshot, State] | None:
        """The newest snapshot; None where there is none that fits."""
        try:
            return self.kept(stream, 1)
        except StateError as error:
            log.warning("stream %s goes back to source, not to a snapshot: %s", stream, error)
            return None

    def _as_write(self, entry: Entry) -> Write:
        resident = self.engine.resident(entry.header.stream)
        if entry.tensors is None and not resident.stored:
            entry = replace(entry, tensors=self.engine.tensors(entry.header.stream))
        keeps = entry.header.approved is not None and entry.approved is None
        write = as_write(entry, resident.token, self._compression)
        return replace(write, keeps_approved=keeps, after=resident.written)

    def _changed(self, restored: Restored, reason: str) -> Entry:
        """What restarts from source or goes on under another bundle, and says so."""
        header = restored.state.header
        if restored.decision == "reset":
            log.warning("stream %s restarts from source: %s", header.stream, reason, extra=_of(header.stream))
        else:
            log.info("stream %s: %s", header.stream, reason, extra=_of(header.stream))
        subject = Subject(header, restored.state.tensors, partial(self.kept, header.stream))
        context, token = (
            Context.of(self.engine, self._policies, self._worker),
            self.engine.resident(header.stream).token,
        )
        return taken_in(restored.decision, reason, subject, context, token)

    def _explain(self, entries: list[Entry]) -> None:
        """Stored before they are published, like all events: a crash between must not make two different ones."""
        if not entries:
            return
        for entry, good in zip(entries, self.write(entries), strict=True):
            if good:
                self.publish(entry)
            else:
                self.release([entry.header.stream])

    def publish(self, entry: Entry) -> None:
        """Events that are stored, to topic and metrics."""
        header = entry.header if entry.header.stream in self.engine else None
        for sealed in entry.events:
            self._publisher.update(sealed)
            decided(self._metrics, sealed.event, header)

    def _publish_again(self, stream: str, content: bytes | None) -> None:
        """The last events may not have reached the topic before their worker died. Consumers deduplicate on the id."""
        events = events_beside(stream, content)
        if strange := len(lines_beside(content)) - len(events):
            log.warning("%d lines beside the state of stream %s are no events of its own", strange, stream)
        for sealed in events:
            self._publisher.update(sealed)


def _of(stream: str) -> dict[str, str]:
    """What a log line of a stream can be found by."""
    return {"stream": stream}


def _does_well(header: StreamHeader, event: UpdateEvent) -> bool:
    """Whether a snapshot taken now would be one to return to: no worse than source, as far as anybody can tell."""
    seen = event.after
    if not header.guard.trusted:
        return False
    if seen is None or seen.source_accuracy is None or seen.estimated_accuracy is None:
        return True
    return seen.estimated_accuracy >= seen.source_accuracy
