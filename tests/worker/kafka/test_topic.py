"""What a topic has now, from brokers that do not say it rightly."""

from __future__ import annotations

from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition

from schemas.config import Kafka
from tests.conftest import Topic
from worker.kafka.topic import AT_ONCE, records_now


def test_the_rest_of_the_last_batch_is_read_where_the_end_is_told_too_early(
    kafka_settings: Kafka, topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the embedded broker does. A poll that is full has not all that was fetched."""
    told = KafkaConsumer.end_offsets

    def too_early(consumer: KafkaConsumer, partitions: list[TopicPartition]) -> dict[TopicPartition, Any]:
        return {partition: max(0, end - 100) for partition, end in told(consumer, partitions).items()}

    name = kafka_settings.topics.frames
    topic.send(name, [(b"cam", b"%d" % number, []) for number in range(AT_ONCE + 100)])
    monkeypatch.setattr(KafkaConsumer, "end_offsets", too_early)
    assert [int(record.value) for record in records_now(kafka_settings, name)] == list(range(AT_ONCE + 100))
