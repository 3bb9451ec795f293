"""A log that ends before what the store has folded of it: another broker's, or of a topic that was created again."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator

import pytest
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from kafka.admin import NewTopic

from monitoring.metrics import WorkerMetrics
from schemas.config import Kafka
from tests.broker.process import bootstrap as bootstrap  # a fixture
from tests.conftest import Topic
from tests.worker.consume.test_consume import Notes, committed, poll_until, read, send, take, until_refused, wait_for
from tests.worker.consume.test_consume import notes as notes  # a fixture
from worker.consume.consumer import FrameConsumer
from worker.consume.offsets import Offsets
from worker.consume.short_logs import ShortLog, without_end
from worker.embedded import start_broker
from worker.kafka.client import create_topics


@pytest.fixture
def consumer(kafka_settings: Kafka, notes: Notes) -> Iterator[FrameConsumer]:
    consumer = FrameConsumer(kafka_settings, Offsets(), notes, threading.Event(), WorkerMetrics(1))
    yield consumer
    consumer.close()


def test_a_log_that_ends_before_its_mark_is_not_read(
    consumer: FrameConsumer, notes: Notes, kafka_settings: Kafka, topic: Topic, caplog: pytest.LogCaptureFixture
) -> None:
    partition = (kafka_settings.topics.frames, 0)
    notes.kept[partition] = 50
    send(topic, kafka_settings, 10)
    assert poll_until(consumer, lambda _: consumer.refused == 1) == []
    consumer.commit(now=True)
    assert (notes.kept[partition], committed(kafka_settings)) == (50, -1)
    send(topic, kafka_settings, 10)
    assert poll_until(consumer, lambda _: consumer.lag()[partition] == 20) == []
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(said) == 1
    assert f"partition 0 of topic {partition[0]} ends at offset 10, " in said[0]
    assert "read up to 50" in said[0]
    assert "kafka.topics" in said[0]


def test_a_log_that_lost_its_end_is_read_once_it_has_grown(
    consumer: FrameConsumer, notes: Notes, kafka_settings: Kafka, topic: Topic
) -> None:
    notes.kept[kafka_settings.topics.frames, 0] = 13
    send(topic, kafka_settings, 10)
    poll_until(consumer, lambda _: consumer.refused == 1)
    send(topic, kafka_settings, 5)
    assert read(consumer, 14) == list(range(15))
    assert consumer.refused == 0


def test_what_a_stream_says_is_asked_of_the_broker(
    consumer: FrameConsumer, notes: Notes, kafka_settings: Kafka, topic: Topic
) -> None:
    partition = (kafka_settings.topics.frames, 0)
    send(topic, kafka_settings, 10)
    take(consumer, kafka_settings, read(consumer, 9), finished=0)
    consumer.doubt(partition, {10})  # the log has as many
    take(consumer, kafka_settings, read(consumer, 9), finished=0)
    consumer.doubt(partition, {11})
    assert poll_until(consumer, lambda _: consumer.refused == 1) == []
    consumer.rewind(partition)  # as with every new connection to the store, which may be another one
    take(consumer, kafka_settings, read(consumer, 9), finished=0)
    consumer.doubt(partition, {11})
    consumer.rewind(partition)  # before the broker is asked
    assert read(consumer, 9) == list(range(10))


def test_of_a_log_that_the_group_knows_a_stream_that_says_more_is_wrong(
    consumer: FrameConsumer, notes: Notes, kafka_settings: Kafka, topic: Topic
) -> None:
    partition = (kafka_settings.topics.frames, 0)
    log = f"{partition[0]}/0"
    send(topic, kafka_settings, 10)
    take(consumer, kafka_settings, read(consumer, 9), finished=5)
    consumer.commit(now=True)
    consumer.doubt(partition, {10, 12, 50})  # the log has ten
    assert [r.offset for r in poll_until(consumer, bool)] == list(range(5, 10))
    assert consumer.refused == 0
    assert consumer.beyond({log: 49}) == f"its position in {log} is 49, which that log does not have"
    assert [bool(consumer.beyond({log: offset})) for offset in (9, 10, 11, 40)] == [False, False, True, False]
    assert consumer.beyond({"other/0": 49}) == ""
    send(topic, kafka_settings, 3)
    poll_until(consumer, lambda records: bool(records) and records[-1].offset == 12)
    assert [bool(consumer.beyond({log: offset})) for offset in (11, 49)] == [False, True]


def test_what_streams_said_of_a_partition_is_void_once_it_was_taken_away(
    consumer: FrameConsumer, kafka_settings: Kafka, topic: Topic
) -> None:
    partition = (kafka_settings.topics.frames, 0)
    send(topic, kafka_settings, 10)
    take(consumer, kafka_settings, read(consumer, 9), finished=5)
    consumer.commit(now=True)
    consumer.doubt(partition, {50})
    take(consumer, kafka_settings, read(consumer, 9), finished=5)
    assert consumer.beyond({f"{partition[0]}/0": 49})
    asyncio.run(consumer.listener.on_partitions_lost([TopicPartition(*partition)]))
    assert consumer.poll(0.0)[1] == {partition}
    assert consumer.beyond({f"{partition[0]}/0": 49}) == ""


def test_a_mark_beyond_the_end_is_believed_also_of_a_log_that_the_group_knows(
    consumer: FrameConsumer, notes: Notes, kafka_settings: Kafka, topic: Topic
) -> None:
    """A log that lost its end: what was folded of it is in many streams."""
    partition = (kafka_settings.topics.frames, 0)
    send(topic, kafka_settings, 10)
    take(consumer, kafka_settings, read(consumer, 9), finished=5)
    consumer.commit(now=True)
    notes.kept[partition] = 11
    consumer.doubt(partition, {12})
    assert poll_until(consumer, lambda _: consumer.refused == 1) == []
    assert consumer.beyond({f"{partition[0]}/0": 11}) == ""


def test_a_topic_that_is_created_again_under_a_running_consumer(
    consumer: FrameConsumer, notes: Notes, kafka_settings: Kafka, topic: Topic
) -> None:
    name = kafka_settings.topics.frames
    send(topic, kafka_settings, 10)
    take(consumer, kafka_settings, read(consumer, 9), finished=10)
    consumer.commit(now=True)
    admin = KafkaAdminClient(bootstrap_servers=kafka_settings.bootstrap)
    admin.delete_topics([name])
    admin.create_topics([NewTopic(name=name, num_partitions=3, replication_factor=1)])
    admin.close()
    send(topic, kafka_settings, 4)
    gone = until_refused(consumer)
    consumer.commit(now=True)
    assert gone == {(name, 0)}  # what is in memory of it has to go
    assert notes.kept[name, 0] == 10


def test_other_partitions_go_on(consumer: FrameConsumer, notes: Notes, kafka_settings: Kafka, topic: Topic) -> None:
    name = kafka_settings.topics.frames
    notes.kept[name, 0] = 50
    wait_for(consumer, 3)
    send(topic, kafka_settings, 3)
    poll_until(consumer, lambda _: consumer.refused == 1)
    topic.send(name, [(b"cam-%d" % i, b"x", []) for i in range(20)])
    poll_until(consumer, lambda records: {record.partition for record in records} == {1, 2})


def test_a_broker_that_names_the_beginning_of_the_last_batch_as_the_end_is_not_taken_at_its_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The embedded broker does."""
    embedded = start_broker()
    kafka = Kafka(bootstrap=embedded.bootstrap)
    create_topics(kafka, 1)
    producer = KafkaProducer(bootstrap_servers=embedded.bootstrap, linger_ms=5_000)
    for number in range(5):
        producer.send(kafka.topics.frames, b"%d" % number)
    producer.flush()
    producer.close()
    partition = (kafka.topics.frames, 0)
    all_there, one_more = ShortLog(0, 1, 5), ShortLog(0, 1, 6)
    with monkeypatch.context() as patient:
        patient.setattr("worker.consume.short_logs.LOOK_S", 120.0)
        assert without_end(kafka, {partition: all_there}) == {}
    assert without_end(kafka, {partition: one_more}) == {partition: one_more}
    embedded.child.stop(0)
