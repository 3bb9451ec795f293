"""A topic of frames that is deleted and created again under its name, at a broker that gives every topic an id."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import redis
from kafka import KafkaAdminClient
from kafka.admin import NewTopic

from schemas.config import WorkerConfig
from tests.conftest import Topic, picture
from tests.system.conftest import metric, running, turn_until
from worker.embedded import start_broker
from worker.kafka.client import create_topics
from worker.run import Worker
from worker.site.doctor import examine
from worker.store.store import StateStore

FRAMES = 6


@pytest.fixture(autouse=True)
def told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded broker lets whoever reads a topic that is gone go on: only its metadata says so."""
    monkeypatch.setattr("worker.consume.group.METADATA_MAX_AGE_MS", 200)


def send(config: WorkerConfig, count: int = FRAMES) -> None:
    records: list[Any] = [(b"cam", picture(i), []) for i in range(count)]
    Topic(config.kafka.bootstrap).send(config.kafka.topics.frames, records)


def delete(config: WorkerConfig) -> None:
    admin = KafkaAdminClient(bootstrap_servers=config.kafka.bootstrap)
    admin.delete_topics([config.kafka.topics.frames])
    admin.close()


def create(config: WorkerConfig) -> None:
    admin = KafkaAdminClient(bootstrap_servers=config.kafka.bootstrap)
    admin.create_topics([NewTopic(name=config.kafka.topics.frames, num_partitions=3, replication_factor=1)])
    admin.close()


def marks(config: WorkerConfig, store: StateStore) -> list[int]:
    name, group = config.kafka.topics.frames, config.kafka.group
    return list(store.marks(group, [(name, number) for number in range(3)]).values())


def fold(config: WorkerConfig, worker: Worker, store: StateStore) -> None:
    send(config)
    turn_until(worker, lambda: marks(config, store) == [FRAMES])


def refused(worker: Worker) -> bool:
    return metric(worker, "refused_partitions") == 3 and "was deleted and created again" in worker.unready()


def doctor(config: WorkerConfig) -> list[str]:
    return [f.text for f in examine(config) if (f.subject, f.level) == ("positions", "failed")]


@pytest.mark.parametrize("while_it_runs", [True, False])
def test_of_a_topic_that_was_created_again_nothing_is_taken_for_folded(
    config: WorkerConfig, store: StateStore, caplog: pytest.LogCaptureFixture, while_it_runs: bool
) -> None:
    """Also where its log has grown past the positions, or ends at the very offset that was to be read next."""
    with running(config) as worker:
        fold(config, worker, store)
        if while_it_runs:
            delete(config)
            turn_until(worker, lambda: "has no topic" in worker.unready())
            create(config)
            turn_until(worker, lambda: refused(worker))
            send(config, 2 * FRAMES)
            turn_until(worker, lambda: sum(worker._consumer.lag().values()) >= FRAMES)
    if not while_it_runs:
        delete(config)
        assert [text for text in doctor(config) if f"topic {config.kafka.topics.frames}, which is gone" in text]
        create(config)
        send(config)
    caplog.clear()
    with running(config) as worker:
        turn_until(worker, lambda: refused(worker))
        send(config)
        turn_until(worker, lambda: sum(worker._consumer.lag().values()) > 0)
        assert metric(worker, "predictions_total") == metric(worker, "frames_again_total") == 0
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1
    assert "kafka.topics" in caplog.text
    assert marks(config, store) == [FRAMES]
    assert [text for text in doctor(config) if "was deleted and created again" in text]


def test_a_topic_that_was_created_again_before_anything_was_read_is_read(
    config: WorkerConfig, store: StateStore
) -> None:
    with running(config) as worker:
        turn_until(worker, lambda: not worker.unready())
        delete(config)
        turn_until(worker, lambda: "has no topic" in worker.unready())
        create(config)
        turn_until(worker, lambda: not worker.unready())
        fold(config, worker, store)
    assert doctor(config) == []


def test_two_clusters_that_tell_one_id_are_told_by_their_topics(
    config: WorkerConfig, store: StateStore, store_url: str
) -> None:
    """As the embedded broker does, and images with a fixed one."""
    with running(config) as worker:
        fold(config, worker, store)
    broker = start_broker()
    elsewhere = config.model_copy(update={"kafka": config.kafka.model_copy(update={"bootstrap": broker.bootstrap})})
    create_topics(elsewhere.kafka, 3)
    send(elsewhere, 2 * FRAMES)
    with running(elsewhere) as worker:
        assert worker._consumer.cluster == store.cluster(config.kafka.topics.frames)
        turn_until(worker, lambda: refused(worker))
    # The way out that the runbook names for a topic that has come with all of its offsets.
    client = redis.Redis.from_url(store_url, socket_timeout=120)
    client.delete(f"{config.store.prefix}:topic:{config.kafka.topics.frames}")
    client.close()
    with running(elsewhere) as worker:
        turn_until(worker, lambda: metric(worker, "predictions_total") == FRAMES)
    broker.child.stop(0)
