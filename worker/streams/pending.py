"""What steps have made of streams and the store does not have yet.

With `store.write_interval_ms` a stream's state is written so often, and not after every step: states of megabytes cost
more to write than to compute. What is in between lives in memory alone, and nothing that follows from it leaves the
worker: its update events are published, and its offsets finished, once the state that contains them is stored. Whoever
owns the stream after a crash so begins at the stored position, with the stored parameters, and folds the same frames
again; only their predictions, which left at once, appear twice, with the same ids.

A micro-batch that was not meant to make an update leaves the parameters where they are, and may wait so for a second
whatever the interval: with adaptation on demand such writes took a twelfth of the worker's processor time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from monitoring import observe
from monitoring.metrics import WorkerMetrics
from schemas.frame import Position
from schemas.prediction import Parameters
from schemas.state import Snapshot, StreamHeader
from schemas.update import SealedEvent, UpdateEvent
from worker.consume.offsets import Offsets
from worker.engine.resident import Resident
from worker.publish.publisher import Publisher
from worker.streams.entry import Entry
from worker.streams.streams import Streams

log = logging.getLogger("driftkeel.journal")
PATIENT_S = 1.0  # micro-batches without an update may wait so long
MOST_EVENTS = 32  # of a stream that wait; they lie beside its state until the next write
MOST_EVENT_BYTES = 1 << 20  # and that they have, but for the last; others read no more than MAX_EVENTS_BYTES
PIECE_STREAMS, PIECE_BYTES = 256, 16 << 20  # of one write: what is packed for the store takes memory
ALIVE_S = 1.0  # a write of many pieces tells the group so often that the worker lives; the loop stands still for it


@dataclass(frozen=True)
class Folded:
    """What a step has made of one micro-batch. The engine has its tensors; `moved` says whether they changed.

    `patient`: it was not meant to make an update. `blind`: most of its frames were blank or came before.
    """

    resident: Resident
    header: StreamHeader
    sealed: SealedEvent
    moved: bool
    positions: list[Position]
    mean_entropy: float
    answered: Parameters
    snapshot: Snapshot | None = None
    patient: bool = False
    blind: bool = False


@dataclass
class _Waiting:
    since: float
    folded: list[Folded]
    event_bytes: int = 0

    def add(self, folded: Folded) -> None:
        self.folded.append(folded)
        self.event_bytes += len(folded.sealed.content)

    def due(self, now: float, interval: float) -> bool:
        # A snapshot is taken of the tensors as they are now.
        full = len(self.folded) >= MOST_EVENTS or self.event_bytes >= MOST_EVENT_BYTES
        urgent = full or self.folded[-1].snapshot is not None or self.folded[-1].resident.contested
        if all(one.patient for one in self.folded):
            interval = max(interval, PATIENT_S)
        return urgent or now - self.since >= interval


class PendingWrites:
    """Belongs to the worker's loop."""

    def __init__(
        self,
        streams: Streams,
        publisher: Publisher,
        offsets: Offsets,
        metrics: WorkerMetrics,
        interval_ms: int,
        keep_alive: Callable[[], object],
    ) -> None:
        self._streams, self._publisher, self._offsets, self._metrics = streams, publisher, offsets, metrics
        self._interval, self._keep_alive = interval_ms / 1000, keep_alive
        self._waiting: dict[str, _Waiting] = {}

    def add(self, folded: Folded) -> None:
        """The stream in memory is now what `folded` says."""
        stream = folded.header.stream
        folded.resident.header = folded.header
        waiting = self._waiting.get(stream)
        if waiting is None or waiting.folded[0].resident is not folded.resident:
            waiting = self._waiting[stream] = _Waiting(time.monotonic(), [])
        waiting.add(folded)

    def flush_due(self) -> list[str]:
        """Write what has waited long enough; see `flush`."""
        now = time.monotonic()
        return self.flush([s for s, waiting in self._waiting.items() if waiting.due(now, self._interval)])

    def flush(self, streams: Collection[str] | None = None) -> list[str]:
        """Write what waits, of these streams or of all, in pieces. Returns those that another worker has claimed
        since."""
        chosen = list(self._waiting if streams is None else streams)
        if not chosen:
            return []
        # Predictions are acknowledged before the position moves past their frames; and the events of the last write
        # are in the topic before others take their place beside the state.
        self._publisher.settle(self._keep_alive)
        chosen = [stream for stream in chosen if stream in self._waiting]
        fenced: list[str] = []
        size = max(1, min(PIECE_STREAMS, PIECE_BYTES // self._streams.engine.state_bytes))
        alive = time.monotonic()
        for start in range(0, len(chosen), size):
            if start and time.monotonic() - alive > ALIVE_S:
                self._keep_alive()
                alive = time.monotonic()
            fenced += self._write(chosen[start : start + size])
        self._metrics.fenced.inc(len(fenced))
        return fenced

    def _write(self, streams: Sequence[str]) -> list[str]:
        taken = [self._waiting.pop(stream).folded for stream in streams if stream in self._waiting]
        # A stream that was given up meanwhile begins again from what is stored.
        taken = [folded for folded in taken if self._held(folded[0])]
        for folded in taken:
            if folded[0].resident.homeless:  # Its frames are answered: that is all that becomes of them.
                self._offsets.finished(position for one in folded for position in one.positions)
        taken = [folded for folded in taken if not folded[0].resident.homeless]
        if not taken:
            return []
        accepted = self._streams.write([self._entry(folded) for folded in taken])
        for folded, good in zip(taken, accepted, strict=True):
            if good:
                self._stored(folded)
        refused = [folded[0] for folded, good in zip(taken, accepted, strict=True) if not good]
        return [one.header.stream for one in refused if self._held(one)]  # One that went was claimed by nobody.

    def _held(self, folded: Folded) -> bool:
        return self._streams.engine.holds(folded.header.stream, folded.resident)

    def _entry(self, folded: list[Folded]) -> Entry:
        last = folded[-1]
        tensors = self._streams.engine.tensors(last.header.stream) if any(f.moved for f in folded) else None
        return Entry(last.header, tuple(f.sealed for f in folded), tensors, snapshot=last.snapshot)

    def _stored(self, folded: list[Folded]) -> None:
        for one in folded:
            self._publisher.update(one.sealed)
            _say(one.sealed.event)
            self._offsets.finished(one.positions)
            observe.decided(self._metrics, one.sealed.event, one.header if self._held(one) else None, one.blind)
            observe.judged(self._metrics, one.sealed.event, one.mean_entropy, one.answered)


def _say(event: UpdateEvent) -> None:
    """To the log: what took a stream back, for everybody; the rest for who asks. Found by stream and frame position."""
    level = logging.WARNING if event.decision in ("rolled_back", "reset") else logging.DEBUG
    if log.isEnabledFor(level):
        about = {"stream": event.stream, "frame": event.frames[-1], "decision": event.decision}
        log.log(level, "%s: %s (%s)", event.id, event.decision, event.reason, extra=about)
