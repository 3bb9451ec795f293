"""When the loop polls the topic of frames, and how long it may wait there."""

from __future__ import annotations

import time

from schemas.config import Batch
from schemas.frame import Position
from worker.consume.offsets import Partition
from worker.flights import Flights
from worker.partitions import Partitions
from worker.parts import Parts

IDLE_POLL_S = 0.1
FRESH_S = 0.02  # at most, for what a poll has fetched
PAUSE_S = 0.05  # between looks while what waits is not due; none where half of batch.max_wait_ms is below FRESH_S
STOCKED_S = 0.05  # between looks at the topic while there is enough to do: a look costs two threads a millisecond
MAX_HELD = 64 << 20  # bytes that wait to be decoded, or are, before partitions are paused


class Polling:
    """The looks of the worker's loop at the topic; records go to those who decode."""

    def __init__(self, batch: Batch, parts: Parts, flights: Flights, partitions: Partitions) -> None:
        self._batch, self._flights, self._partitions = batch, flights, partitions
        self._consumer, self._offsets = parts.consumer, parts.offsets
        self._decoding, self._dead_letters, self._batcher = parts.decoding, parts.dead_letters, parts.batcher
        self._looked = time.monotonic()
        self._pause = min(PAUSE_S, half) if (half := batch.max_wait_ms / 2_000) >= FRESH_S else 0.0

    @property
    def stocked(self) -> bool:
        """Whether the loop can do without a look at the topic for a moment."""
        if time.monotonic() - self._looked >= STOCKED_S:
            return False
        if self._flights.here and self._decoding.busy:
            return True
        enough = self._flights.threads * self._batch.max_pass
        return bool(self._flights or self._decoding.running) and self.waiting >= enough

    @property
    def waiting(self) -> int:
        """Frames in memory that are in no pass."""
        return len(self._batcher) + len(self._decoding)

    def look(self) -> None:
        """Take over what has come; where nothing else is to be done, wait for it, or until something is due."""
        # All partitions or none: the client loses sight of what it has fetched when only some of them are paused.
        full = self.waiting >= self._batch.max_buffered or self._decoding.held > MAX_HELD or self._dead_letters.full
        self._consumer.pause(full)
        if not (full or self._busy) and (due := self._batcher.next_due()) is not None:
            # Frames that come meanwhile need not be taken over one by one. No wait for `stop`: whoever sets it may be a
            # signal's handler in this very thread.
            time.sleep(min(self._pause, max(0.0, due - time.monotonic() - FRESH_S / 2)))
        twice = not full and self._aged
        if twice:  # A poll gives what was there at the poll before, and has fetched what has come since.
            self.receive(0.0)
        # Nothing may be in hand where dead letters alone are too many.
        self.receive(0.0 if full and self.waiting else self._patience(twice))

    def receive(self, timeout_s: float) -> None:
        """Poll once. Partitions that were taken away are dropped before newer records are taken in."""
        records, gone = self._consumer.poll(timeout_s)
        before, self._looked = self._looked, time.monotonic()
        epoch = time.time() - self._looked
        dropped: set[Partition] = set()
        for partition in gone:
            dropped |= self._partitions.drop(partition)
        for record in records:
            # Where a stream has moved, its other partitions are read again, too: nothing newer goes before that.
            if (record.topic, record.partition) not in dropped:
                self._offsets.received(Position.of(record))
                # It came when it says, and not before the last poll: what came while the loop computed would all be due
                # at once, in smaller micro-batches and more of them.
                said = (record.timestamp or 0) / 1000
                came = max(before, said - epoch) if said > 0 else self._looked
                self._decoding.add(min(self._looked, came), record)

    @property
    def _busy(self) -> bool:
        return bool(self._flights or self._decoding)

    @property
    def _aged(self) -> bool:
        """Whether much may have come since the last look that is wanted now."""
        aged = time.monotonic() - self._looked > FRESH_S
        return aged and self.waiting < self._batch.max_pass and (self._flights.here or not self._flights)

    def _patience(self, again: bool) -> float:
        """How long a poll may wait: for what one just before it has fetched, or until something is due."""
        fresh = min(FRESH_S, self._batch.max_wait_ms / 2_000)
        if self._busy:
            return fresh if again else 0.0
        if (due := self._batcher.next_due()) is None:
            return IDLE_POLL_S
        return min(fresh if self._pause else IDLE_POLL_S, max(0.0, due - time.monotonic()))
