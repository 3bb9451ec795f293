"""Reads predictions and update events from their topics into the console's fleet.

Without a consumer group, so that several consoles may run and nobody else is affected. Reading starts shortly before
the ends of the topics, and skips ahead when it falls far behind: a page shows what is new.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import closing
from typing import Any

from kafka import TopicPartition
from kafka.errors import KafkaError
from pydantic import ValidationError

from monitoring.console.fleet import Fleet
from schemas.config import Kafka
from schemas.errors import ConfigError, UnreachableError
from schemas.prediction import Prediction
from schemas.update import UpdateEvent
from worker.kafka.batches import PassedOver
from worker.kafka.client import LONGEST_PAUSE_S, open_reader

log = logging.getLogger("driftkeel.console")
HISTORY = 2_000  # records of each partition before its end
BEHIND = 20_000  # records of lag, from which on reading skips ahead
PAUSE_S = 0.25  # between polls: pages are updated twice a second, and few large fetches cost less than many small ones
LOOK_ROUND_S = 10.0  # between two checks for new partitions and for lag
MAX_BYTES = 1 << 20  # of one record: workers write none that is larger


class TopicReader(threading.Thread):
    """Reads until `stop` is set, and waits for a broker that goes away."""

    def __init__(self, settings: Kafka, fleet: Fleet, stop: threading.Event) -> None:
        super().__init__(name="console-topics", daemon=True)
        self._settings, self._fleet, self._stop_event = settings, fleet, stop
        self.reached = False
        self._updates = settings.topics.updates
        self._refused, self._passed_over = 0, PassedOver()

    def run(self) -> None:
        while not self._stop_event.is_set():
            try:
                with closing(open_reader(self._settings)) as consumer:
                    self._read(consumer)
            except (KafkaError, OSError, ConfigError, UnreachableError) as error:
                self.reached = False
                log.warning("the topics cannot be read (%s); trying again", " ".join(str(error).split()))
                self._stop_event.wait(LONGEST_PAUSE_S)

    def _read(self, consumer: Any) -> None:
        look_round = 0.0
        while not self._stop_event.is_set():
            if time.monotonic() >= look_round:
                look_round = time.monotonic() + LOOK_ROUND_S
                self._assign(consumer)
            polled = consumer.poll(timeout_ms=200, max_records=5_000)
            for partition, records in polled.items():
                self.take(partition.topic, records)
            self._stop_event.wait(PAUSE_S)

    def _assign(self, consumer: Any) -> None:
        """Assign all existing partitions, and seek in those that are new or too far behind."""
        topics = (self._settings.topics.predictions, self._updates)
        known = {
            TopicPartition(topic, number) for topic in topics for number in consumer.partitions_for_topic(topic) or ()
        }
        if not known:
            raise UnreachableError(f"the broker has no topic {' and no topic '.join(topics)}")
        old = consumer.assignment()
        places = {partition: consumer.position(partition) for partition in known & old}
        if known != old:
            consumer.assign(sorted(known))
        ends = consumer.end_offsets(sorted(known))
        for partition in known:
            place = places.get(partition)
            if place is None or place < ends[partition] - BEHIND:
                begin = consumer.beginning_offsets([partition])[partition]
                consumer.seek(partition, max(begin, ends[partition] - HISTORY))
            elif known != old:
                consumer.seek(partition, place)
        self.reached = True

    def take(self, topic: str, records: list[Any]) -> None:
        """Take records of one topic, oldest first. Only the newest prediction of each stream is parsed."""
        records = list(self._passed_over.readable(records))
        if topic == self._updates:
            for record in records:
                event = self._parsed(UpdateEvent, record.value)
                if event is not None:
                    self._fleet.take_update(event)
            return
        newest: dict[bytes, tuple[Any, int]] = {}
        for record in records:
            if record.key:
                newest[record.key] = (record, newest.get(record.key, (None, 0))[1] + 1)
        for record, count in newest.values():
            prediction = self._parsed(Prediction, record.value)
            if prediction is not None:
                self._fleet.take_prediction(prediction, count)

    def _parsed(self, kind: Any, content: bytes | None) -> Any:
        try:
            if content is None or len(content) > MAX_BYTES:
                raise ValueError("empty, or too large")
            return kind.model_validate_json(content)
        except (ValidationError, ValueError) as error:
            self._refused += 1
            if self._refused & (self._refused - 1) == 0:  # the first, second, fourth, ...: few lines for many records
                log.warning("%d records are no %s of this version: %s", self._refused, kind.__name__, str(error)[:200])
            return None
