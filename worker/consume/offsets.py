"""Which offsets may be committed: everything before the first frame that is not finished."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from schemas.frame import Position

Partition = tuple[str, int]  # topic and number; kafka-python's TopicPartition is such a tuple too


@dataclass
class _Progress:
    waiting: deque[int] = field(default_factory=deque)
    finished: set[int] = field(default_factory=set)
    newest: int = -1


class Offsets:
    """Records in hand, per partition: received and not finished. For the loop, and for the client's thread, which calls
    it in a rebalance."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._progress: dict[Partition, _Progress] = {}
        self._committed: dict[Partition, int] = {}

    def received(self, position: Position) -> None:
        """A record was taken over from the client. Records of a partition must come in order."""
        with self._lock:
            progress = self._progress.setdefault((position.topic, position.partition), _Progress())
            progress.waiting.append(position.offset)
            progress.newest = position.offset

    def finished(self, positions: Iterable[Position]) -> None:
        """Nothing is left to be done for these records, so that their offsets may be committed."""
        with self._lock:
            for position in positions:
                progress = self._progress.get((position.topic, position.partition))
                if progress is None:
                    continue  # Another worker has the partition now.
                progress.finished.add(position.offset)
                while progress.waiting and progress.waiting[0] in progress.finished:
                    progress.finished.remove(progress.waiting.popleft())

    def committable(self, partitions: Iterable[Partition] | None = None) -> dict[Partition, int]:
        """The next offset to be read by whoever takes over, for each partition where it is not committed yet."""
        with self._lock:
            chosen = self._progress if partitions is None else set(partitions) & set(self._progress)
            offsets = {partition: self._next(partition) for partition in chosen}
            return {p: offset for p, offset in offsets.items() if offset > self._committed.get(p, -1)}

    def committed(self, offsets: dict[Partition, int]) -> None:
        """The broker has these."""
        with self._lock:
            self._committed.update(offsets)

    def forget(self, partitions: Iterable[Partition]) -> None:
        """Forget partitions that were taken away or are read again."""
        with self._lock:
            for partition in partitions:
                self._progress.pop(partition, None)
                self._committed.pop(partition, None)

    def unfinished(self) -> dict[Partition, int]:
        """Records in hand, per partition."""
        with self._lock:
            return {partition: len(progress.waiting) for partition, progress in self._progress.items()}

    def reached(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """The offset behind the last record that was received; only of partitions that have received one."""
        with self._lock:
            return {p: self._progress[p].newest + 1 for p in partitions if p in self._progress}

    def next_offset(self, partition: Partition) -> int | None:
        """The offset to read a partition from when all of its records in hand are given up."""
        with self._lock:
            return self._next(partition) if partition in self._progress else None

    def _next(self, partition: Partition) -> int:
        progress = self._progress[partition]
        return progress.waiting[0] if progress.waiting else progress.newest + 1
