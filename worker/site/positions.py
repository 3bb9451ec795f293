"""What the store says was read of each partition, beside where the broker's log ends: for the doctor."""

from __future__ import annotations

from itertools import islice

from kafka import KafkaConsumer, TopicPartition

from schemas.config import Kafka
from schemas.errors import StateError
from schemas.state import decode_header
from worker.consume.offsets import Partition
from worker.consume.short_logs import ShortLog, without_end
from worker.kafka.client import connection, open_client
from worker.store.store import StateStore

PIECES = 4  # of the store's streams: one that is wrong is seldom alone


def short_logs(kafka: Kafka, store: StateStore) -> dict[Partition, ShortLog]:
    """Partitions of frames and commands whose log ends before what marks or streams say was read of it. Where there
    are many streams, some are asked. Raises UnreachableError and KafkaError."""
    consumer = open_client(KafkaConsumer, **connection(kafka))
    try:
        topics = kafka.topics.frames, kafka.topics.commands
        partitions = [(topic, number) for topic in topics for number in consumer.partitions_for_topic(topic) or ()]
        reach = _read(store, store.marks(kafka.group, partitions), partitions)
        asked = [TopicPartition(*p) for p in reach]  # After the marks: workers go on meanwhile.
        ends = {(where.topic, where.partition): end for where, end in consumer.end_offsets(asked).items()}
    finally:
        consumer.close(autocommit=False)
    short = {p: ShortLog(0, ends[p], offset) for p, offset in reach.items() if ends[p] < offset}
    return without_end(kafka, short)


def _read(store: StateStore, marks: dict[Partition, int], partitions: list[Partition]) -> dict[Partition, int]:
    """Per partition the offset before which, by the furthest of all witnesses, records were folded or obeyed."""
    reach = dict(marks)
    logs = {f"{topic}/{number}": (topic, number) for topic, number in partitions}
    for streams in islice(store.pieces(), PIECES):
        for found in store.overview(streams):
            try:
                header = decode_header(found.header) if found.header else None
            except StateError:
                continue
            positions = header.positions | header.commands if header else {}
            for name in positions.keys() & logs.keys():
                reach[logs[name]] = max(reach.get(logs[name], 0), positions[name] + 1)
    return reach
