"""When the loop polls the frames topic, and how long it may wait in the poll."""

from __future__ import annotations

import time

from schemas.config import Batch
from schemas.frame import Position
from worker.consume.offsets import Partition
from worker.flights import Flights
from worker.partitions import Partitions
from worker.parts import Parts

IDLE_POLL_S = 0.1
FRESH_S = 0.02  # the longest wait for what the poll before has asked the broker for
PAUSE_S = 0.05  # between polls while no waiting frame is due; none where half of batch.max_wait_ms is below FRESH_S
STOCKED_S = 0.05  # between polls while there is enough to do: a poll costs two threads a millisecond
MAX_HELD = 64 << 20  # bytes of records that are not decoded yet, above which partitions are paused


class Polling:
    """The polls of the worker's loop. Records go to the threads that decode."""

    def __init__(self, batch: Batch, parts: Parts, flights: Flights, partitions: Partitions) -> None:
        self._batch, self._flights, self._partitions = batch, flights, partitions
        self._consumer, self._offsets = parts.consumer, parts.offsets
        self._decoding, self._dead_letters, self._batcher = parts.decoding, parts.dead_letters, parts.batcher
        self._looked = time.monotonic()
        self._pause = min(PAUSE_S, half) if (half := batch.max_wait_ms / 2_000) >= FRESH_S else 0.0

    @property
    def stocked(self) -> bool:
        """Whether the loop has enough to do without another poll for a moment."""
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
        """Take over what has come. With nothing else to do, wait for records, or until a waiting frame is due."""
        # All partitions are paused or none: kafka-python loses what it has fetched where only some of them are.
        full = self.waiting >= self._batch.max_buffered or self._decoding.held > MAX_HELD or self._dead_letters.full
        self._consumer.pause(full)
        if not (full or self._busy) and (due := self._batcher.next_due()) is not None:
            # Sleeping here means that frames which come meanwhile are taken over together. Not `stop.wait`: a signal
            # handler that sets `stop` runs in this very thread, and would wait for a lock that this thread holds.
            time.sleep(min(self._pause, max(0.0, due - time.monotonic() - FRESH_S / 2)))
        twice = not full and self._aged
        if twice:  # A poll returns what the client had fetched before, and asks the broker for what has come since.
            self.receive(0.0)
        # Where partitions are paused because of dead letters alone, there is nothing to do but to wait.
        self.receive(0.0 if full and self.waiting else self._patience(twice))

    def receive(self, timeout_s: float) -> None:
        """Poll once. Partitions that were taken away are dropped before newer records are taken over."""
        records, gone = self._consumer.poll(timeout_s)
        before, self._looked = self._looked, time.monotonic()
        epoch = time.time() - self._looked
        dropped: set[Partition] = set()
        for partition in gone:
            dropped |= self._partitions.drop(partition)
        for record in records:
            # Dropping a partition also rewinds the other partitions of its streams. Their newer records are passed over
            # here, because the rewound ones come before them.
            if (record.topic, record.partition) not in dropped:
                self._offsets.received(Position.of(record))
                # A record counts as received at its timestamp, but not before the last poll. Otherwise all records that
                # came while the loop computed would be due at once, in more and smaller micro-batches.
                said = (record.timestamp or 0) / 1000
                came = max(before, said - epoch) if said > 0 else self._looked
                self._decoding.add(min(self._looked, came), record)

    @property
    def _busy(self) -> bool:
        return bool(self._flights or self._decoding)

    @property
    def _aged(self) -> bool:
        """Whether much may have come since the last poll that the next pass could take."""
        aged = time.monotonic() - self._looked > FRESH_S
        return aged and self.waiting < self._batch.max_pass and (self._flights.here or not self._flights)

    def _patience(self, before: bool) -> float:
        """How long a poll may wait: for what one just `before` it has asked for, or until a waiting frame is due."""
        fresh = min(FRESH_S, self._batch.max_wait_ms / 2_000)
        if self._busy:
            return fresh if before else 0.0
        if (due := self._batcher.next_due()) is None:
            return IDLE_POLL_S
        return min(fresh if self._pause else IDLE_POLL_S, max(0.0, due - time.monotonic()))
