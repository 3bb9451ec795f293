"""Records that the topic throws away before their turn comes: whoever reads it has to hear of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from kafka import KafkaAdminClient, TopicPartition

from monitoring.metrics import WorkerMetrics
from schemas.config import Kafka
from schemas.frame import Position
from tests.broker.process import bootstrap as bootstrap  # a fixture
from tests.conftest import Topic
from tests.worker.consume.test_consume import Notes, counted, poll_until, send
from worker.consume.consumer import FrameConsumer
from worker.consume.offsets import Offsets


@pytest.fixture
def metrics() -> WorkerMetrics:
    return WorkerMetrics(1)


@pytest.fixture
def consumer(kafka_settings: Kafka, metrics: WorkerMetrics) -> Iterator[FrameConsumer]:
    made = FrameConsumer(kafka_settings, Offsets(), Notes(), threading.Event(), metrics)
    yield made
    made.close()


def expire(kafka: Kafka, before: int) -> None:
    admin = KafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    admin.delete_records({TopicPartition(kafka.topics.frames, 0): before})
    admin.close()


def take(consumer: FrameConsumer, until: int) -> list[int]:
    """Offsets that came, the last of them `until`, received as by the worker's loop."""
    records: list[Any] = poll_until(consumer, lambda found: bool(found) and found[-1].offset >= until)
    for record in records:
        consumer.offsets.received(Position(record.topic, record.partition, record.offset))
    return [record.offset for record in records]


def test_what_expired_while_no_worker_ran_is_counted(
    kafka_settings: Kafka, consumer: FrameConsumer, metrics: WorkerMetrics, topic: Topic
) -> None:
    send(topic, kafka_settings, 10)
    consumer._comparison.note({(kafka_settings.topics.frames, 0): 2})
    expire(kafka_settings, 7)
    assert take(consumer, 9) == [7, 8, 9]
    consumer.rewind((kafka_settings.topics.frames, 0))
    assert take(consumer, 9) == [7, 8, 9]
    assert (
        counted(metrics, "records_expired") == 5
    )  # once, though the partition was compared twice before anything was committed


def test_what_expires_while_a_worker_runs_is_counted(
    kafka_settings: Kafka, consumer: FrameConsumer, metrics: WorkerMetrics, topic: Topic
) -> None:
    send(topic, kafka_settings, 3)
    assert take(consumer, 2) == [0, 1, 2]
    consumer.pause(True)
    send(topic, kafka_settings, 10)
    consumer.poll(0)
    expire(kafka_settings, 9)
    consumer.consumer.seek(TopicPartition(kafka_settings.topics.frames, 0), 3)  # and what it had fetched is let go
    consumer.pause(False)
    assert take(consumer, 12) == [9, 10, 11, 12]
    assert counted(metrics, "records_expired") == 6


def test_what_has_not_expired_is_none(
    kafka_settings: Kafka, consumer: FrameConsumer, metrics: WorkerMetrics, topic: Topic
) -> None:
    send(topic, kafka_settings, 4)
    assert take(consumer, 3) == [0, 1, 2, 3]
    expire(kafka_settings, 4)
    send(topic, kafka_settings, 2)
    assert take(consumer, 5) == [4, 5]
    assert counted(metrics, "records_expired") == 0
