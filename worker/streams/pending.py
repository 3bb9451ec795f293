"""Results of steps that the store does not have yet.

With `store.write_interval_ms` a stream's state is written once per interval rather than after every step, because
states of megabytes cost more to write than to compute. Until it is written, a result is in memory alone, and nothing
that follows from it leaves the worker: its update events are published, and its offsets finished, only once the state
that contains them is stored. So after a crash the stream's next owner begins at the stored position with the stored
parameters, and folds in the same frames again. Only their predictions, which were sent at once, appear twice, with the
same ids.

A micro-batch that was not meant to make an update may always wait for a second, because it does not change parameters.
With adaptation on demand, writing these at once took a twelfth of the worker's processor time.
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

log = logging.getLogger("driftkeel.journal")  # the name by which sites may filter these lines
PATIENT_S = 1.0  # micro-batches that were not meant to make an update may wait so long
# A stream is written when so many events wait, or so many bytes of them: they will lie beside its state in the store,
# of which nobody reads more than MAX_EVENTS_BYTES.
MOST_EVENTS, MOST_EVENT_BYTES = 32, 1 << 20
PIECE_STREAMS, PIECE_BYTES = 256, 16 << 20  # of one write, as all that it packs is in memory at once
ALIVE_S = 1.0  # between calls of keep_alive during a write of many pieces, for which the loop stands still


@dataclass(frozen=True)
class Folded:
    """The result of a step for one micro-batch that is folded in. Its tensors are in the engine.

    `moved`: the tensors have changed. `patient`: no update was meant. `blind`: most frames were blank or repeated.
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
        full = len(self.folded) >= MOST_EVENTS or self.event_bytes >= MOST_EVENT_BYTES
        # A snapshot must be of the tensors as they are now, before the next step changes them. A contested stream is
        # written at once, because the other worker that claims it would never let it be written otherwise.
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
        """Give the stream in memory its new header, and write it later."""
        stream = folded.header.stream
        folded.resident.header = folded.header
        waiting = self._waiting.get(stream)
        if waiting is None or waiting.folded[0].resident is not folded.resident:
            waiting = self._waiting[stream] = _Waiting(time.monotonic(), [])
        waiting.add(folded)

    def flush_due(self) -> list[str]:
        """Write what has waited long enough. Returns as `flush`."""
        now = time.monotonic()
        return self.flush([s for s, waiting in self._waiting.items() if waiting.due(now, self._interval)])

    def flush(self, streams: Collection[str] | None = None) -> list[str]:
        """Write what waits of these streams, or of all. Returns those that another worker has claimed."""
        chosen = list(self._waiting if streams is None else streams)
        if not chosen:
            return []
        # Before the write, all that was sent must be acknowledged: the predictions of these frames, because the stored
        # position says that they are in the topic; and the events of the last write, because these overwrite them.
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
        # Results of a stream that was given up meanwhile are void: it is loaded again from what is stored.
        taken = [folded for folded in taken if self._held(folded[0])]
        for folded in taken:
            if folded[0].resident.homeless:  # Nothing of it can be stored. Its frames are predicted, and so finished.
                self._offsets.finished(position for one in folded for position in one.positions)
        taken = [folded for folded in taken if not folded[0].resident.homeless]
        if not taken:
            return []
        accepted = self._streams.write([self._entry(folded) for folded in taken])
        for folded, good in zip(taken, accepted, strict=True):
            if good:
                self._stored(folded)
        refused = [folded[0] for folded, good in zip(taken, accepted, strict=True) if not good]
        # A stream that went during the write was refused for that reason, and not because another worker claimed it.
        return [one.header.stream for one in refused if self._held(one)]

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
    """Log a decision: at level warning where it took the stream back, otherwise at level debug."""
    level = logging.WARNING if event.decision in ("rolled_back", "reset") else logging.DEBUG
    if log.isEnabledFor(level):
        about = {"stream": event.stream, "frame": event.frames[-1], "decision": event.decision}
        log.log(level, "%s: %s (%s)", event.id, event.decision, event.reason, extra=about)
