"""The worker as a member of its consumer group: the client, its errors, and partitions that are taken away."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.subscription_state import AsyncConsumerRebalanceListener
from kafka.errors import (
    CommitFailedError,
    FencedInstanceIdError,
    GroupAuthorizationFailedError,
    IllegalGenerationError,
    InconsistentGroupProtocolError,
    KafkaError,
    RebalanceInProgressError,
    TopicAuthorizationFailedError,
    UnknownMemberIdError,
)
from kafka.structs import OffsetAndMetadata

from monitoring.metrics import WorkerMetrics
from schemas.config import Kafka
from schemas.errors import ConfigError, UnreachableError
from worker.consume.assignors import ASSIGNORS
from worker.consume.offsets import Partition
from worker.kafka.client import connection, open_client, until_reached
from worker.kafka.fenced import raise_when_fenced
from worker.kafka.join import keep_joins, poll_timeout

log = logging.getLogger("driftkeel.consume")
FETCH_BYTES = 256 << 10  # of a partition at a time: all of it is handed out before the other partitions' next frames
METADATA_MAX_AGE_MS = 30_000  # partitions that are added while workers run are found after so long
LOST_MEMBERSHIP = (CommitFailedError, IllegalGenerationError, RebalanceInProgressError, UnknownMemberIdError)


def open_member(settings: Kafka, stop: threading.Event) -> Any:
    """A `KafkaConsumer` of the group, once the broker can be reached. The caller subscribes it."""
    arguments = connection(settings)

    def make() -> Any:
        return open_client(
            KafkaConsumer,
            **arguments,
            group_id=settings.group,
            enable_auto_commit=False,
            auto_offset_reset=settings.offset_reset,
            session_timeout_ms=settings.session_timeout_ms,
            heartbeat_interval_ms=settings.heartbeat_interval_ms,
            fetch_max_wait_ms=settings.fetch_max_wait_ms,
            max_partition_fetch_bytes=FETCH_BYTES,
            max_poll_records=settings.max_poll_records,
            partition_assignment_strategy=ASSIGNORS[settings.assignment],
            group_instance_id=settings.static_member,
            metadata_max_age_ms=METADATA_MAX_AGE_MS,
        )

    consumer = until_reached(make, f"the broker at {settings.bootstrap}", settings.connect_timeout_s, stop)
    raise_when_fenced(consumer)
    keep_joins(consumer)
    return consumer


def polled(consumer: Any, settings: Kafka, timeout_s: float, metrics: WorkerMetrics) -> dict[Partition, list[Any]]:
    """What the client has. Nothing where the poll failed in a way that another may not, which is counted."""
    try:
        timeout_s = poll_timeout(consumer, timeout_s)
        return dict(consumer.poll(timeout_ms=max(0, int(timeout_s * 1000))))
    except LOST_MEMBERSHIP as error:
        metrics.broker_error("poll")
        log.warning("lost the consumer group (%s); joining again", error)
    except InconsistentGroupProtocolError as error:
        raise ConfigError(
            f"group {settings.group} at {settings.bootstrap} has members that share no partitions with "
            f"kafka.assignment {settings.assignment}: older workers, or other programs; stop those first, or correct "
            "kafka.group"
        ) from error
    except (GroupAuthorizationFailedError, TopicAuthorizationFailedError) as error:
        raise ConfigError(
            f"the broker at {settings.bootstrap} does not let this user read: {error}; give it the permissions that "
            "docs/secure.md lists, or correct kafka.group and kafka.topics"
        ) from error
    except FencedInstanceIdError as error:
        raise ConfigError(
            f"another worker has joined group {settings.group} at {settings.bootstrap} as "
            f"kafka.static_member {settings.static_member}, and has the place of this one; give each a name of its own"
        ) from error
    except KafkaError as error:
        if not error.retriable:
            raise UnreachableError(f"the broker at {settings.bootstrap} refuses to go on: {error}") from error
        metrics.broker_error("poll")
        log.warning("polling the broker at %s failed (%s); trying again", settings.bootstrap, error)
    return {}


class Listener(AsyncConsumerRebalanceListener):  # type: ignore[misc]
    """Commits what is finished and notes what is taken away. Runs on the client's thread while the loop waits in poll.

    It commits to Kafka alone and sets no marks, because this thread must not wait for the store.
    """

    def __init__(self, consumer: Any, committable: Callable[[Iterable[Partition]], dict[Partition, int]]) -> None:
        """`committable`: the offsets of partitions that may be committed."""
        self._consumer, self._committable = consumer, committable
        self._taken: deque[Partition] = deque()

    def taken(self) -> set[Partition]:
        """Partitions that were taken away since the last call. For the loop."""
        return {self._taken.popleft() for _ in range(len(self._taken))}

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        offsets = self._committable(revoked)
        if offsets:
            try:
                await self._consumer.commit_async(with_metadata(offsets))
            except KafkaError as error:
                log.warning("offsets of revoked partitions not committed (%s): their frames are read again", error)
        self._taken.extend(revoked)

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        log.info("assigned partitions: %s", sorted(p.partition for p in assigned) or "none")

    async def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        # Another member has them already, so nothing may be committed.
        self._taken.extend(lost)


def with_metadata(offsets: dict[Partition, int]) -> dict[TopicPartition, OffsetAndMetadata]:
    """Offsets as the client's commits take them."""
    return {TopicPartition(*partition): OffsetAndMetadata(offset, "", -1) for partition, offset in offsets.items()}
