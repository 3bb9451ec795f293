"""Predictions, update events and dead letters to Kafka, acknowledged before anything depends on them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError, MessageSizeTooLargeError

from schemas.config import Kafka
from schemas.errors import FrameError, UnreachableError
from schemas.prediction import PREDICTION_TYPE, Prediction
from schemas.update import UPDATE_TYPE, UpdateEvent
from worker.kafka_client import connection, until_reached

log = logging.getLogger("driftkeel.publish")
ACKNOWLEDGE_TIMEOUT_S = 30.0
MAX_REQUEST_BYTES = 64 << 20


@dataclass(frozen=True)
class Message:
    """A record to send."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]


class Publisher:
    """An idempotent producer. `send` returns at once; `settle` waits until everything sent is acknowledged."""

    def __init__(self, settings: Kafka, worker: str, stop: threading.Event) -> None:
        self._settings, self._worker, self._stop = settings, worker, stop
        self._waiting: list[tuple[Message, Any]] = []
        self._producer = self._connect()

    def _connect(self) -> Any:
        what = f"the broker at {self._settings.bootstrap}"
        return until_reached(self._make, what, self._settings.connect_timeout_s, self._stop)

    def _reconnect(self, keep_alive: Callable[[], object]) -> Any:
        """A new producer, however long the broker stays away; UnreachableError only once the worker is to stop."""
        while True:
            try:
                return self._connect()
            except UnreachableError:
                if self._stop.is_set():
                    raise
                keep_alive()

    def _make(self) -> Any:
        return KafkaProducer(
            **connection(self._settings),
            acks="all",
            enable_idempotence=True,
            linger_ms=2,
            batch_size=64 << 10,
            max_request_size=MAX_REQUEST_BYTES,
            delivery_timeout_ms=int(ACKNOWLEDGE_TIMEOUT_S * 1000),
            request_timeout_ms=10_000,
            max_block_ms=10_000,
            allow_auto_create_topics=False,
        )

    def send(self, message: Message) -> None:
        """Hand a message to the client."""
        self._waiting.append((message, self._try_send(message)))

    def settle(self, keep_alive: Callable[[], object]) -> None:
        """Return when the broker has acknowledged everything sent so far; send again what it has not.

        `keep_alive` is called between tries. Raises UnreachableError only once the worker is to stop.
        """
        while self._waiting:
            failed: list[Message] = []
            reason: Exception | None = None
            for message, future in self._waiting:
                error = future if isinstance(future, Exception) else _outcome(future)
                if error is not None:
                    failed.append(message)
                    reason = error
            self._waiting = []
            if reason is None:
                return
            if self._stop.is_set():
                raise UnreachableError(f"the broker at {self._settings.bootstrap} did not answer: {reason}")
            log.warning(
                "%d records not acknowledged by the broker at %s (%s); sending again",
                len(failed),
                self._settings.bootstrap,
                reason,
            )
            # Indefinite errors leave an idempotent producer in a state of its own: begin with a new one.
            self._producer.close(timeout=0)
            self._producer = self._reconnect(keep_alive)
            for message in failed:
                self.send(message)

    def prediction(self, prediction: Prediction, traceparent: str | None) -> None:
        self.send(
            Message(
                self._settings.topics.predictions,
                prediction.stream.encode(),
                prediction.model_dump_json().encode(),
                self._event_headers(PREDICTION_TYPE, prediction.id, prediction.event_time, traceparent),
            )
        )

    def update(self, event: UpdateEvent) -> None:
        self.update_bytes(event.stream, event.id, event.time, event.model_dump_json().encode())

    def update_bytes(self, stream: str, event_id: str, time: datetime, content: bytes) -> None:
        headers = self._event_headers(UPDATE_TYPE, event_id, time, None)
        self.send(Message(self._settings.topics.updates, stream.encode(), content, headers))

    def dead_letter(self, record: Any, error: FrameError) -> None:
        """The record as it was, with the reason in extra headers."""
        reasons = {
            "driftkeel-error-class": error.kind,
            "driftkeel-error-message": str(error)[:1_000],
            "driftkeel-topic": record.topic,
            "driftkeel-partition": str(record.partition),
            "driftkeel-offset": str(record.offset),
            "driftkeel-worker": self._worker,
        }
        # Kafka allows a header without a value; the client's sender does not.
        headers = [(name, value or b"") for name, value in record.headers]
        headers += [(name, text.encode()) for name, text in reasons.items()]
        self.send(Message(self._settings.topics.dead_letters, record.key, record.value, headers))

    def close(self) -> None:
        self._producer.close(timeout=5)

    def _try_send(self, message: Message) -> Any:
        try:
            return self._producer.send(message.topic, value=message.value, key=message.key, headers=message.headers)
        except MessageSizeTooLargeError:
            # Only a dead letter can be so large. Its reason and origin are worth more than its bytes.
            headers = [*message.headers, ("driftkeel-value-dropped", str(len(message.value or b"")).encode())]
            return self._producer.send(message.topic, value=b"", key=message.key, headers=headers)
        except KafkaError as error:
            return error

    def _event_headers(
        self, kind: str, event_id: str, time: datetime, traceparent: str | None
    ) -> list[tuple[str, bytes]]:
        """CloudEvents 1.0, Kafka binding, binary mode."""
        headers = [
            ("ce_specversion", b"1.0"),
            ("ce_type", kind.encode()),
            ("ce_source", f"driftkeel/{self._worker}".encode()),
            ("ce_id", event_id.encode()),
            ("ce_time", time.isoformat().encode()),
            ("content-type", b"application/json"),
        ]
        if traceparent:
            headers.append(("traceparent", traceparent.encode()))
        return headers


def _outcome(future: Any) -> KafkaError | None:
    try:
        future.get(timeout=ACKNOWLEDGE_TIMEOUT_S)
    except KafkaError as error:
        failure: KafkaError = error
        return failure
    return None
