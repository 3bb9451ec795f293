"""Predictions, update events and dead letters to Kafka, acknowledged before anything depends on them."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError, MessageSizeTooLargeError

from schemas.cloud_event import of_kind, of_one
from schemas.config import Kafka
from schemas.errors import FrameError, UnreachableError
from schemas.prediction import PREDICTION_TYPE
from schemas.update import UPDATE_TYPE, SealedEvent
from worker.kafka.client import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    close_producer,
    connection,
    open_client,
    until_reached,
)
from worker.kafka.inside import last_answer
from worker.kafka.send import can_follow, follow
from worker.log import LineLimit, Trouble

log = logging.getLogger("driftkeel.publish")
ACKNOWLEDGE_TIMEOUT_S = 30.0
STOP_PATIENCE_S = 5.0  # once told to stop, a broker that answers nothing for so long is given up
LOOK_S = 0.1
MAX_REQUEST_BYTES = 64 << 20
MAX_BLOCK_MS = 10_000
PATIENT_ROUNDS = (
    5  # before a dead letter is given up, with growing pauses, each with a producer that reached the broker
)
IMPATIENT_ROUNDS, IMPATIENT_S = 2, 300.0  # the rounds after one was given up, for so many seconds


class Message(NamedTuple):
    """A record to send. `expendable`: it is given up if the broker refuses it for good; others are tried for ever."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]
    expendable: bool = False

    @property
    def without_value(self) -> Message:
        """The same without its value, whose size is in a header."""
        headers = [*self.headers, ("driftkeel-value-dropped", str(len(self.value or b"")).encode())]
        return self._replace(value=b"", headers=headers)


class EncodedPrediction(NamedTuple):
    """A `schemas.prediction.Prediction` as bytes, and the contents of its headers; `time` is event time, ISO 8601."""

    frame_id: str
    time: str
    content: bytes
    traceparent: str | None


def open_producer(settings: Kafka, acknowledge_s: float, **more: Any) -> Any:
    """An idempotent producer, which gives up records that are not acknowledged in time. Raises as `open_client`."""
    return open_client(
        KafkaProducer,
        **connection(settings),
        acks="all",
        enable_idempotence=True,
        linger_ms=2,
        max_request_size=MAX_REQUEST_BYTES,
        delivery_timeout_ms=int(acknowledge_s * 1000),
        request_timeout_ms=10_000,
        max_block_ms=MAX_BLOCK_MS,
        **more,
    )


class Publisher:
    """An idempotent producer. `send` returns at once; `settle` waits until everything sent is acknowledged."""

    def __init__(
        self,
        settings: Kafka,
        worker: str,
        stop: threading.Event,
        failed: Callable[[str], object] = lambda operation: None,
        stop_patience_s: float = STOP_PATIENCE_S,
    ) -> None:
        """`failed` is called for each round in which the broker was away or did not take all, to count them."""
        self._settings, self._worker, self._stop, self._failed = settings, worker, stop, failed
        self._stop_patience_s, self._gave_up = stop_patience_s, False
        self._waiting: list[tuple[Message, Any]] = []
        self._prediction_headers = of_kind(PREDICTION_TYPE, f"driftkeel/{worker}")
        self._update_headers = of_kind(UPDATE_TYPE, f"driftkeel/{worker}")
        self._away: KafkaError | None = None
        self._untaken: tuple[float, str] | None = None
        self._impatient_until = 0.0
        self._refused, self._unreached, self._lines = Trouble(log), Trouble(log), LineLimit()
        what = f"the broker at {settings.bootstrap}"
        self._producer = until_reached(self._make, what, settings.connect_timeout_s, stop)

    def _make(self) -> Any:
        compression = None if self._settings.compression == "none" else self._settings.compression
        return open_producer(self._settings, ACKNOWLEDGE_TIMEOUT_S, compression_type=compression, batch_size=64 << 10)

    def send(self, message: Message) -> None:
        """Hand a message to the client."""
        self._waiting.append((message, self._try_send(message)))

    def settle(self, keep_alive: Callable[[], object]) -> None:
        """Wait until all that was sent is acknowledged, however long the broker stays away. `keep_alive` is called
        meanwhile. Raises UnreachableError only once the worker is to stop.

        A dead letter that the broker answers and does not take (no permission, no topic) is given up, with an error in
        the log; the record itself is still in the frames topic. For some minutes further ones are given up sooner.
        """
        since, refusal, pause, rounds = time.monotonic(), "", FIRST_PAUSE_S, 0
        self._sum_up()
        while self._waiting:
            self._untaken = since, refusal
            rounds += 1
            most = PATIENT_ROUNDS if time.monotonic() > self._impatient_until else IMPATIENT_ROUNDS
            failed, given_up, refusal = self._unacknowledged(patient=rounds < most)
            if not failed:
                if not given_up:
                    self._refused.is_over("the broker at %s has acknowledged all records", self._settings.bootstrap)
                break
            self._failed("publish")
            if self._stop.is_set():
                self._gave_up = True
                raise UnreachableError(f"the broker at {self._settings.bootstrap} did not answer: {refusal}")
            text = "%d records not acknowledged by the broker at %s (%s); sending again"
            self._refused.goes_on(refusal, text, len(failed), self._settings.bootstrap, refusal)
            self._untaken = since, refusal
            self._wait(pause, keep_alive)
            pause = min(2 * pause, LONGEST_PAUSE_S)
            self._renew(keep_alive)
            for message in failed:
                self.send(message)
        self._untaken = None

    def untaken(self) -> tuple[float, str]:
        """For how many seconds `settle` has been waiting, and why the last try failed. From any thread."""
        if (untaken := self._untaken) is None:
            return 0.0, ""
        since, refusal = untaken
        return time.monotonic() - since, refusal

    def _unacknowledged(self, patient: bool) -> tuple[list[Message], int, str]:
        """Wait for all answers. Returns what has to be sent again, how many are given up, and why it is sent again."""
        failed: list[Message] = []
        reason, given_up = "", 0
        since = time.monotonic()
        for message, future in self._waiting:
            error = future if isinstance(future, KafkaError) else self._outcome(future, since)
            if error is None:
                continue
            if message.expendable and message.value and isinstance(error, MessageSizeTooLargeError):
                message = message.without_value
            elif message.expendable and not (error.retriable and patient):
                given_up += 1
                if self._lines.one_more("given up"):
                    origin = [text for name, text in message.headers if name.startswith("driftkeel-")]
                    log.error("a dead letter is given up, the broker does not take it (%s); it was %s", error, origin)
                if error.retriable:
                    self._impatient_until = time.monotonic() + IMPATIENT_S
                continue
            failed.append(message)
            reason = f"topic {message.topic}: {' '.join(str(error).split())}"
        self._waiting = []
        return failed, given_up, reason

    def _sum_up(self) -> None:
        """Log how many dead letters were given up without a line of their own."""
        for _, more in self._lines.left_out():
            log.error("%d more dead letters were given up since then, without a line each", more)

    def _outcome(self, future: Any, since: float) -> KafkaError | None:
        """Wait for one answer; the error where there is one. `since`: when the wait for the first answer began.

        All of them together are waited for as long as one, because the client itself gives up on every record in that
        time; except that kafka-python 3.0.12 may lose its producer id with a record that was not answered in time. It
        fetches no other one, and leaves what it still has unanswered for ever.
        """
        until = since + ACKNOWLEDGE_TIMEOUT_S
        while not (future.is_done or time.monotonic() > until or self._gives_up(since)):
            with contextlib.suppress(KafkaError):
                future.get(timeout=LOOK_S)
        if not future.is_done:
            return KafkaTimeoutError("no acknowledgement")
        try:
            future.get()
        except KafkaError as error:
            failure: KafkaError = error
            return failure
        return None

    def _gives_up(self, since: float) -> bool:
        """Whether the worker is to stop and the broker has answered nothing for a while."""
        if not self._stop.is_set():
            return False
        return time.monotonic() - max(since, last_answer(self._producer)) > self._stop_patience_s

    def _renew(self, keep_alive: Callable[[], object]) -> None:
        """Open a new producer. After an error of unknown outcome an idempotent one does not recover."""
        close_producer(self._producer, 0)
        bootstrap, pause = self._settings.bootstrap, FIRST_PAUSE_S
        while True:
            try:
                self._producer = self._make()
                break
            except (KafkaError, OSError) as error:
                self._failed("publish")
                if self._stop.is_set():
                    raise UnreachableError(f"the broker at {bootstrap} did not answer: {error}") from error
                text = "the broker at %s does not answer (%s); trying again"
                self._unreached.goes_on(str(error), text, bootstrap, error)
            self._wait(pause, keep_alive)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        self._away = None
        self._unreached.is_over("the broker at %s answers again", bootstrap)

    def _wait(self, seconds: float, keep_alive: Callable[[], object]) -> None:
        resume = time.monotonic() + seconds
        while time.monotonic() < resume and not self._stop.is_set():
            keep_alive()
            self._stop.wait(min(0.05, seconds))

    def predictions(self, stream: bytes, answers: Iterable[EncodedPrediction]) -> None:
        """Send predictions for frames of one stream."""
        topic, first = self._settings.topics.predictions, None
        for answer in answers:
            about = of_one(answer.frame_id, answer.time)
            if answer.traceparent:
                about.append(("traceparent", answer.traceparent.encode()))
            message = Message(topic, stream, answer.content, self._prediction_headers + about)
            sent = self._try_send(message, first)
            self._waiting.append((message, sent))
            first = first or sent

    def update(self, sealed: SealedEvent) -> None:
        """Send an update event, as sealed for the audit chain."""
        event = sealed.event
        headers = [*self._update_headers, *of_one(event.id, event.time.isoformat())]
        self.send(Message(self._settings.topics.updates, event.stream.encode(), sealed.content, headers))

    def dead_letter(self, record: Any, error: FrameError) -> None:
        """Send the record as it was, with the reason in extra headers."""
        reasons = {
            "driftkeel-error-class": error.kind,
            "driftkeel-error-message": str(error)[:1_000],
            "driftkeel-topic": record.topic,
            "driftkeel-partition": str(record.partition),
            "driftkeel-offset": str(record.offset),
            "driftkeel-worker": self._worker,
        }
        # Kafka allows headers without a value; kafka-python's producer does not.
        headers = [(name, value or b"") for name, value in record.headers]
        headers += [(name, text.encode()) for name, text in reasons.items()]
        # kafka-python sends no record that has neither key nor value.
        value = b"" if record.key is None and not record.value else record.value
        self.send(Message(self._settings.topics.dead_letters, record.key, value, headers, expendable=True))

    def close(self) -> None:
        """Close the producer. The streams' next owner publishes again what is not acknowledged by now."""
        if not close_producer(self._producer, 0 if self._gave_up else 5):
            log.warning("left before the broker at %s had acknowledged everything", self._settings.bootstrap)

    def _try_send(self, message: Message, leader: Any = None) -> Any:
        """The client's future, or the error that it raised. `leader`: the result for a message with the same key and
        topic, behind which this one can be sent at less cost."""
        if self._away is not None:
            return self._away  # Each further try would block as long as the first one did.
        try:
            if can_follow(leader):
                return follow(self._producer, leader, message.key, message.value, message.headers)
            return self._producer.send(message.topic, value=message.value, key=message.key, headers=message.headers)
        except KafkaTimeoutError as error:
            self._away = error
            return error
        except KafkaError as error:
            return error
