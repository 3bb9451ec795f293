"""Dead letters, sent by a thread of their own: no frame waits for a topic that takes none."""

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
MAX_BYTES = 16 << 20  # of records that wait, above which no more are to be taken in
OVERHEAD = 1_000  # bytes of a record beside what is in it


class DeadLetters:
    """Sends what it is given, in order, by a publisher that is nobody else's. Belongs to the worker's loop."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._waiting: list[BadRecord] = []
        self._under_way: list[BadRecord] = []
        self._sent: Future[None] | None = None
        self._bytes = 0

    @property
    def full(self) -> bool:
        """Whether so much waits that no more should be taken in."""
        return self._bytes > MAX_BYTES

    def send(self, bad: list[BadRecord]) -> None:
        """Returns at once."""
        self._waiting += bad
        self._bytes += _size(bad)
        self._begin()

    def delivered(self, patience_s: float = 0.0) -> list[Position]:
        """Records that are in their topic, or given up, since the last call; with patience, after a wait for all.

        Raises UnreachableError where the broker is away and the worker is to stop.
        """
        found: list[Position] = []
        until = time.monotonic() + patience_s
        while self._sent is not None:
            wait([self._sent], max(0.0, until - time.monotonic()))
            if not self._sent.done() or (found and self._sent.exception()):
                break  # The next call says why.
            self._sent.result()
            found += [Position.of(record) for record, _ in self._under_way]
            self._bytes = _size(self._waiting)
            self._under_way, self._sent = [], None
            self._begin()
        return found

    def drop(self, partition: Partition) -> None:
        """Forget the records of a partition that goes or is read again: none of their letters that is still to arrive
        finishes anything, and if they are read again they are bad again."""
        self._waiting, self._under_way = (
            [bad for bad in some if (bad[0].topic, bad[0].partition) != partition]
            for some in (self._waiting, self._under_way)
        )

    def close(self) -> None:
        """What is still under way is a dead letter again for whoever reads the partition next."""
        if self._sent is None:
            self._publisher.close()
        else:  # By now, or by its thread once that is through.
            self._sent.add_done_callback(lambda _: self._publisher.close())

    def _begin(self) -> None:
        if self._sent is None and self._waiting:
            self._under_way, self._waiting = self._waiting, []
            self._sent = Future()
            # Not of a pool, whose threads the process waits for at its end.
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
    """Bytes that records and their messages take."""
    return sum(OVERHEAD + bytes_of(record) for record, _ in bad)
