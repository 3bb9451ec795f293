"""Partitions whose next offset lies beyond the end of their log, which lost its end or is another one of the same name.

Kafka refuses such a fetch, and the client begins anew. Other brokers, such as the embedded one, answer that there is
nothing, as they do at the end of a log. What is in the log would not be read, and nobody would notice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Container
from typing import Any

from kafka import TopicPartition
from kafka.errors import KafkaError

from monitoring.metrics import WorkerMetrics
from schemas.config import Kafka
from worker.consume.offsets import Partition
from worker.consume.short_logs import ShortLog, without_end
from worker.kafka.inside import assigned

log = logging.getLogger("driftkeel.consume")
LOOK_S = 1.0
PATIENCE_S = 5.0  # a new leader may know of less than was read before, for a moment


class Beyond:
    """Looks once a second at what a consumer's fetches said. For the thread that polls."""

    def __init__(self, settings: Kafka, consumer: Any, metrics: WorkerMetrics) -> None:
        self._settings, self._consumer, self._metrics = settings, consumer, metrics
        self._since: dict[Partition, float] = {}
        self._looked = time.monotonic()

    def begin_anew(self, known: Container[Partition]) -> set[Partition]:
        """Have partitions that are beyond their end read anew, as the client does by itself where the broker refuses
        the fetch; except those that are `known` to be. Returns them."""
        try:
            beyond = self._found(known)
        except (KafkaError, OSError) as error:
            self._metrics.broker_error("poll")
            log.warning("the broker at %s does not say where its logs end (%s)", self._settings.bootstrap, error)
            return set()
        for (topic, number), short in beyond.items():
            log.warning("partition %d ends at %d, and was read up to %d before", number, short.end, short.reach)
            where = TopicPartition(topic, number)
            if self._settings.offset_reset == "earliest":
                self._consumer.seek_to_beginning(where)
            else:
                self._consumer.seek_to_end(where)
        return set(beyond)

    def _found(self, known: Container[Partition]) -> dict[Partition, ShortLog]:
        """Partitions that have been beyond their end for some seconds, and of which the broker confirms it when asked.
        Raises KafkaError."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return {}
        self._looked = now
        beyond = {p: short for p, short in self._seem().items() if p not in known}
        self._since = {p: self._since.get(p, now) for p in beyond}
        due = {p: short for p, short in beyond.items() if now - self._since[p] >= PATIENCE_S}
        for partition in due:
            del self._since[
                partition
            ]  # Begin to wait again if the broker has the record after all, or does not answer.
        return without_end(self._settings, due)

    def _seem(self) -> dict[Partition, ShortLog]:
        beyond: dict[Partition, ShortLog] = {}
        for where, state in assigned(self._consumer).items():
            position, end = state.position, state.highwater
            if position is not None and end is not None and position.offset > end:
                beyond[where] = ShortLog(position.offset, end, position.offset)
        return beyond
