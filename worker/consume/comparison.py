"""Compares partitions with what the store has folded in of them: where to read from, and what is lost.

Each assigned partition is new, sound or short.

    new    When its first records come, it is compared with its mark in the store, and with positions of streams that
           seem to be beyond its log. Then it is sound or short. While broker or store do not answer it stays new, and
           its records wait.
    sound  Its records are taken.
    short  Its log ends before offsets that are said to be folded in. Nothing is taken until the log has grown so far.

A partition that is read again, for whatever reason, is new again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from kafka import TopicPartition

from monitoring.metrics import WorkerMetrics
from schemas.config import Kafka
from worker.consume.offsets import Partition
from worker.consume.short_logs import REMEDY, ShortLog, without_end
from worker.consume.topic import Notes

log = logging.getLogger("driftkeel.consume")
OFFSETS_TIMEOUT_MS = 5_000


class Marks(Notes, Protocol):
    """Up to which offset the store has folded in each partition. Methods raise UnreachableError."""

    def mark(self, group: str, offsets: dict[Partition, int], seen: Mapping[Partition, int]) -> None:
        """Note that all frames before these offsets are in the states, or need not be. A mark that is further on stays,
        unless it is the one that was `seen`."""

    def marks(self, group: str, partitions: list[Partition]) -> dict[Partition, int]:
        """What was noted."""


class Comparison:
    """Knows which partitions are new, sound or short. Belongs to the worker's loop."""

    def __init__(
        self,
        settings: Kafka,
        consumer: Any,
        marks: Marks,
        metrics: WorkerMetrics,
    ) -> None:
        self._settings, self._consumer, self._marks, self._metrics = settings, consumer, marks, metrics
        self.sound: set[Partition] = set()
        self.short: dict[Partition, ShortLog] = {}
        # Offsets behind positions of streams that seem to be beyond the log; and those that were found to be wrong.
        self._doubts: dict[Partition, set[int]] = {}
        self._unfounded: dict[Partition, set[int]] = {}
        self._seen: dict[Partition, int] = {}  # marks, as this worker has read or written them last

    def note(self, offsets: dict[Partition, int]) -> None:
        """Set the marks of these partitions. Raises UnreachableError."""
        self._marks.mark(self._settings.group, offsets, self._seen)
        self._seen |= offsets

    def new(self, partition: Partition) -> bool:
        """Whether the partition is still to be compared."""
        return partition not in self.sound and partition not in self.short

    def read_again(self, partition: Partition) -> ShortLog | None:
        """Make the partition new. Returns what was known of its log if that was short."""
        self.sound.discard(partition)
        self._doubts.pop(partition, None)
        return self.short.pop(partition, None)

    def doubt(self, partition: Partition, folded: set[int]) -> None:
        """Streams have positions in a new partition, `folded` being the offsets behind them, beyond its log's end."""
        self._doubts[partition] = folded

    def beyond(self, positions: Mapping[str, int]) -> str:
        """What is wrong with a stream that has these positions, per topic/partition; empty where nothing is known to
        be wrong. Only assigned partitions are looked at."""
        for (topic, number), unfounded in self._unfounded.items():
            where, folded = TopicPartition(topic, number), positions.get(f"{topic}/{number}", -1) + 1
            if folded in unfounded and where in self._consumer.assignment() and not self.reaches(where, folded):
                return f"its position in {topic}/{number} is {folded - 1}, which that log does not have"
        return ""

    def void(self, partition: Partition) -> None:
        """The partition was taken away, or has another log: forget which positions in it were found to be wrong."""
        self._unfounded.pop(partition, None)

    def grown(self) -> dict[Partition, ShortLog]:
        """Short partitions whose log reaches far enough by now."""
        ours = self._consumer.assignment() if self.short else ()
        return {p: short for p, short in self.short.items() if p in ours and self.reaches(p, short.reach)}

    def behind(self, first: dict[Partition, int]) -> dict[Partition, int]:
        """Compare the `first` offsets of new partitions with their marks. Returns where to read them from instead.

        Kafka's committed offset is ahead of the mark where the store has lost writes, by a crash, a failover or a
        backup; and by some frames after a rebalance, where the last commit goes to Kafka alone (`group.Listener`).
        Frames that are read again and in their streams' states are passed over. Raises KafkaError, UnreachableError.
        """
        if not first:
            return {}
        marks = self._marks.marks(self._settings.group, list(first))
        self._seen |= marks
        unknown = {partition: offset for partition, offset in first.items() if partition not in marks}
        self._begin(unknown)
        beginnings = self._beginnings([p for p, mark in marks.items() if mark < first[p]])
        self._note_expired(marks, beginnings)
        short = self._too_short(first, marks)
        self._settle(first, short)
        behind = {p: max(beginning, marks[p]) for p, beginning in beginnings.items()}
        return {partition: offset for partition, offset in behind.items() if offset < first[partition]}

    def skipped(self, reached: dict[Partition, int], first: dict[Partition, int]) -> None:
        """Records go on at `first`, later than they were read to (`reached`): count those between that the topic has
        dropped. The client skips these without a word. Raises KafkaError."""
        for partition, beginning in self._beginnings(list(reached)).items():
            if beginning > reached[partition]:
                self._lost(partition, reached[partition], min(beginning, first[partition]))

    def reaches(self, partition: Partition, offset: int) -> bool:
        """Whether the log of an assigned partition ends at `offset` or later, by the last fetch."""
        end = self._consumer.highwater(TopicPartition(*partition))
        return end is not None and end >= offset

    def _note_expired(self, marks: dict[Partition, int], beginnings: dict[Partition, int]) -> None:
        """Count what is lost of logs that begin behind their mark. The mark is moved on, so that the same records are
        not counted again when the partition is next compared. Raises UnreachableError."""
        if expired := {p: beginning for p, beginning in beginnings.items() if beginning > marks[p]}:
            self.note(expired)
            for partition, beginning in expired.items():
                self._lost(partition, marks[partition], beginning)

    def _begin(self, unknown: dict[Partition, int]) -> None:
        """Set the marks of partitions that have none, to where they begin. If the group has read of them before, the
        store has lost its data. Raises KafkaError and UnreachableError."""
        read = {partition: self._committed(partition) for partition, offset in unknown.items() if offset > 0}
        if unknown:
            self.note(unknown)
        for partition, offset in read.items():
            if offset > 0:
                log.error(
                    "partition %d was read up to %d, and the store knows nothing of it: its data is lost, or store.url "
                    "or store.prefix lead elsewhere; streams begin from source: see docs/runbooks/store.md",
                    partition[1],
                    offset,
                )
                self._metrics.forgotten.inc()
            else:
                log.info(
                    "partition %d begins at %d, and neither the group nor the store knows of it",
                    partition[1],
                    unknown[partition],
                )

    def _too_short(self, first: dict[Partition, int], marks: dict[Partition, int]) -> dict[Partition, ShortLog]:
        """Partitions whose log ends before offsets that marks or streams say are folded in. Their marks stay.

        A partition is not short because of a stream alone: if its mark lies within the log, and so does the offset that
        the group has committed, then this is the log that was folded in, and the stream's position is wrong.
        """
        said = {p: self._doubts.get(p, set()) | {marks.get(p, 0)} for p in first}
        reach = {p: max(offsets) for p, offsets in said.items()}
        asked = [TopicPartition(*p) for p, offset in reach.items() if offset > first[p] and not self.reaches(p, offset)]
        ends = self._consumer.end_offsets(asked, timeout_ms=OFFSETS_TIMEOUT_MS) if asked else {}
        # If the lowest of these is beyond the log, so are all others.
        lowest = {p: [offset for offset in said[p] if offset > end] for p, end in ends.items()}
        short = {p: ShortLog(first[p], ends[p], min(offsets)) for p, offsets in lowest.items() if offsets}
        short = without_end(self._settings, short)
        for partition in [p for p, one in short.items() if marks.get(p, 0) <= one.end and self._knows(p, one.end)]:
            self._unfounded.setdefault(partition, set()).update(lowest[partition])
            del short[partition]
        return {p: ShortLog(one.first, one.end, reach[p]) for p, one in short.items()}

    def _knows(self, partition: Partition, end: int) -> bool:
        """Whether the group has committed an offset to this broker that lies within the log. Raises KafkaError."""
        return 0 < self._committed(partition) <= end

    def _committed(self, partition: Partition) -> int:
        """The offset that the group has committed to this broker; 0 if none. Raises KafkaError."""
        return self._consumer.committed(TopicPartition(*partition), timeout_ms=OFFSETS_TIMEOUT_MS) or 0

    def _settle(self, compared: Iterable[Partition], short: dict[Partition, ShortLog]) -> None:
        """Make the compared partitions short or sound."""
        for partition in compared:
            self._doubts.pop(partition, None)
        for partition, found in short.items():
            log.error("%s; nothing of it is read; %s", found.described(partition), REMEDY)
        self.short |= short
        self.sound |= set(compared) - short.keys()

    def _beginnings(self, partitions: list[Partition]) -> dict[Partition, int]:
        where = [TopicPartition(*partition) for partition in partitions]
        return self._consumer.beginning_offsets(where, timeout_ms=OFFSETS_TIMEOUT_MS) if where else {}

    def _lost(self, partition: Partition, reached: int, beginning: int) -> None:
        log.error(
            "partition %d begins at %d now, and was read up to %d: %d records are lost; the topic's retention is "
            "shorter than the lag was: see docs/runbooks/lag.md",
            partition[1],
            beginning,
            reached,
            beginning - reached,
        )
        self._metrics.expired.inc(beginning - reached)
