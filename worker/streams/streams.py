"""Streams between store and engine: claimed and loaded when a frame needs them, written after steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence, Set
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
LOOK_AGAIN_S = 30.0  # before it is checked again whether homeless streams can be stored
LOST_EVENTS = (
    "the events beside the state of stream %s are empty or have more than %d bytes, and none of them is published; "
    "'driftkeel audit verify --store' says whether one is missing"
)
FORGOTTEN = "the stored state is gone, and all else that the store knew of the stream"
MOST_KNOWN = 100_000  # streams that are remembered, so that it is noticed if the store has lost one
CLAIM_BYTES = 16 << 20  # of states that are claimed at once; a larger state is claimed alone


class Streams:
    """Loads streams, writes them, and keeps memory and store in agreement. Belongs to the worker's loop.

    Most methods call the store by way of `retry`. While that waits, partitions may be taken away and their streams
    released. So every method looks up again afterwards which streams are still resident.
    """

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
        """`beyond` says what is wrong with a stream's positions; empty where nothing is known to be wrong."""
        self.context, self._beyond = Context.of(engine, policies, worker), beyond
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
        # Streams that the store has had: the number of events, and the hash of the last one.
        self._known: dict[str, tuple[int, str]] = {}
        self._looked = 0.0

    def ensure(self, wanted: Iterable[str], ours: Container[str] | None = None) -> list[str]:
        """Make streams resident. Returns those that were not. New ones for which the store has no room are left out.

        `ours`: the streams whose partitions this worker has; None where it does not matter. One that has gone while the
        store was waited for is left out, too: its next owner claims it, and nothing would remove it from memory here.
        """
        wanted = list(dict.fromkeys(wanted))
        new: dict[str, None] = {}
        left_out: set[str] = set()
        # In a loop, because streams that were resident may be released while a claim waits for the store.
        while missing := [stream for stream in wanted if stream not in self.engine and stream not in left_out]:
            left_out |= self._claim(missing)
            if ours is not None:
                gone = [stream for stream in wanted if stream not in ours]
                self.release(gone)
                left_out.update(gone)
            new |= dict.fromkeys(missing)
            self._metrics.resident.set(len(self.engine))
        return [stream for stream in new if stream not in left_out]

    def _claim(self, streams: list[str]) -> set[str]:
        """Load streams. Returns new ones for which the store has no room."""
        new = self._load(streams, "known")
        begun = new[: self._newcomers.admit(len(new))]
        if begun:
            self._load(begun, "any")
        return set(new[len(begun) :])

    def _load(self, streams: list[str], which: Which) -> list[str]:
        """Claim streams and make them resident, piece by piece. Returns new ones, which `which` did not let begin."""
        size = max(1, CLAIM_BYTES // self.engine.state_bytes)
        pieces = (streams[start : start + size] for start in range(0, len(streams), size))
        return [stream for piece in pieces for stream in self._load_piece(piece, which)]

    def _load_piece(self, streams: list[str], which: Which) -> list[str]:
        with self._metrics.store_seconds.labels("claim").time():
            claims = self._retry(lambda: self._store.claim(streams, self._worker, which))
        claimed = dict(zip(streams, claims, strict=True))
        self._name_rivals(claimed)
        new = [stream for stream, found in claimed.items() if not (found.token or found.foreign)]
        loaded = [self._load_one(stream, found) for stream, found in claimed.items() if found.token or found.foreign]
        self._explain([changed for changed in loaded if changed is not None])
        return new

    def _load_one(self, stream: str, claimed: Claimed) -> Entry | None:
        """Make a claimed stream resident. Returns what is to be stored, where its state is not the stored one."""
        if claimed.foreign:
            self._load_homeless(stream, claimed.foreign)
            return None
        self._publish_again(stream, claimed.event)
        restored = self._remembered(claimed, self._restorer.restored(stream, claimed))
        if wrong := self._beyond(restored.state.header.positions):
            self._load_homeless(stream, f"{wrong}; {cure(stream)}")
            return None
        if claimed.event == b"" and restored.state.header.events:
            log.warning(LOST_EVENTS, stream, MAX_EVENTS_BYTES, extra=_of(stream))
        stored = claimed.header is not None and not restored.change
        self.engine.admit(restored.state, claimed.token, stored, restored.approved)
        resident = self.engine.resident(stream)
        resident.lost = time.monotonic() if restored.lost else 0.0
        resident.contested = stream in self._contested
        self._contested.discard(stream)
        if not restored.change:
            return None
        return replace(self._changed(restored, restored.change), waiting=claimed.event or b"")

    def _name_rivals(self, claims: Mapping[str, Claimed]) -> None:
        """Log who had claimed streams of ours. Once, that is a rebalance; without end, two sites share a prefix."""
        by: dict[str, list[str]] = {}
        for stream in claims.keys() & self._contested:
            by.setdefault(claims[stream].before, []).append(stream)
        for owner in by.keys() - {"", self._worker}:  # A store that has lost the last claim may name this worker.
            log.warning("worker %s had claimed %d of our streams, such as %s", owner, len(by[owner]), min(by[owner]))

    def _remembered(self, claimed: Claimed, restored: Restored) -> Restored:
        """The same, unless the store knows nothing of a stream that it has had. Then the numbers and the chain of its
        events go on, and an event says so. A stream that was deleted is not that case: its last event is there."""
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

    def _load_homeless(self, stream: str, why: str) -> None:
        log.error("stream %s is answered by source, and nothing of it is kept: %s", stream, why, extra=_of(stream))
        self.engine.admit(self.engine.begun(stream), 0, False)
        self._homeless.add(stream)
        self._metrics.homeless.set(len(self._homeless))

    def returned(self) -> list[str]:
        """Homeless streams that can be stored now. They are to be claimed, and their frames read again from the oldest
        that is not finished. The store is asked every half minute."""
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
            return True  # Then the stream begins anew.

    @property
    def crowded(self) -> bool:
        """Whether more streams are resident than the limits allow."""
        return len(self.engine) > self._max_resident

    def trim(self, busy: Set[str]) -> list[str]:
        """Release the least recently used streams that are not `busy` until the limits hold. Returns these."""
        gone = self.engine.least_recent(len(self.engine) - self._max_resident, busy)
        self.release(gone)
        return gone

    def contest(self, fenced: Iterable[str]) -> None:
        """Another worker has claimed these streams. If both workers have frames of one (it moved), each could claim it
        while the other holds results back, and neither would ever write. So once it is claimed again, its results are
        written at once, until a write has succeeded."""
        self._contested |= {stream for stream in fenced if stream not in self._homeless}

    def release(self, streams: Iterable[str]) -> None:
        """Remove streams from memory."""
        streams = list(streams)
        self.engine.release(streams)
        for stream in streams:
            self._metrics.streams.forget(stream)
        self._homeless.difference_update(streams)
        self._metrics.homeless.set(len(self._homeless))
        self._metrics.resident.set(len(self.engine))

    def write(self, entries: Sequence[Entry]) -> list[bool]:
        """Store states with the events that explain them. False for streams that another worker has claimed.

        Headers and approved parameters in memory follow. The engine's tensors are left to the caller.
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
        """Write a stream again with all of its tensors. The store has lost the ones that were to stay, or the approved
        ones: they have expired, were evicted, or their write was lost."""
        stream = entry.header.stream
        if not self.engine.holds(stream, resident):
            return False  # It was released while the store was waited for.
        log.info("parameters of stream %s are gone from the store and written again", stream, extra=_of(stream))
        resident.stored = False
        if entry.header.approved is not None:
            entry = replace(entry, approved=entry.approved or resident.approved)
        write = self._as_write(entry)
        return bool(self._retry(lambda: self._store.write([write]))[0])

    def snapshot(self, before: StreamHeader, after: StreamHeader, event: UpdateEvent) -> Snapshot | None:
        """A snapshot, where one is due: one every `store.snapshot_every` updates, while the stream does well."""
        due = self._snapshot_every > 0 and abs(after.step - before.snapshot) >= self._snapshot_every
        if not due or event.decision != "applied" or not _does_well(after, event):
            return None
        after.snapshot = after.step
        reason = f"{self._snapshot_every} updates since the last"
        return Snapshot(time=event.time, reason=reason, proxies=event.after, header=after)

    def kept(self, stream: str, back: int) -> tuple[Snapshot, State]:
        """The stream's `back`th newest snapshot. Raises StateError where there is none that can be used."""
        like, bundle = self.engine.like, self.engine.bundle_hash
        return self._retry(lambda: chosen_snapshot(self._store, stream, back, like, bundle, self._max_state_bytes))

    def newest(self, stream: str) -> tuple[Snapshot, State] | None:
        """The newest snapshot; None where there is none that can be used."""
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
        """The entry of a stream that restarts from source, or goes on under another bundle, with the event of that."""
        header = restored.state.header
        if restored.decision == "reset":
            log.warning("stream %s restarts from source: %s", header.stream, reason, extra=_of(header.stream))
        else:
            log.info("stream %s: %s", header.stream, reason, extra=_of(header.stream))
        subject = Subject(header, restored.state.tensors, partial(self.kept, header.stream))
        return taken_in(restored.decision, reason, subject, self.context, self.engine.resident(header.stream).token)

    def _explain(self, entries: list[Entry]) -> None:
        """Store entries, then publish their events. In this order a crash between the two cannot lead to two events
        with one number and different contents."""
        if not entries:
            return
        for entry, good in zip(entries, self.write(entries), strict=True):
            if good:
                self.publish(entry)
            else:
                self.release([entry.header.stream])

    def publish(self, entry: Entry) -> None:
        """Publish the events of an entry that is stored, and count them."""
        header = entry.header if entry.header.stream in self.engine else None
        for sealed in entry.events:
            self._publisher.update(sealed)
            decided(self._metrics, sealed.event, header)

    def _publish_again(self, stream: str, content: bytes | None) -> None:
        """Publish the events beside the state: their worker may have died before it did. Consumers deduplicate them."""
        events = events_beside(stream, content)
        if strange := len(lines_beside(content)) - len(events):
            log.warning("%d lines beside the state of stream %s are no events of its own", strange, stream)
        for sealed in events:
            self._publisher.update(sealed)


def _of(stream: str) -> dict[str, str]:
    """The fields by which the log line of a stream can be found."""
    return {"stream": stream}


def _does_well(header: StreamHeader, event: UpdateEvent) -> bool:
    """Whether a snapshot that is taken now would be good to return to: no worse than source, as far as is known."""
    seen = event.after
    if not header.guard.trusted:
        return False
    if seen is None or seen.source_accuracy is None or seen.estimated_accuracy is None:
        return True
    return seen.estimated_accuracy >= seen.source_accuracy
