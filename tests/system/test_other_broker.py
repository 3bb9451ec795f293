"""A store with the states of a topic, and another broker behind the topic's name: nothing is dropped without a word."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from kafka import KafkaAdminClient
from kafka.admin import NewTopic

from schemas.command import Command
from schemas.config import Topics, WorkerConfig
from schemas.errors import ConfigError
from schemas.state import StreamHeader, encode_header
from tests.broker.process import start_own_broker
from tests.conftest import Topic, picture
from tests.system.conftest import metric, running, turn_until
from worker.control.send import put_command
from worker.kafka.client import create_topics
from worker.run import Worker
from worker.site.doctor import examine
from worker.store.store import StateStore, Write

FRAMES = 12


@pytest.fixture
def moved(elsewhere: WorkerConfig, monkeypatch: pytest.MonkeyPatch) -> WorkerConfig:
    """The same site at a broker that is new and empty, and does not say so: as one whose topics were made again."""
    monkeypatch.setattr("worker.consume.cluster.differ", lambda cluster, noted: False)
    return elsewhere


@pytest.fixture
def elsewhere(config: WorkerConfig) -> Iterator[WorkerConfig]:
    """The same site at a broker of another cluster."""
    broker = start_own_broker()
    kafka = config.kafka.model_copy(update={"bootstrap": broker.bootstrap})
    create_topics(kafka, 3)
    yield config.model_copy(update={"kafka": kafka})
    broker.child.stop(0)


def send(config: WorkerConfig, count: int = FRAMES) -> None:
    records: list[Any] = [(b"cam", picture(i), []) for i in range(count)]
    Topic(config.kafka.bootstrap).send(config.kafka.topics.frames, records)


def fold(config: WorkerConfig) -> None:
    """As many frames as there are, into the store."""
    send(config)
    with running(config) as worker:
        turn_until(worker, lambda: metric(worker, "predictions_total") == FRAMES)
        turn_until(worker, lambda: not any(worker._parts.offsets.unfinished().values()))


def positions(config: WorkerConfig) -> list[tuple[str, str]]:
    return [(found.level, found.text) for found in examine(config) if found.subject == "positions"]


@pytest.mark.parametrize("marks", ["kept", "lowered", "lost"])
def test_another_broker_is_noticed(
    config: WorkerConfig, moved: WorkerConfig, store: StateStore, store_url: str, marks: str
) -> None:
    fold(config)
    group, name = config.kafka.group, config.kafka.topics.frames
    partitions = [(name, number) for number in range(3)]
    (partition,) = [p for p, mark in store.marks(group, partitions).items() if mark == FRAMES]
    assert [level for level, _ in positions(config)] == ["ok"]
    if marks == "lowered":
        store.mark(group, {partition: 2}, {partition: FRAMES})
    if marks == "lost":
        moved = moved.model_copy(update={"kafka": moved.kafka.model_copy(update={"group": f"{group}-2"})})
    before = store.marks(group, partitions)
    header = store.read("cam").header
    send(moved, 4)
    with running(moved) as worker:
        turn_until(worker, lambda: metric(worker, "refused_partitions") == 1)
        assert worker.unready().startswith("1 partitions are not read")
        turn_until(worker, lambda: sum(worker._consumer.lag().values()) == 4)
        assert metric(worker, "frames_again_total") == 0
        assert (positions(moved)[0][0], len(positions(moved))) == ("failed", 1)
        assert f"partition {partition[1]} of topic {name} ends at offset 4, " in positions(moved)[0][1]
    assert store.marks(group, partitions) == before
    assert store.read("cam").header == header


def test_a_topic_of_another_name_goes_on_with_what_streams_have_learnt(
    config: WorkerConfig, moved: WorkerConfig, store: StateStore
) -> None:
    fold(config)
    topics = Topics(**{**moved.kafka.topics.model_dump(), "frames": f"{moved.kafka.topics.frames}-2"})
    moved = moved.model_copy(update={"kafka": moved.kafka.model_copy(update={"topics": topics})})
    admin = KafkaAdminClient(bootstrap_servers=moved.kafka.bootstrap)
    admin.create_topics([NewTopic(name=topics.frames, num_partitions=3, replication_factor=1)])
    admin.close()
    before = store.read("cam")
    send(moved)
    with running(moved) as worker:
        turn_until(worker, lambda: metric(worker, "predictions_total") == FRAMES)
        turn_until(worker, lambda: worker._streams.engine.resident("cam").header.frames == 2 * FRAMES)
        assert worker._streams.engine.resident("cam").token == before.token + 1
    assert metric(worker, "refused_partitions") == 0


def test_commands_of_another_broker_are_noticed_by_the_doctor(config: WorkerConfig, moved: WorkerConfig) -> None:
    fold(config)
    put_command(config.kafka, Command(stream="cam", action="freeze"))
    with running(config) as worker:
        turn_until(worker, lambda: metric(worker, "commands_total", action="freeze", outcome="done") == 1)
    assert [level for level, _ in positions(config)] == ["ok"]
    commands = config.kafka.topics.commands
    assert any(f"topic {commands} ends at offset 0, " in text for _, text in positions(moved))


def test_another_store_is_noticed_by_the_doctor(config: WorkerConfig) -> None:
    """A database or prefix that is none of the workers', or a store that was emptied."""
    assert [level for level, _ in positions(config)] == ["ok"]  # Nobody has read anything yet.
    fold(config)
    assert [level for level, _ in positions(config)] == ["ok"]
    other = config.store.model_copy(update={"prefix": f"{config.store.prefix}-2"})
    (_, (level, text)) = positions(config.model_copy(update={"store": other}))
    assert level == "warning"
    assert f"group {config.kafka.group} has read partitions [" in text
    assert "store.url or store.prefix lead elsewhere" in text


def test_a_doctor_passes_over_headers_that_are_none(config: WorkerConfig, store: StateStore) -> None:
    for stream, header in [("a", b"{}"), ("b", encode_header(StreamHeader(stream="b", bundle="x", method="mgg")))]:
        (claimed,) = store.claim([stream], "w")
        store.write([Write(stream, claimed.token, 1, header, b"", b"tensors")])
    assert [level for level, _ in positions(config)] == ["ok"]


def test_two_sites_with_a_kafka_each_do_not_share_a_prefix(
    config: WorkerConfig, elsewhere: WorkerConfig, store: StateStore, client: redis.Redis
) -> None:
    """Frames of one would seem to be folded as far as the other has come."""
    fold(config)
    send(elsewhere, 2 * FRAMES)
    topic = config.kafka.topics.frames
    first = store.cluster(topic)
    with pytest.raises(ConfigError, match=f"in Kafka cluster {first}, and .* give each site a store.prefix"):
        Worker(elsewhere, threading.Event())
    assert [level for level, _ in positions(config)] == ["ok"]
    assert [level for level, text in positions(elsewhere) if "give each site" in text] == ["failed"]
    # The way out that the runbook names.
    client.delete(store.cluster_key(topic))
    with running(elsewhere) as worker:
        turn_until(worker, lambda: not worker.unready())
    assert store.cluster(topic) not in {"", first}
