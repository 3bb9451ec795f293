"""The consumer against the real broker: assignment, revocation, commits behind the store, and what the store knows."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition

from monitoring.metrics import WorkerMetrics
from schemas.config import Kafka
from schemas.errors import ConfigError, UnreachableError
from schemas.frame import Position
from tests.chaos.proxy import flaky_broker
from tests.conftest import Topic
from tests.worker.kafka.test_batches import ZEROS, packing
from tests.worker.kafka.test_records import Latin
from worker.consume.consumer import FrameConsumer
from worker.consume.offsets import Offsets, Partition
from worker.kafka.batches import Unreadable
from worker.kafka.client import create_topics
from worker.store.store import StateStore


def until_refused(consumer: FrameConsumer) -> set[Partition]:
    """Poll until a partition is not read; returns those that were taken away. No record comes meanwhile."""
    gone: set[Partition] = set()
    deadline = time.monotonic() + 120
    while not consumer.refused:
        assert time.monotonic() < deadline
        records, lost = consumer.poll(0.05)
        gone |= lost
        assert records == []
    return gone


def counted(metrics: WorkerMetrics, name: str, **labels: str) -> float:
    """What a counter has, over all labels but these."""
    samples = (sample for family in metrics.registry.collect() for sample in family.samples)
    return sum(s.value for s in samples if s.name == f"driftkeel_{name}_total" and labels.items() <= s.labels.items())


class Notes:
    """A store's notes in memory; away while `away`."""

    def __init__(self) -> None:
        self.kept: dict[Partition, int] = {}
        self.away = False
        self.topics: dict[str, str] = {}

    def topic_id(self, topic: str, found: str = "") -> str:
        return self.topics.setdefault(topic, found) if found else self.topics.get(topic, "")

    def mark(self, group: str, offsets: dict[Partition, int], seen: Mapping[Partition, int]) -> None:
        if self.away:
            raise UnreachableError("the store does not answer")
        self.kept |= offsets

    def marks(self, group: str, partitions: list[Partition]) -> dict[Partition, int]:
        if self.away:
            raise UnreachableError("the store does not answer")
        return {p: self.kept[p] for p in partitions if p in self.kept}


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def make(kafka_settings: Kafka, notes: Notes) -> Iterator[Callable[..., FrameConsumer]]:
    made: list[FrameConsumer] = []

    def build(metrics: WorkerMetrics | None = None, **changes: object) -> FrameConsumer:
        settings = kafka_settings.model_copy(update=changes)
        made.append(FrameConsumer(settings, Offsets(), notes, threading.Event(), metrics or WorkerMetrics(1)))
        return made[-1]

    yield build
    for consumer in made:
        consumer.close()


def wait_for(consumer: FrameConsumer, partitions: int, *others: FrameConsumer) -> None:
    deadline = time.monotonic() + 120
    while len(consumer.assignment()) != partitions:
        assert time.monotonic() < deadline, f"{consumer.assignment()}, not {partitions} partitions"
        for each in (consumer, *others):
            each.poll(0.05)


def send(topic: Topic, kafka: Kafka, count: int) -> None:
    topic.send(kafka.topics.frames, [(None, b"%d" % i, []) for i in range(count)])


def poll_until(consumer: FrameConsumer, condition: Callable[[list[Any]], bool]) -> list[Any]:
    """Records that came meanwhile."""
    records: list[Any] = []
    deadline = time.monotonic() + 120
    while not condition(records):
        assert time.monotonic() < deadline, records
        records += consumer.poll(0.05)[0]
    return records


def read(consumer: FrameConsumer, until: int) -> list[int]:
    """Offsets up to this one."""
    found = poll_until(consumer, lambda records: bool(records) and records[-1].offset >= until)
    return [record.offset for record in found]


def take(consumer: FrameConsumer, kafka: Kafka, offsets: list[int], finished: int) -> None:
    """Receive these, and finish those before `finished`."""
    for offset in offsets:
        consumer.offsets.received(Position(kafka.topics.frames, 0, offset))
    consumer.offsets.finished(Position(kafka.topics.frames, 0, o) for o in offsets if o < finished)


def committed(kafka: Kafka) -> int:
    admin = KafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    found = admin.list_group_offsets([kafka.group])[kafka.group]
    admin.close()
    return max((meta.offset for meta in found.values()), default=-1)


def test_commits_follow_the_store_and_nothing_unfinished(
    make: Callable[..., FrameConsumer], notes: Notes, kafka_settings: Kafka, topic: Topic
) -> None:
    send(topic, kafka_settings, 10)
    consumer = make()
    take(consumer, kafka_settings, read(consumer, 9), finished=6)
    notes.away = True
    consumer.commit(now=True)
    assert committed(kafka_settings) == -1
    notes.away = False
    consumer.commit(now=True)
    assert committed(kafka_settings) == 6
    assert notes.kept[kafka_settings.topics.frames, 0] == 6


def commit_ten(make: Callable[..., FrameConsumer], kafka_settings: Kafka, topic: Topic) -> None:
    """Ten records, which the group has read and committed."""
    send(topic, kafka_settings, 10)
    first = make()
    take(first, kafka_settings, read(first, 9), finished=10)
    first.commit(now=True)
    first.close()


def test_what_the_store_does_not_know_is_read_again(
    make: Callable[..., FrameConsumer], notes: Notes, kafka_settings: Kafka, topic: Topic
) -> None:
    commit_ten(make, kafka_settings, topic)
    notes.kept[kafka_settings.topics.frames, 0] = 4  # as from a backup
    send(topic, kafka_settings, 1)
    notes.away = True
    second = make()
    wait_for(second, 3)
    # Nothing is handed out before the store was asked, and the lag shows all the same.
    assert poll_until(second, lambda _: second.lag().get((kafka_settings.topics.frames, 0)) == 1) == []
    for _ in range(5):
        assert second.poll(0.05)[0] == []
    notes.away = False
    assert read(second, 10) == list(range(4, 11))


def test_a_store_that_knows_nothing_of_what_the_group_has_read_is_told_from_a_new_group(
    make: Callable[..., FrameConsumer], notes: Notes, kafka_settings: Kafka, topic: Topic
) -> None:
    commit_ten(make, kafka_settings, topic)
    partition = (kafka_settings.topics.frames, 0)
    new_group = kafka_settings.model_copy(update={"group": f"{kafka_settings.group}-new"})
    for settings, forgotten in ((kafka_settings, 1), (new_group, 0)):
        metrics = WorkerMetrics(1)
        consumer = FrameConsumer(settings, Offsets(), notes, threading.Event(), metrics)
        wait_for(consumer, 3)
        notes.kept.clear()
        for _ in range(2):  # The store knows of it from the first time on.
            assert consumer._behind({partition: 10}) == {}
        assert counted(metrics, "forgotten_partitions") == forgotten
        assert notes.kept == {partition: 10}
        consumer.close()


@pytest.mark.parametrize("theirs", [9, None], ids=["another has gone on", "a group that reads again"])
def test_only_its_own_mark_is_set_back(
    kafka_settings: Kafka, store: StateStore, topic: Topic, theirs: int | None
) -> None:
    """A zombie commits first of all what it had finished; and a group whose offsets were set back notes how far it is
    this time, or a store that loses its last writes then would not show."""
    group, partition = kafka_settings.group, (kafka_settings.topics.frames, 0)
    store.mark(group, {partition: 8})
    send(topic, kafka_settings, 10)
    consumer = FrameConsumer(kafka_settings, Offsets(), store, threading.Event(), WorkerMetrics(1))
    take(consumer, kafka_settings, read(consumer, 9), finished=6)
    if theirs:
        store.mark(group, {partition: theirs})
    consumer.commit(now=True)
    assert store.marks(group, [partition]) == {partition: theirs or 6}
    consumer.close()


def test_what_the_store_does_not_answer_is_no_error_of_the_broker(
    make: Callable[..., FrameConsumer], notes: Notes, kafka_settings: Kafka, topic: Topic
) -> None:
    send(topic, kafka_settings, 10)
    metrics = WorkerMetrics(1)
    consumer = make(metrics)
    notes.away = True
    poll_until(consumer, lambda _: counted(metrics, "store_errors") > 0)  # it asks for the marks of what has come
    notes.away = False
    take(consumer, kafka_settings, read(consumer, 9), finished=10)
    asked = counted(metrics, "store_errors")
    notes.away = True
    consumer.commit(now=True)
    assert counted(metrics, "store_errors") == asked + 1
    assert counted(metrics, "broker_errors") == 0


def test_a_broker_that_hangs_when_asked_where_a_partition_begins_holds_up_the_loop_for_a_moment(
    notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.consume.comparison.OFFSETS_TIMEOUT_MS", 500)
    with flaky_broker() as broker:
        kafka = Kafka(bootstrap=f"127.0.0.1:{broker.port}")
        create_topics(kafka, 1)
        metrics = WorkerMetrics(1)
        consumer = FrameConsumer(kafka, Offsets(), notes, threading.Event(), metrics)
        wait_for(consumer, 1)
        partition = kafka.topics.frames, 0
        notes.kept[partition] = 4
        broker.hold(True)
        began = time.monotonic()
        assert consumer._behind({partition: 10}) == {partition: 10}
        assert time.monotonic() - began < 20  # without a limit of its own it takes the client's, which is 30
        assert counted(metrics, "broker_errors") == counted(metrics, "broker_errors", operation="poll") == 1
        broker.hold(False)
        consumer.close()


def test_a_rewind_reads_again_from_the_oldest_in_hand(
    make: Callable[..., FrameConsumer], kafka_settings: Kafka, topic: Topic
) -> None:
    send(topic, kafka_settings, 10)
    consumer = make()
    take(consumer, kafka_settings, read(consumer, 9), finished=3)
    consumer.commit(now=True)
    consumer.rewind((kafka_settings.topics.frames, 0))
    assert read(consumer, 9) == list(range(3, 10))


def test_a_compression_that_is_not_installed_is_said(
    make: Callable[..., FrameConsumer], kafka_settings: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer = KafkaProducer(bootstrap_servers=kafka_settings.bootstrap, compression_type="gzip")
    producer.send(kafka_settings.topics.frames, b"x" * 1_000).get(timeout=120)
    producer.close()
    monkeypatch.setattr("kafka.codec.has_gzip", lambda: False)
    consumer = make()
    with pytest.raises(ConfigError, match=r"gzip.*pip install"):
        read(consumer, 0)


def test_a_header_name_that_is_no_text_ends_nothing(
    make: Callable[..., FrameConsumer], kafka_settings: Kafka, topic: Topic
) -> None:
    topic.send(kafka_settings.topics.frames, [(None, b"0", [(Latin("größe"), b"")]), (None, b"1", [])])
    assert read(make(), 1) == [0, 1]


def test_batches_that_cannot_be_read_end_nothing(
    make: Callable[..., FrameConsumer], kafka_settings: Kafka, topic: Topic
) -> None:
    with packing(kafka_settings) as pack:
        send(topic, kafka_settings, 1)
        pack([b"a" * 999, b"b" * 999])
        pack([b"x", ZEROS, b"y"])
        pack([b"x" * 999], broken=True)
        send(topic, kafka_settings, 1)
    consumer = make()
    records = poll_until(consumer, lambda found: len(found) >= 6)
    assert [record.offset for record in records] == [0, 1, 2, 5, 6, 7]
    assert [isinstance(record.value, Unreadable) for record in records] == [False, False, False, True, True, False]


def test_lost_partitions_are_given_up_without_a_commit(
    make: Callable[..., FrameConsumer], kafka_settings: Kafka, topic: Topic
) -> None:
    send(topic, kafka_settings, 10)
    consumer = make()
    take(consumer, kafka_settings, read(consumer, 9), finished=5)
    partition = (kafka_settings.topics.frames, 0)
    asyncio.run(consumer.listener.on_partitions_lost([TopicPartition(*partition)]))
    _, gone = consumer.poll(0.05)
    assert gone == {partition}
    assert committed(kafka_settings) == -1


def test_leaving_commits_what_is_finished_and_the_next_owner_goes_on(
    make: Callable[..., FrameConsumer], kafka_settings: Kafka, topic: Topic
) -> None:
    send(topic, kafka_settings, 10)
    first = make()
    take(first, kafka_settings, read(first, 9), finished=7)
    second = make()
    deadline = time.monotonic() + 120
    given_up: set[Partition] = set()
    while not second.assignment():
        assert time.monotonic() < deadline
        given_up |= first.poll(0.05)[1]
        second.poll(0.05)
    assert (kafka_settings.topics.frames, 0) in given_up
    assert committed(kafka_settings) == 7


def test_static_membership_is_passed_on(make: Callable[..., FrameConsumer]) -> None:
    consumer = make(static_member="worker-0")
    wait_for(consumer, 3)
    assert consumer.consumer.group_metadata().group_instance_id == "worker-0"


def test_cooperative_rebalancing_is_passed_on(make: Callable[..., FrameConsumer]) -> None:
    """One member: with the embedded broker, kafka-python's second cooperative member never gets a partition."""
    consumer = make(assignment="cooperative-sticky")
    wait_for(consumer, 3)
    (assignor,) = consumer.consumer.config["partition_assignment_strategy"]
    assert getattr(assignor, "name", None) == "cooperative-sticky"


def test_an_offset_reset_to_latest_passes_over_what_was_there(
    make: Callable[..., FrameConsumer], kafka_settings: Kafka, topic: Topic
) -> None:
    send(topic, kafka_settings, 5)
    consumer = make(offset_reset="latest")
    wait_for(consumer, 3)
    assert consumer.consumer.position(TopicPartition(kafka_settings.topics.frames, 0)) == 5
    for _ in range(10):
        assert consumer.poll(0.05)[0] == []
    send(topic, kafka_settings, 2)
    assert read(consumer, 6) == [5, 6]


def test_the_markers_of_a_transaction_are_no_lag(
    make: Callable[..., FrameConsumer], kafka_settings: Kafka, bootstrap: str
) -> None:
    """They take offsets at the end of a log, and no record follows that says so."""
    topic = kafka_settings.topics.frames
    producer = KafkaProducer(bootstrap_servers=bootstrap, transactional_id=kafka_settings.group)
    producer.init_transactions()
    producer.begin_transaction()
    for _ in range(3):
        producer.send(topic, value=b"x", partition=0)
    producer.commit_transaction()
    producer.close()
    consumer = make()
    assert read(consumer, 2) == [0, 1, 2]
    take(consumer, kafka_settings, [0, 1, 2], finished=2)
    consumer.poll(0.1)
    assert consumer.consumer.highwater(TopicPartition(topic, 0)) == 4
    assert consumer.lag()[topic, 0] == 2
    consumer.offsets.finished([Position(topic, 0, 2)])
    assert consumer.lag()[topic, 0] == 0
