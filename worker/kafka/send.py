"""A shorter way into the producer for a record that has the same topic and key as one just sent.

`KafkaProducer.send` of kafka-python 3.0.12 looks up the topic, hashes the key, and checks and measures every record, in
Python: half of the cost of publishing a prediction. A record that follows another goes straight to its partition.
"""

from __future__ import annotations

from typing import Any

from kafka.producer.future import FutureRecordMetadata

Headers = list[tuple[str, bytes]]


def can_follow(leader: object) -> bool:
    """Whether `leader`, the result of sending a record, tells the partition that was chosen for it."""
    return isinstance(leader, FutureRecordMetadata) and not leader.failed()


def follow(producer: Any, leader: Any, key: bytes | None, value: bytes | None, headers: Headers) -> Any:
    """Send a record behind `leader`, which `can_follow` has approved; the client's future. Raises KafkaError.

    Nothing is checked: key and value are bytes, one of them is not None, and both are smaller than a request may be.
    """
    partition = leader._produce_future.topic_partition
    future, full, begun, _ = producer._accumulator.append(partition, None, key, value, headers)
    if full or begun:
        producer._sender.wakeup()
    return future
