"""Partitions whose log ends before an offset that the store says is folded in. The log is that of another broker, or of
a topic that was deleted and created again under its name.

Its frames would all be taken for folded in. So none is taken, and the partition's mark stays, until the log has grown
past that offset. A log that has lost its end (an unclean leader election) gets there soon.

If the partition's mark lies within the log, and so does an offset that the group has committed to this broker, it is
the log that was folded in. A stream with a position beyond it is wrong by itself, and the partition is read.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from shlex import quote

from kafka import TopicPartition

from schemas.config import Kafka
from worker.consume.offsets import Partition
from worker.kafka.client import open_reader

LOOK_S = 2.0
REMEDY = (
    "give the new topic a name of its own (kafka.topics), with which streams keep what they have learnt, or begin anew "
    "with another store.prefix: see docs/runbooks/other-topic.md"
)


def cure(stream: str) -> str:
    """What to do about a stream whose position is beyond its log."""
    return (
        f"'driftkeel streams delete -- {quote(stream)}' lets it begin anew; to keep what it has learnt, 'driftkeel "
        "streams export' it before and 'import' it after that"
    )


@dataclass(frozen=True)
class ShortLog:
    """Offsets: reading would begin at `first`, the log ends at `end`, and has to reach `reach` before it is read.

    `stream`: whose position `reach` comes from, where that is known; otherwise from the partition's mark.
    """

    first: int
    end: int
    reach: int
    stream: str = ""

    def described(self, partition: Partition) -> str:
        """What is wrong, in a line."""
        topic, number = partition
        by = f"stream {self.stream}" if self.stream else "the store"
        return (
            f"partition {number} of topic {topic} ends at offset {self.end}, and by {by} it was read up to "
            f"{self.reach}: this is another broker, or the topic was deleted and created again"
        )


def without_end(kafka: Kafka, short: dict[Partition, ShortLog]) -> dict[Partition, ShortLog]:
    """Those of `short` whose last record that was read cannot be fetched either. Where a broker says that a log ends is
    not enough to refuse it: the embedded one names the beginning of the last batch. Raises KafkaError."""
    if not short:
        return {}
    missing = dict(short)
    with contextlib.closing(open_reader(kafka)) as consumer:
        consumer.assign([TopicPartition(*partition) for partition in short])
        for partition, found in short.items():
            consumer.seek(TopicPartition(*partition), found.reach - 1)
        until = time.monotonic() + LOOK_S
        while missing and time.monotonic() < until:
            for partition, records in consumer.poll(timeout_ms=100).items():
                if partition in missing and records[-1].offset >= missing[partition].reach - 1:
                    del missing[partition]
    return missing
