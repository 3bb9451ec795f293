"""Dead letters, sent by a thread of their own, so that no frame waits for a dead-letter topic that takes none."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

from schemas.errors import FrameError
from schemas.frame import Position
from worker.consume.offsets import Partition
from worker.kafka.records import bytes_of
from worker.publish.publisher import Publisher

BadRecord = tuple[Any, FrameError]  # a record, and why it is no frame
MAX_BYTES = 16 << 20  # of records that wait, above which no more should be taken over from Kafka
OVERHEAD = 1_000  # bytes of a record beside what is in it


class DeadLetters:
    """Sends bad records in order, with a publisher of its own. Belongs to the worker's loop."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._waiting: list[BadRecord] = []
        self._under_way: list[BadRecord] = []
        self._sent: Future[None] | None = None
        self._bytes = 0

    @property
    def full(self) -> bool:
        """Whether so much waits that no more records should be taken over."""
        return self._bytes > MAX_BYTES

    def send(self, bad: list[BadRecord]) -> None:
        """Send records later. Returns at once."""
        self._waiting += bad
        self._bytes += _size(bad)
        self._begin()

    def delivered(self, patience_s: float = 0.0) -> list[Position]:
        """Records that have reached the dead-letter topic, or were given up, since the last call. With `patience_s` it
        waits until all have. Raises UnreachableError where the broker is away and the worker is to stop."""
        found: list[Position] = []
        until = time.monotonic() + patience_s
        while self._sent is not None:
            wait([self._sent], max(0.0, until - time.monotonic()))
            if not self._sent.done() or (found and self._sent.exception()):
                break  # The next call raises the error.
            self._sent.result()
            found += [Position.of(record) for record, _ in self._under_way]
            self._bytes = _size(self._waiting)
            self._under_way, self._sent = [], None
            self._begin()
        return found

    def drop(self, partition: Partition) -> None:
        """Forget the records of a partition that was taken away or is read again. Letters that are under way still
        arrive, and finish nothing. Records that are read again become dead letters again."""
        self._waiting, self._under_way = (
            [bad for bad in some if (bad[0].topic, bad[0].partition) != partition]
            for some in (self._waiting, self._under_way)
        )

    def close(self) -> None:
        """Close the publisher. Whoever reads the partitions next sends again what is still under way."""
        if self._sent is None:
            self._publisher.close()
        else:  # By its thread, once that is through.
            self._sent.add_done_callback(lambda _: self._publisher.close())

    def _begin(self) -> None:
        if self._sent is None and self._waiting:
            self._under_way, self._waiting = self._waiting, []
            self._sent = Future()
            # A daemon thread rather than a pool: a process waits for a pool's threads before it ends.
            send = partial(self._deliver, self._under_way, self._sent)
            threading.Thread(target=send, name="letters", daemon=True).start()

    def _deliver(self, bad: list[BadRecord], sent: Future[None]) -> None:
        try:
            for record, error in bad:
                self._publisher.dead_letter(record, error)
            self._publisher.settle(lambda: None)
        except Exception as error:  # noqa: BLE001 - raised in the loop
            sent.set_exception(error)
        else:
            sent.set_result(None)


def _size(bad: list[BadRecord]) -> int:
    """Bytes that records and the messages made of them take."""
    return sum(OVERHEAD + bytes_of(record) for record, _ in bad)
