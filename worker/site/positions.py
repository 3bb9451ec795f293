"""For the doctor: compares what the store says was read of each partition with where the broker's log ends."""

from __future__ import annotations

from contextlib import closing
from itertools import islice

from kafka import TopicPartition

from schemas.config import Kafka, WorkerConfig
from schemas.errors import ConfigError, StateError
from schemas.state import decode_header
from worker.consume.cluster import cluster_of, require_cluster
from worker.consume.offsets import Partition
from worker.consume.short_logs import REMEDY, ShortLog, without_end
from worker.consume.topic import another
from worker.kafka.client import open_admin, open_reader
from worker.kafka.inside import metadata
from worker.kafka.topic import topic_id
from worker.store.store import StateStore

PIECES = 4  # pages of streams that are looked at: a fault seldom affects one stream alone


def check_cluster(config: WorkerConfig, store: StateStore) -> None:
    """Raises ConfigError if the store's positions are of another Kafka cluster, or of another topic of the same name;
    UnreachableError and KafkaError."""
    topic = config.kafka.topics.frames
    with closing(open_reader(config.kafka)) as consumer:
        there = consumer.partitions_for_topic(topic)
        cluster, found = cluster_of(consumer), topic_id(metadata(consumer), topic)
    require_cluster(config, cluster, store.cluster(topic), store.cluster_key(topic))
    noted = store.topic_id(topic)
    if noted and not there:
        raise ConfigError(f"what the store has was read of topic {topic}, which is gone; {REMEDY}")
    if found and noted and found != noted:
        raise ConfigError(f"{another(config.kafka, found, noted)}; {REMEDY}")


def short_logs(kafka: Kafka, store: StateStore) -> dict[Partition, ShortLog]:
    """Partitions of frames and commands whose log ends before what marks or streams say was read of it. Looks at all
    marks, and at some hundred streams. Raises UnreachableError and KafkaError."""
    with closing(open_reader(kafka)) as consumer:
        topics = kafka.topics.frames, kafka.topics.commands
        partitions = [(topic, number) for topic in topics for number in consumer.partitions_for_topic(topic) or ()]
        marks = store.marks(kafka.group, partitions)
        furthest, said_by = _furthest(store, marks, partitions)
        asked = [TopicPartition(*p) for p in furthest]  # After the marks, as workers go on meanwhile.
        ends = {(where.topic, where.partition): end for where, end in consumer.end_offsets(asked).items()}
    short = {
        p: ShortLog(0, ends[p], offset, "" if marks.get(p, 0) > ends[p] else said_by[p])
        for p, offset in furthest.items()
        if ends[p] < offset
    }
    return without_end(kafka, short)


def forgotten(kafka: Kafka, store: StateStore) -> list[int]:
    """Partitions of frames that the group has read, and for which the store has no mark. Raises UnreachableError and
    KafkaError."""
    with closing(open_admin(kafka)) as admin:
        (topic,) = admin.describe_topics([kafka.topics.frames])
        asked = [TopicPartition(topic["name"], part["partition_index"]) for part in topic["partitions"]]
        found = admin.list_group_offsets({kafka.group: asked})[kafka.group] if asked else {}
    read = [(where.topic, where.partition) for where, at in found.items() if at.offset > 0]
    return sorted(number for _, number in set(read) - set(store.marks(kafka.group, read)))


def _furthest(
    store: StateStore, marks: dict[Partition, int], partitions: list[Partition]
) -> tuple[dict[Partition, int], dict[Partition, str]]:
    """Per partition the furthest offset before which a mark or a stream says that all was read, and the name of that
    stream, "" for a mark."""
    furthest, said_by = dict(marks), dict.fromkeys(marks, "")
    logs = {f"{topic}/{number}": (topic, number) for topic, number in partitions}
    for streams in islice(store.pieces(), PIECES):
        for stream, found in zip(streams, store.overview(streams), strict=True):
            try:
                header = decode_header(found.header) if found.header else None
            except StateError:
                continue
            positions = header.positions | header.commands if header else {}
            for name in positions.keys() & logs.keys():
                if positions[name] + 1 > furthest.get(logs[name], -1):
                    furthest[logs[name]], said_by[logs[name]] = positions[name] + 1, stream
    return furthest, said_by
