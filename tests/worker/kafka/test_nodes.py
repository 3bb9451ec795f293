"""A cluster whose nodes go away and come back, as they do when it is upgraded."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import NodeNotReadyError
from kafka.net.manager import KafkaConnectionManager
from kafka.protocol.metadata import FindCoordinatorRequest

from monitoring.metrics import WorkerMetrics
from schemas.config import Kafka
from schemas.errors import ConfigError
from tests.chaos.proxy import FlakyProxy, flaky_broker
from tests.cluster import FIND_COORDINATOR, NODES, Cluster, told
from tests.worker.consume.test_consume import Notes
from worker.consume.consumer import FrameConsumer
from worker.consume.offsets import Offsets
from worker.kafka.client import connection, create_topics, open_client

PATIENCE_S = 240
GROUP_AUTHORIZATION_FAILED = 30


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    cluster.create("frames", len(NODES))
    for partition, node in enumerate(NODES):
        cluster.lead("frames", partition, node)
    with told():
        yield cluster
    cluster.close()


@pytest.mark.parametrize("replaced", [False, True])
def test_clients_outlive_each_node(cluster: Cluster, replaced: bool) -> None:
    """Everything is sent once, and read, whether others lead meanwhile or nobody does."""
    arguments = connection(Kafka(bootstrap=cluster.bootstrap))
    producer = open_client(KafkaProducer, **arguments, acks="all", retries=1_000, linger_ms=0)
    consumer = open_client(KafkaConsumer, **arguments, auto_offset_reset="earliest", fetch_max_wait_ms=20)
    consumer.assign([TopicPartition("frames", partition) for partition in range(len(NODES))])
    sent, read = 0, []
    deadline = time.monotonic() + PATIENCE_S

    def poll(until: int) -> None:
        while len(read) < until and time.monotonic() < deadline:
            read.extend(record.value for part in consumer.poll(50).values() for record in part)

    for node in NODES:
        poll(sent)  # Its connections are in use.
        cluster.away(node)
        acknowledged = []
        for partition in range(len(NODES)):
            if replaced and NODES[partition] == node:
                cluster.lead("frames", partition, NODES[partition - 1])
            acknowledged.append(producer.send("frames", b"%d" % sent, partition=partition))
            sent += 1
        if not replaced:  # What the others lead goes on, and the clients see that a node is missing.
            poll(sent - 1)
        cluster.back(node)
        for partition in acknowledged:
            partition.get(PATIENCE_S)
    poll(sent)
    producer.close()
    consumer.close(autocommit=False)
    assert sorted(read, key=int) == [b"%d" % i for i in range(sent)]


def test_a_node_that_nobody_knows_is_asked_for_later(cluster: Cluster) -> None:
    consumer = open_client(KafkaConsumer, **connection(Kafka(bootstrap=cluster.bootstrap)))
    manager = consumer._client._manager
    with pytest.raises(NodeNotReadyError):
        manager.get_connection(99)
    assert manager.connection_delay(99) > 0
    consumer.close(autocommit=False)


def test_a_user_without_permission_is_told_of_it(cluster: Cluster) -> None:
    settings = Kafka(bootstrap=cluster.bootstrap, group="group")
    consumer = FrameConsumer(settings, Offsets(), Notes(), threading.Event(), WorkerMetrics(1))
    cluster.answer(FIND_COORDINATOR, [GROUP_AUTHORIZATION_FAILED] * 9)
    with pytest.raises(ConfigError, match="does not let this user read") as caught:
        consumer.poll(PATIENCE_S)
    assert "GroupAuthorizationFailedError: group; give it the permissions" in str(caught.value)
    consumer.close()


def test_a_way_to_a_broker_that_is_away_is_tried_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """As through a load balancer, which takes every connection and ends it."""
    tries, accept = [], FlakyProxy._accept

    def count(proxy: FlakyProxy) -> None:
        tries.append(proxy._down)
        accept(proxy)

    monkeypatch.setattr(FlakyProxy, "_accept", count)
    with flaky_broker() as broker:
        settings = Kafka(bootstrap=f"127.0.0.1:{broker.port}")
        create_topics(settings, 1)
        consumer = open_client(KafkaConsumer, **connection(settings))
        consumer.assign([TopicPartition(settings.topics.frames, 0)])
        consumer.position(TopicPartition(settings.topics.frames, 0))
        consumer.poll(500)
        broker.down(True)
        deadline = time.monotonic() + PATIENCE_S
        while sum(tries) < 5 and time.monotonic() < deadline:
            consumer.poll(50)
        for _ in range(20):
            consumer.poll(50)
        broker.down(False)
        while not consumer.topics() and time.monotonic() < deadline:
            pass
        consumer.close(autocommit=False)
    assert 5 <= sum(tries) < 50


def test_a_coordinator_that_is_away_is_asked_for_now_and_then(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = open_client(KafkaConsumer, **connection(Kafka(bootstrap=cluster.bootstrap)), group_id="group")
    consumer.subscribe(["frames"])
    cluster.coordinate("group", NODES[0])
    deadline = time.monotonic() + PATIENCE_S
    while not consumer.assignment() and time.monotonic() < deadline:
        consumer.poll(50)
    assert consumer.assignment()
    asked = []
    send = KafkaConnectionManager.send

    def count(manager: Any, request: Any, *arguments: Any, **options: Any) -> Any:
        asked.extend([request] * isinstance(request, FindCoordinatorRequest))
        return send(manager, request, *arguments, **options)

    monkeypatch.setattr(KafkaConnectionManager, "send", count)
    cluster.away(NODES[0])
    while not asked and time.monotonic() < deadline:
        consumer.poll(50)
    for _ in range(20):
        consumer.poll(50)
    consumer.close(autocommit=False)
    assert 1 <= len(asked) < 50
