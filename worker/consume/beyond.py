"""Partitions that are read from behind the end of their log: it lost its end, or is another one under the same name.

Kafka says so to whoever reads there, and the client begins anew. Others, the embedded broker among them, answer that
there is nothing, as they do at the end: what is in the log would not be read, and nobody would know.
"""

from __future__ import annotations

import time
from collections.abc import Container
from typing import Any

from schemas.config import Kafka
from worker.consume.offsets import Partition
from worker.consume.short_logs import ShortLog, without_end

LOOK_S = 1.0
PATIENCE_S = 5.0  # a new leader may know for a moment of less than was read before


class Beyond:
    """Looks once a second at what the fetches of a `KafkaConsumer` said. For the thread that polls."""

    def __init__(self, settings: Kafka, consumer: Any) -> None:
        self._settings, self._consumer = settings, consumer
        self._since: dict[Partition, float] = {}
        self._looked = time.monotonic()

    def found(self, known: Container[Partition]) -> dict[Partition, ShortLog]:
        """Those that are not `known` to be so, once the broker has been asked, for some seconds. Raises KafkaError."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return {}
        self._looked = now
        beyond = {p: log for p, log in self._seem().items() if p not in known}
        self._since = {p: self._since.get(p, now) for p in beyond}
        due = {p: log for p, log in beyond.items() if now - self._since[p] >= PATIENCE_S}
        for partition in due:
            del self._since[partition]  # Where the broker has that record after all, or does not answer.
        return without_end(self._settings, due)

    def _seem(self) -> dict[Partition, ShortLog]:
        beyond = {}
        for where, state in list(self._consumer._subscription.assignment.items()):
            position, end = state.position, self._consumer.highwater(where)
            if position is not None and end is not None and position.offset > end:
                beyond[where.topic, where.partition] = ShortLog(position.offset, end, position.offset)
        return beyond
