"""A log that ends before where it is read from, also on a broker that does not say so: the embedded one."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from kafka import TopicPartition

from monitoring.metrics import WorkerMetrics
from schemas.config import Kafka
from tests.conftest import Topic
from tests.worker.consume.test_consume import Notes, read, send, take, until_refused
from tests.worker.consume.test_consume import notes as notes  # a fixture
from worker.consume import beyond
from worker.consume.consumer import FrameConsumer
from worker.consume.offsets import Offsets, Partition

Begun = tuple[FrameConsumer, Partition]


@pytest.fixture
def begun(kafka_settings: Kafka, notes: Notes, topic: Topic, monkeypatch: pytest.MonkeyPatch) -> Iterator[Begun]:
    """A consumer of a log of ten records, and its partition. As under one that has read a hundred of another log."""
    monkeypatch.setattr(beyond, "PATIENCE_S", 0.0)
    consumer = FrameConsumer(kafka_settings, Offsets(), notes, threading.Event(), WorkerMetrics(1))
    partition = (kafka_settings.topics.frames, 0)
    send(topic, kafka_settings, 10)
    take(consumer, kafka_settings, read(consumer, 9), finished=10)
    consumer.consumer.seek(TopicPartition(*partition), 100)
    notes.kept[partition] = 100
    yield consumer, partition
    consumer.close()


def test_what_the_store_knows_more_of_is_not_read(begun: Begun, notes: Notes) -> None:
    consumer, partition = begun
    gone = until_refused(consumer)
    consumer.commit(now=True)
    assert gone == {partition}  # what is in memory of it has to go
    assert notes.kept[partition] == 100


def test_with_a_store_that_begins_anew_too_it_is_read_from_its_beginning(begun: Begun, notes: Notes) -> None:
    consumer, _ = begun
    notes.kept.clear()
    assert read(consumer, 9) == list(range(10))
