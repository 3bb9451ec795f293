"""What a client of kafka-python 3.0.12 knows and its public interface does not tell.

The client retries for ever by itself. To whoever polls it, a broker that is away looks like one without records.
"""

from __future__ import annotations

from typing import Any

from kafka import KafkaProducer, TopicPartition


def last_answer(client: Any) -> float:
    """When a consumer or producer got its last response to any request, in monotonic seconds. From any thread."""
    return float(client._metrics.get_sensor("request-latency")._last_record_time) / 1000


def metadata(client: Any) -> Any:
    """The `ClusterMetadata` of a consumer or producer, as the broker sent it last: asking it sends no request."""
    return client._metadata if isinstance(client, KafkaProducer) else client._cluster


def assigned(consumer: Any) -> dict[TopicPartition, Any]:
    """The consumer's partitions, each with its `position`, `highwater` and `paused`. They change only in its poll."""
    return dict(consumer._subscription.assignment)
