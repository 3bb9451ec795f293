"""The commands topic as it is read while a worker runs."""

from __future__ import annotations

import pytest
from kafka import KafkaAdminClient, KafkaProducer

from schemas.command import Command
from schemas.config import Kafka
from schemas.state import StreamHeader
from tests.broker.process import bootstrap as bootstrap  # a fixture
from tests.servers import wait_until
from worker.control import commands
from worker.control.commands import CommandList, CommandReader


def test_partitions_added_while_running_are_read_too(kafka_settings: Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "METADATA_MAX_AGE_MS", 300)
    topic, bootstrap = kafka_settings.topics.commands, kafka_settings.bootstrap
    listed = CommandList()
    reader = CommandReader(kafka_settings, listed)
    assert reader.caught_up.wait(120)
    admin = KafkaAdminClient(bootstrap_servers=bootstrap)
    admin.create_partitions({topic: 2})
    admin.close()
    producer = KafkaProducer(bootstrap_servers=bootstrap)
    sent = [Command(stream="cam", action=action) for action in ("freeze", "unfreeze")]
    for partition, command in enumerate(sent):
        content = command.model_dump_json(exclude_none=True).encode()
        producer.send(topic, key=b"cam", value=content, partition=partition).get(timeout=120)
    producer.close()
    header = StreamHeader(stream="cam", bundle="b", method="mgg")
    wait_until(lambda: len(listed.after(header)) == len(sent), "both commands")
    reader.close()
    assert {numbered.command.id for numbered in listed.after(header)} == {command.id for command in sent}
