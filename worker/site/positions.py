"""What the store says was read of each partition, beside where the broker's log ends: for the doctor."""

from __future__ import annotations

from itertools import islice

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition

from schemas.config import Kafka, WorkerConfig
from schemas.errors import ConfigError, StateError
from schemas.state import decode_header
from worker.consume.cluster import cluster_of, require_cluster
from worker.consume.offsets import Partition
from worker.consume.short_logs import REMEDY, ShortLog, without_end
from worker.consume.topic import another
from worker.kafka.client import connection, open_client
from worker.kafka.inside import metadata
from worker.kafka.topic import topic_id
from worker.store.store import StateStore

PIECES = 4  # of the store's streams: one that is wrong is seldom alone


def check_cluster(config: WorkerConfig, store: StateStore) -> None:
    """Raises ConfigError where the store's positions are of another Kafka cluster, or another topic of the same name;
    UnreachableError and KafkaError."""
    topic = config.kafka.topics.frames
    consumer = open_client(KafkaConsumer, **connection(config.kafka))
    try:
        there = consumer.partitions_for_topic(topic)
        cluster, found = cluster_of(consumer), topic_id(metadata(consumer), topic)
    finally:
        consumer.close(autocommit=False)
    require_cluster(config, cluster, store.cluster(topic), store.cluster_key(topic))
    noted = store.topic_id(topic)
    if noted and not there:
        raise ConfigError(f"what the store has was read of topic {topic}, which is gone; {REMEDY}")
    if found and noted and found != noted:
        raise ConfigError(f"{another(config.kafka, found, noted)}; {REMEDY}")


def short_logs(kafka: Kafka, store: StateStore) -> dict[Partition, ShortLog]:
    """Partitions of frames and commands whose log ends before what marks or streams say was read of it. Where there
    are many streams, some are asked. Raises UnreachableError and KafkaError."""
    consumer = open_client(KafkaConsumer, **connection(kafka))
    try:
        topics = kafka.topics.frames, kafka.topics.commands
        partitions = [(topic, number) for topic in topics for number in consumer.partitions_for_topic(topic) or ()]
        marks = store.marks(kafka.group, partitions)
        reach, by = _read(store, marks, partitions)
        asked = [TopicPartition(*p) for p in reach]  # After the marks: workers go on meanwhile.
        ends = {(where.topic, where.partition): end for where, end in consumer.end_offsets(asked).items()}
    finally:
        consumer.close(autocommit=False)
    short = {
        p: ShortLog(0, ends[p], offset, "" if marks.get(p, 0) > ends[p] else by[p])
        for p, offset in reach.items()
        if ends[p] < offset
    }
    return without_end(kafka, short)


def forgotten(kafka: Kafka, store: StateStore) -> list[int]:
    """Partitions of frames that the group has read, and of which the store knows nothing. Raises UnreachableError and
    KafkaError."""
    admin = open_client(KafkaAdminClient, **connection(kafka))
    try:
        (topic,) = admin.describe_topics([kafka.topics.frames])
        asked = [TopicPartition(topic["name"], part["partition_index"]) for part in topic["partitions"]]
        found = admin.list_group_offsets({kafka.group: asked})[kafka.group] if asked else {}
    finally:
        admin.close()
    read = [(where.topic, where.partition) for where, at in found.items() if at.offset > 0]
    return sorted(number for _, number in set(read) - set(store.marks(kafka.group, read)))


def _read(
    store: StateStore, marks: dict[Partition, int], partitions: list[Partition]
) -> tuple[dict[Partition, int], dict[Partition, str]]:
    """Per partition the offset before which, by the furthest of all witnesses, records were folded or obeyed; and which
    stream that is, where it is not the mark."""
    reach, by = dict(marks), dict.fromkeys(marks, "")
    logs = {f"{topic}/{number}": (topic, number) for topic, number in partitions}
    for streams in islice(store.pieces(), PIECES):
        for stream, found in zip(streams, store.overview(streams), strict=True):
            try:
                header = decode_header(found.header) if found.header else None
            except StateError:
                continue
            positions = header.positions | header.commands if header else {}
            for name in positions.keys() & logs.keys():
                if positions[name] + 1 > reach.get(logs[name], -1):
                    reach[logs[name]], by[logs[name]] = positions[name] + 1, stream
    return reach, by
