"""Frames from Kafka: records, assignment and committed offsets.

A poll asks these questions in this order before it returns any record. Records that fail one are read again later.

    topic.py       Is this the topic that the store has positions of?
    group.py       Was the partition taken away meanwhile?
    beyond.py      Does the log end before the offset that is read next?  And, here: does it go on where it was read to?
    comparison.py  Does the log have all that the store has folded in, and the store all before the first record?
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

from kafka import TopicPartition
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata

from monitoring.metrics import WorkerMetrics
from schemas.config import Kafka
from schemas.errors import UnreachableError
from worker.consume.beyond import Beyond
from worker.consume.cluster import cluster_of
from worker.consume.comparison import Comparison, Marks
from worker.consume.ends import Ends
from worker.consume.group import Listener, open_member, polled, with_metadata
from worker.consume.offsets import Offsets, Partition
from worker.consume.standstill import Standstill
from worker.consume.topic import FramesTopic
from worker.kafka.client import until_reached
from worker.kafka.inside import assigned, last_answer

log = logging.getLogger("driftkeel.consume")
COMMIT_INTERVAL_S = 1.0
ASK_AGAIN_S = 0.5
# The time for the last commit, and for leaving the group; and the shorter one if the broker has been silent before.
LAST_CALL_MS, SILENT_S, BRIEF_MS = 5_000, 5.0, 500


class FrameConsumer:
    """Belongs to the worker's loop."""

    def __init__(
        self,
        settings: Kafka,
        offsets: Offsets,
        marks: Marks,
        stop: threading.Event,
        metrics: WorkerMetrics,
    ) -> None:
        self._settings, self._metrics = settings, metrics
        self.offsets, self._stop = offsets, stop
        self._last_commit = 0.0
        self._paused = False
        self.consumer = consumer = open_member(settings, stop)
        self._ends, self._standstill = Ends(consumer), Standstill(consumer)
        self._beyond, self._topic = Beyond(settings, consumer, metrics), FramesTopic(settings, consumer, marks)
        self._comparison = Comparison(settings, consumer, marks, metrics)
        self.listener = Listener(consumer, self.committable)
        topic, what = settings.topics.frames, f"the broker at {settings.bootstrap}"
        consumer.subscribe([topic], listener=self.listener)
        # A member that joins before it knows the topic's partitions would, as leader of the group, assign none.
        until_reached(lambda: consumer.partitions_for_topic(topic), what, settings.connect_timeout_s, stop)

    def poll(self, timeout_s: float) -> tuple[list[Any], set[Partition]]:
        """Records that arrived, oldest first within a partition, and partitions that were taken away before them.

        A partition may be taken away and come back at once. The client then goes on behind the records that it has
        handed out, but the worker gives up those in hand with the revocation. So it is read again from the oldest of
        these, and newer records of the same poll are passed over.

        Never raises for an unreachable broker or store. Raises ConfigError for records in a compression that is not
        installed, where the group's other members offer no assignment strategy of this one, where another worker has
        taken its static name, and where the user has no permission to read. A record's value is `Unreadable` where it
        stands for records that nobody can read.
        """
        self._topic.look()
        arrived = self._known(polled(self.consumer, self._settings, timeout_s, self._metrics))
        self._standstill.polled(arrived, self._comparison.short)
        gone = self.listener.taken()
        first = {p: part[0].offset for p, part in arrived.items() if p not in gone}
        gone |= self._other_logs(first)
        self._skipped(first)
        for partition in gone:
            self._comparison.void(partition)
            passed_over = arrived.pop(partition, [])
            self.rewind(partition, passed_over[0].offset if passed_over else None)
        for partition, short in self._comparison.grown().items():
            log.warning("partition %d has grown to offset %d and is read again", partition[1], short.reach)
            self.rewind(partition)
            arrived.pop(partition, None)
        for partition, offset in self._behind({p: first[p] for p in arrived if self._comparison.new(p)}).items():
            del arrived[partition]
            self.consumer.seek(TopicPartition(*partition), offset)
        return [record for p, part in arrived.items() if p not in self._comparison.short for record in part], gone

    def _known(self, arrived: dict[Partition, list[Any]]) -> dict[Partition, list[Any]]:
        """The records, if the topic is the one that the store has positions of. None if it is another one, or while the
        store does not answer: these are read again."""
        try:
            self._topic.check(begins=any(p not in self._comparison.sound for p in arrived))
            if not self._topic.other:
                return arrived
        except UnreachableError as error:
            self._wait(arrived, error)
        for where in self.consumer.assignment() & arrived.keys():
            self.consumer.seek(where, arrived[where][0].offset)
            if self._topic.other:
                self.consumer.pause(where)
        return {}

    def _behind(self, first: dict[Partition, int]) -> dict[Partition, int]:
        """Where to read partitions from instead, because the store has folded in less. While broker or store do not
        answer, that is where they are: they wait, and are read again."""
        try:
            return self._comparison.behind(first)
        except (KafkaError, UnreachableError) as error:
            self._wait(first, error)
            return first

    def _wait(self, partitions: Iterable[Partition], error: Exception) -> None:
        self._count("poll", error)
        log.warning("partitions %s wait: %s", sorted(number for _, number in partitions), error)
        self._stop.wait(ASK_AGAIN_S)

    def _other_logs(self, first: dict[Partition, int]) -> set[Partition]:
        """Partitions that go on, or end, before offsets that were read of them already: their log was cut, or is
        another one. All that is known of them is forgotten, and they are compared with the store again."""
        cut = {p for p, offset in self.offsets.reached(first).items() if first[p] < offset}
        for partition in cut:
            log.warning("partition %d goes on at %d, which was read before", partition[1], first[partition])
        others = cut | self._beyond.begin_anew(self._comparison.short)
        self.offsets.forget(others)
        return others

    def _skipped(self, first: dict[Partition, int]) -> None:
        """Where records go on later than they were read to, count those between that the topic has dropped. A gap of
        one offset is no sign of that: the marker of a transaction has an offset, too."""
        reached = {p: offset for p, offset in self.offsets.reached(first).items() if first[p] > offset + 1}
        try:
            self._comparison.skipped(reached, first)
        except KafkaError as error:
            self._metrics.broker_error("poll")
            log.warning("partitions %s go on behind what was read (%s)", sorted(n for _, n in reached), error)

    def reaches(self, partition: Partition, offset: int) -> bool:
        """Whether the log of an assigned partition ends at `offset` or later, by the last fetch."""
        return self._comparison.reaches(partition, offset)

    def doubt(self, partition: Partition, folded: set[int]) -> None:
        """Streams have positions in this partition, `folded` being the offsets behind them, beyond the end of its log.
        It is read again, after it was compared with the store anew."""
        self.rewind(partition)
        self._comparison.doubt(partition, folded)

    def beyond(self, positions: Mapping[str, int]) -> str:
        """What is wrong with a stream that has these positions, per topic/partition; empty where nothing is known to
        be wrong. Only assigned partitions are looked at."""
        return self._comparison.beyond(positions)

    @property
    def refused(self) -> int:
        """How many assigned partitions are not read, because the store has positions beyond their log, or of another
        topic."""
        return len(self.consumer.assignment()) if self._topic.other else len(self._comparison.short)

    @property
    def trouble(self) -> str:
        """What is wrong with the topic as a whole; empty where nothing is."""
        return self._topic.trouble

    @property
    def stuck(self) -> int:
        """How many partitions have brought nothing for a minute although they have more."""
        return len(self._standstill.stuck)

    def pause(self, paused: bool) -> None:
        """Stop or go on taking over records. The group membership stays."""
        assigned = self.consumer.assignment()
        if paused:
            self.consumer.pause(*assigned)
        elif self._paused:
            self.consumer.resume(*assigned)
        if paused != self._paused:
            self._ends.forget()
        self._paused = paused

    def rewind(self, partition: Partition, otherwise: int | None = None) -> None:
        """Forget the records of a partition that are in hand. Where it is still assigned, read it again from the oldest
        of these, or from `otherwise` where nothing was in hand."""
        offset, short = self.offsets.next_offset(partition), self._comparison.read_again(partition)
        self.offsets.forget([partition])
        if offset is None:
            offset = short.first if short else otherwise
        where = TopicPartition(*partition)
        if offset is not None and where in self.consumer.assignment():
            self.consumer.seek(where, offset)

    def committable(self, partitions: Iterable[Partition] | None = None) -> dict[Partition, int]:
        """Offsets to commit; none where the broker's topic is not the one that they are of."""
        return {} if self._topic.other else self.offsets.committable(partitions)

    def commit(self, now: bool = False) -> None:
        """Commit finished offsets, at most once a second unless `now`.

        A failed commit loses nothing: the position in each stream's state decides what is folded in. The store's marks
        are set before Kafka has the offsets, so that a store which has lost writes can be told by its older marks.
        """
        moment = time.monotonic()
        if not now and moment - self._last_commit < COMMIT_INTERVAL_S:
            return
        self._last_commit = moment
        offsets = self.committable()
        if not offsets:
            return
        try:
            self._comparison.note(offsets)
            if now:
                self.consumer.commit(with_metadata(offsets), timeout_ms=self._last_call_ms)
                self.offsets.committed(offsets)
            else:
                self.consumer.commit_async(with_metadata(offsets), callback=self._committed)
        except (KafkaError, UnreachableError) as error:
            self._count("commit", error)
            log.warning("offsets not committed (%s); their frames may be read again", error)

    def _committed(self, offsets: dict[TopicPartition, OffsetAndMetadata], answer: Any) -> None:
        if isinstance(answer, Exception):
            self._metrics.broker_error("commit")
            log.warning("offsets not committed (%s); trying again with the next", answer)
        else:
            self.offsets.committed({partition: meta.offset for partition, meta in offsets.items()})

    def _count(self, operation: str, error: Exception) -> None:
        """Count a failed call: UnreachableError is the store's, which has the marks; all else is the broker's."""
        if isinstance(error, UnreachableError):
            self._metrics.store_errors.inc()
        else:
            self._metrics.broker_error(operation)

    def assignment(self) -> set[Partition]:
        """The partitions that are assigned to this worker now."""
        return set(self.consumer.assignment())

    @property
    def cluster(self) -> str:
        """The id of the broker's cluster; empty where it tells none."""
        return cluster_of(self.consumer)

    @property
    def joined(self) -> bool:
        """Whether this worker is a member of the group, with partitions or without."""
        return bool(self.consumer.group_metadata().generation_id >= 0)

    def answered(self) -> float:
        """When the broker last answered anything, be it a heartbeat, in monotonic seconds. From any thread."""
        return last_answer(self.consumer)

    @property
    def _last_call_ms(self) -> int:
        return LAST_CALL_MS if time.monotonic() - self.answered() < SILENT_S else BRIEF_MS

    def lag(self) -> dict[Partition, int]:
        """Records of each assigned partition that are not finished, by the last fetch. While partitions are paused
        nothing is fetched, and the broker is asked every few seconds, which takes a moment."""
        lags, ends = {}, self._ends.now() if self._paused else {}
        in_hand = self.offsets.unfinished()
        for partition, state in assigned(self.consumer).items():
            done = self.offsets.next_offset(partition)
            if short := self._comparison.short.get(partition):
                done = short.first
            elif state.position and not in_hand.get(partition):
                done = state.position.offset  # Also behind markers of transactions, which are no records.
            known = [offset for offset in (state.highwater, ends.get(partition)) if offset is not None]
            if known and done is not None:
                lags[partition] = max(0, max(known) - done)
        return lags

    def close(self) -> None:
        """Leave the group. Nothing more is committed."""
        self.offsets.forget(self.assignment())  # Or the listener would commit, and wait for the broker.
        self.consumer.close(autocommit=False, timeout_ms=self._last_call_ms)
