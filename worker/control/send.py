"""A command to the topic, and the update events that confirm it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

from kafka import KafkaProducer, TopicPartition
from kafka.errors import KafkaError
from pydantic import ValidationError

from schemas.command import EVERY_STREAM, Command, command_headers, encode_command
from schemas.config import Kafka
from schemas.errors import UnreachableError
from schemas.update import UpdateEvent
from worker.kafka.client import close_producer, connection, open_client, open_reader, require_topics

QUIET_S = 3.0  # without a further confirmation end the wait for those of a command to every stream


def send_command(
    settings: Kafka, command: Command, wait_s: float, sent: Callable[[], None] = lambda: None
) -> Iterator[UpdateEvent]:
    """Send the command, and yield its update events as they come, for at most `wait_s` seconds: one for a command to a
    single stream; for a command to every stream until no more come for a while.

    `sent` is called once the broker has the command. Raises ConfigError where the topics are missing, UnreachableError
    where the broker is away.
    """
    require_topics(settings, only=[settings.topics.commands, settings.topics.updates])
    try:
        with closing(_from_now_on(settings)) as answers:
            put_command(settings, command)
            sent()
            yield from _confirmations(answers, command, wait_s)
    except KafkaError as error:
        raise UnreachableError(f"the broker at {settings.bootstrap} does not take the command: {error}") from error


def put_command(settings: Kafka, command: Command, sender: str = "command", patience_s: float = 30.0) -> None:
    """Send the command, and wait until the broker has it. Raises KafkaError and OSError."""
    producer = open_client(KafkaProducer, **connection(settings), acks="all", max_block_ms=int(1_000 * patience_s))
    content, headers = encode_command(command), command_headers(command, sender)
    try:
        sent = producer.send(settings.topics.commands, key=command.stream.encode(), value=content, headers=headers)
        sent.get(timeout=patience_s)
    finally:
        close_producer(producer, 5)


def _from_now_on(settings: Kafka) -> Any:
    consumer = open_reader(settings)
    topic = settings.topics.updates
    partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
    consumer.assign(partitions)
    for partition, offset in consumer.end_offsets(partitions).items():
        consumer.seek(partition, offset)
    return consumer


def _confirmations(answers: Any, command: Command, wait_s: float) -> Iterator[UpdateEvent]:
    deadline, seen = time.monotonic() + wait_s, set[str]()
    while time.monotonic() < deadline:
        for records in answers.poll(timeout_ms=100).values():
            for record in records:
                event = _parsed(record.value)
                if event is None or event.command != command.id or event.id in seen:
                    continue
                seen.add(event.id)
                yield event
                if command.stream != EVERY_STREAM:
                    return
                deadline = min(time.monotonic() + QUIET_S, deadline)


def _parsed(content: bytes | None) -> UpdateEvent | None:
    try:
        return UpdateEvent.model_validate_json(content or b"")
    except ValidationError:
        return None  # Not ours; `driftkeel audit verify` names such records.
