"""Where partitions end while nothing is fetched from them. Otherwise the answers to fetches tell it."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from kafka import TopicPartition
from kafka.errors import KafkaError

from worker.kafka.inside import last_answer

ASK_S = 5.0
PATIENCE_MS = 300  # the loop waits meanwhile
SILENT_S = 2 * ASK_S  # a broker that has not answered for so long is not asked


class Ends:
    """Asks the broker, and keeps its last answer. Empty at first, and after `forget`. For the thread that polls."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._asked_at = time.monotonic()
        self._found: dict[TopicPartition, int] = {}

    def forget(self) -> None:
        """Records are fetched again."""
        self._found = {}
        self._asked_at = time.monotonic()

    def now(self) -> dict[TopicPartition, int]:
        """The ends of the assigned partitions, at most some seconds old if the broker answers."""
        moment = time.monotonic()
        if moment - self._asked_at > ASK_S and moment - last_answer(self._consumer) < SILENT_S:
            # Without an answer, what is known stays. Others report that the broker does not answer.
            with contextlib.suppress(KafkaError):
                self._found = self._consumer.end_offsets(self._consumer.assignment(), timeout_ms=PATIENCE_MS)
            self._asked_at = time.monotonic()
        return self._found
