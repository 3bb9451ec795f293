"""A topic's id, and its records, for commands that look back."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from schemas.config import Kafka
from schemas.errors import UnreachableError
from worker.kafka.client import open_reader, require_topics

AT_ONCE = 500  # records
PATIENCE_MS = 10_000  # for a broker that has records and does not send them
SENT_EARLIER_S = 3_600  # how much too late the timestamps of records may be, as clocks differ and are set


def topic_id(cluster: Any, topic: str) -> str:
    """The topic's id in Kafka's own spelling, from a client's metadata, `cluster`; empty if the broker tells none."""
    found = cluster.topic_id(topic)
    return base64.urlsafe_b64encode(found.bytes).decode().rstrip("=") if found and found.int else ""


def records_now(settings: Kafka, topic: str, since: datetime | None = None) -> Iterator[Any]:
    """All records of the topic, one partition after the other. With `since`, only those from the first on that was sent
    an hour before that time, so that none of that time or later is missing. What cannot be read has an `Unreadable`
    value.

    Raises ConfigError where there is no such topic, UnreachableError where the broker is away.
    """
    require_topics(settings, only=[topic])
    try:
        with closing(open_reader(settings)) as consumer:
            for number in sorted(consumer.partitions_for_topic(topic) or ()):
                yield from _partition(consumer, TopicPartition(topic, number), since)
    except KafkaError as error:
        raise UnreachableError(f"the broker at {settings.bootstrap} does not send {topic}: {error}") from error


def _partition(consumer: KafkaConsumer, partition: TopicPartition, since: datetime | None) -> Iterator[Any]:
    consumer.assign([partition])
    end = consumer.end_offsets([partition])[partition]
    if since is None:
        consumer.seek_to_beginning(partition)
    else:
        sent_ms = max(0, int(1000 * (since.timestamp() - SENT_EARLIER_S)))
        first = consumer.offsets_for_times({partition: sent_ms})[partition]
        consumer.seek(partition, end if first is None else first.offset)
    records: list[Any] = []
    # Some brokers name an end that is too early, within the last batch. If the last poll was full, the rest may follow.
    while (more := consumer.position(partition) < end) or len(records) == AT_ONCE:
        polled = consumer.poll(timeout_ms=PATIENCE_MS if more else 0, max_records=AT_ONCE)
        records = polled.get(partition, [])
        if more and not records:
            raise UnreachableError(f"the broker sends no more of {partition.topic}/{partition.partition}; try again")
        yield from records
