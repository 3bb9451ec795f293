"""The publisher against the real broker: what is sent arrives, and what cannot arrive blocks nothing."""

import logging
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kafka.errors import KafkaTimeoutError, TopicAuthorizationFailedError
from kafka.producer.future import FutureRecordMetadata

from schemas.config import Kafka
from schemas.errors import FrameError, UnreachableError
from schemas.prediction import PREDICTION_TYPE
from schemas.update import UpdateEvent, seal
from tests.broker.process import start_own_broker
from tests.chaos.proxy import FlakyProxy
from tests.conftest import Topic
from tests.servers import wait_until
from worker.control import retire
from worker.embedded import free_port, start_broker
from worker.kafka.client import create_topics
from worker.log import LINES
from worker.publish import publisher as publish
from worker.publish.publisher import EncodedPrediction, Message, Publisher


@pytest.fixture
def stop() -> threading.Event:
    return threading.Event()


@pytest.fixture
def make(kafka_settings: Kafka, stop: threading.Event) -> Iterator[Callable[..., Publisher]]:
    made: list[Publisher] = []

    def build(**topics: str) -> Publisher:
        changed = kafka_settings.topics.model_copy(update=topics)
        made.append(Publisher(kafka_settings.model_copy(update={"topics": changed}), "w", stop))
        return made[-1]

    yield build
    for publisher in made:
        publisher.close()


def record(key: bytes | None, value: bytes | None) -> Any:
    return SimpleNamespace(topic="frames", partition=3, offset=7, key=key, value=value, headers=[("a", None)])


def nothing() -> None:
    """Nobody needs to be kept alive."""


class Forbidding:
    """A producer without permission for one topic: the embedded broker knows no permissions."""

    def __init__(self, producer: Any, topic: str = "forbidden") -> None:
        self._producer, self._topic = producer, topic

    def send(self, topic: str, **record: Any) -> Any:
        if topic == self._topic:
            raise TopicAuthorizationFailedError(topic)
        return self._producer.send(topic, **record)

    def close(self, timeout: float) -> None:
        self._producer.close(timeout=timeout)


TRACE = (None, f"00-{1:032x}-{1:016x}-01")
BAD = FrameError("empty", "nothing in it")


def test_predictions_follow_their_first_into_its_partition(
    make: Callable[..., Publisher], kafka_settings: Kafka, topic: Topic
) -> None:
    where = kafka_settings.topics.frames  # the one that has several partitions
    publisher = make(predictions=where)
    sent = {}
    for stream in (f"cam-{i}" for i in range(6)):
        answers = [
            EncodedPrediction(f"frames/0/{stream}-{i}", f"2026-01-0{i + 1}", b"%d" % i, TRACE[i % 2]) for i in range(4)
        ]
        publisher.predictions(stream.encode(), answers)
        sent |= {(stream.encode(), answer.content): answer for answer in answers}
        publisher.send(Message(where, stream.encode(), b"checked", []))  # as the client itself places it
    publisher.settle(nothing)
    found = topic.read(where, lambda rs: len(rs) == 30)
    places: dict[bytes, set[int]] = {}
    for one in found:
        places.setdefault(one.key, set()).add(one.partition)
        if one.value != b"checked":
            answer, headers = sent.pop((one.key, one.value)), dict(one.headers)
            assert headers["ce_id"] == answer.frame_id.encode()
            assert headers["ce_time"] == answer.time.encode()
            assert headers.get("traceparent", b"") == (answer.traceparent or "").encode()
            assert headers["ce_type"] == PREDICTION_TYPE.encode()
    assert not sent
    assert len(places) == 6
    assert all(len(partitions) == 1 for partitions in places.values())
    for stream in places:  # in order
        assert [r.value for r in found if r.key == stream] == [b"0", b"1", b"2", b"3", b"checked"]


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd", "gzip", "snappy"])
def test_what_is_sent_is_compressed(compression: str, tmp_path: Path, stop: threading.Event) -> None:
    broker = start_own_broker(tmp_path)
    settings = Kafka(bootstrap=broker.bootstrap, compression=compression)
    create_topics(settings, 1)
    publisher = Publisher(settings, "w", stop)
    word, topic = b"as it was sent " * 100, settings.topics.predictions
    for _ in range(10):
        publisher.send(Message(topic, b"cam", word, []))
    publisher.settle(nothing)
    publisher.close()
    arrived = Topic(broker.bootstrap).read(topic, lambda records: len(records) == 10)
    broker.child.stop(0)
    assert {record.value for record in arrived} == {word}
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert (word in kept) == (compression == "none")


def test_predictions_that_cannot_be_sent_wait_like_all_records(
    make: Callable[..., Publisher], kafka_settings: Kafka, topic: Topic
) -> None:
    publisher = make()
    publisher._away = KafkaTimeoutError("the broker is away")
    publisher.predictions(b"cam", [EncodedPrediction("frames/0/1", "2026-01-01", b"1", None)] * 2)
    publisher.settle(nothing)
    found = topic.read(kafka_settings.topics.predictions, lambda rs: len(rs) == 2)
    assert [r.value for r in found] == [b"1", b"1"]


def test_all_that_the_client_leaves_unanswered_is_waited_for_as_long_as_one(
    make: Callable[..., Publisher], kafka_settings: Kafka, topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, looks = make(), list[float]()
    publisher.predictions(b"cam", [EncodedPrediction("frames/0/0", "2026-01-01", b"first", None)])
    publisher.settle(nothing)
    # As the client itself does after an outage, with a record whose time was over before its answer came.
    publisher._producer._transaction_manager.reset_producer_id()
    publisher.predictions(b"cam", [EncodedPrediction("frames/0/1", "2026-01-01", b"%d" % i, None) for i in range(40)])
    look, patience = FutureRecordMetadata.get, publish.ACKNOWLEDGE_TIMEOUT_S
    monkeypatch.setattr(FutureRecordMetadata, "get", lambda self, timeout: looks.append(timeout) or look(self, timeout))
    monkeypatch.setattr(publish, "ACKNOWLEDGE_TIMEOUT_S", 1.0)

    def before_the_next_producer() -> None:
        monkeypatch.undo()
        assert patience == publish.ACKNOWLEDGE_TIMEOUT_S

    publisher.settle(before_the_next_producer)
    found = topic.read(kafka_settings.topics.predictions, lambda rs: len(rs) == 41)
    assert [r.value for r in found] == [b"first", *(b"%d" % i for i in range(40))]
    assert sum(looks) <= 1.0 + publish.LOOK_S


def test_a_record_without_key_and_value_is_a_dead_letter_too(
    make: Callable[..., Publisher], kafka_settings: Kafka, topic: Topic
) -> None:
    publisher = make()
    publisher.dead_letter(record(None, None), BAD)
    publisher.settle(nothing)
    (letter,) = topic.read(kafka_settings.topics.dead_letters, lambda rs: len(rs) == 1)
    assert (letter.key, letter.value or b"") == (None, b"")
    assert dict(letter.headers)["driftkeel-offset"] == b"7"


def test_too_large_a_dead_letter_keeps_its_reason(
    make: Callable[..., Publisher], kafka_settings: Kafka, topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "MAX_REQUEST_BYTES", 10_000)
    publisher = make()
    publisher.dead_letter(record(b"cam", b"x" * 20_000), BAD)
    publisher.settle(nothing)
    (letter,) = topic.read(kafka_settings.topics.dead_letters, lambda rs: len(rs) == 1)
    headers = dict(letter.headers)
    assert (letter.key, letter.value or b"") == (b"cam", b"")
    assert (headers["driftkeel-error-class"], headers["driftkeel-value-dropped"]) == (b"empty", b"20000")


def test_a_dead_letter_that_cannot_arrive_is_given_up_and_the_rest_goes_on(
    make: Callable[..., Publisher],
    kafka_settings: Kafka,
    topic: Topic,
    caplog: pytest.LogCaptureFixture,
) -> None:
    publisher = make(dead_letters="forbidden")
    publisher._producer = Forbidding(publisher._producer)
    publisher.send(Message(kafka_settings.topics.updates, b"cam", b"before", []))
    publisher.dead_letter(record(b"cam", b"x"), BAD)
    publisher.send(Message(kafka_settings.topics.updates, b"cam", b"after", []))
    with caplog.at_level(logging.ERROR, "driftkeel.publish"):
        publisher.settle(nothing)
    assert "given up" in caplog.text
    assert "b'7'" in caplog.text
    values = {r.value for r in topic.read(kafka_settings.topics.updates, lambda rs: len({r.value for r in rs}) == 2)}
    assert values == {b"before", b"after"}


def test_a_topic_that_refuses_for_long_does_not_fill_the_log(
    make: Callable[..., Publisher],
    kafka_settings: Kafka,
    topic: Topic,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, "driftkeel.publish")
    publisher, rounds, make_one = make(), list[str](), Publisher._make
    predictions = kafka_settings.topics.predictions

    def again(self: Publisher) -> Any:
        return make_one(self) if len(rounds) == 20 else Forbidding(make_one(self), predictions)

    monkeypatch.setattr(Publisher, "_make", again)
    monkeypatch.setattr(publisher, "_failed", rounds.append)
    monkeypatch.setattr(publisher, "_wait", lambda seconds, keep_alive: None)
    publisher._producer = Forbidding(publisher._producer, predictions)
    publisher.send(Message(predictions, b"cam", b"at last", []))
    publisher.settle(nothing)
    assert [one.value for one in topic.read(predictions, lambda rs: len(rs) == 1)] == [b"at last"]
    what = f"acknowledged by the broker at {kafka_settings.bootstrap}"
    said = [record.getMessage() for record in caplog.records if record.name == "driftkeel.publish"]
    assert len(rounds) == 20
    assert [line.split(" (")[0] for line in said] == [
        f"1 records not {what}",
        f"the broker at {kafka_settings.bootstrap} has acknowledged all records",
    ]


def test_dead_letters_that_are_given_up_do_not_fill_the_log(
    make: Callable[..., Publisher], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = make(dead_letters="forbidden")
    publisher._producer = Forbidding(publisher._producer)
    for _ in range(500):
        publisher.dead_letter(record(b"cam", b"x"), BAD)
    publisher.settle(nothing)
    assert caplog.text.count("a dead letter is given up") == LINES
    monkeypatch.setattr("worker.log.LINES_S", 0.0)
    publisher.settle(nothing)
    assert f"{500 - LINES} more dead letters were given up since then" in caplog.text


def test_after_a_dead_letter_was_given_up_the_next_are_sooner(
    make: Callable[..., Publisher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where their topic is gone each round takes the client ten seconds."""
    monkeypatch.setattr(publish, "MAX_BLOCK_MS", 50)
    publisher, rounds = make(dead_letters="no-such-topic"), []
    monkeypatch.setattr(publisher, "_failed", rounds.append)
    monkeypatch.setattr(publisher, "_wait", lambda seconds, keep_alive: None)
    taken = []
    for _ in range(2):
        publisher.dead_letter(record(b"cam", b"x"), BAD)
        publisher.settle(nothing)
        taken.append(len(rounds))
    assert taken == [publish.PATIENT_ROUNDS - 1, publish.PATIENT_ROUNDS - 1 + publish.IMPATIENT_ROUNDS - 1]


def test_an_outage_is_waited_out_with_the_membership_kept(
    stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """And is heard of all the while: each try that fails counts; the log has its beginning and its end."""
    threads = threading.active_count()
    port = free_port()
    broker = start_broker(port=free_port(), advertised=port)
    proxy = FlakyProxy(broker.port, port)
    settings = Kafka(bootstrap=f"127.0.0.1:{port}", connect_timeout_s=60)
    create_topics(settings, 1)
    errors: list[str] = []
    publisher = Publisher(settings, "w", stop, errors.append)
    publisher.send(Message("updates", b"cam", b"1", []))
    publisher.settle(nothing)
    proxy.down(True)
    came_back = threading.Event()

    def keep_alive() -> None:
        if errors.count("publish") == 3 and not came_back.is_set():
            came_back.set()
            proxy.down(False)

    publisher._away = KafkaTimeoutError("as after a send that waited in vain")
    for i in range(2, 40):
        publisher.send(Message("updates", b"cam", str(i).encode(), []))
    with caplog.at_level(logging.INFO, "driftkeel.publish"):
        publisher.settle(keep_alive)
    said = [r.getMessage() for r in caplog.records if r.name == "driftkeel.publish"]
    what = f"the broker at {settings.bootstrap}"
    assert errors == ["publish"] * 3
    assert said[0].startswith(f"38 records not acknowledged by {what} (")
    reasons = [text.removeprefix(f"{what} does not answer (") for text in said[1:-2]]
    assert reasons  # One line for both tries, unless they have failed for different reasons.
    assert len(set(reasons)) == len(reasons)
    assert said[-2:] == [f"{what} answers again", f"{what} has acknowledged all records"]
    found = Topic(f"127.0.0.1:{broker.port}").read("updates", lambda rs: len({r.value for r in rs}) >= 39)
    assert {r.value for r in found} == {str(i).encode() for i in range(1, 40)}
    proxy.down(True)
    publisher._away = KafkaTimeoutError("again")
    publisher.send(Message("updates", b"cam", b"never", []))
    stop.set()
    with pytest.raises(UnreachableError, match="did not answer"):
        publisher.settle(nothing)
    publisher.close()
    proxy.close()
    broker.child.stop(0)
    wait_until(lambda: threading.active_count() <= threads, "the end of all threads")


def test_the_event_of_a_deletion_that_the_broker_refuses_ends_the_command(
    kafka_settings: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator may give it again; it must not try for ever."""
    deleted = UpdateEvent(
        id="cam@1",
        stream="cam",
        time=datetime.now(UTC),
        decision="deleted",
        reason="",
        frames=[],
        step=0,
        token=1,
        bundle="b",
        worker="operator",
    )
    make = Publisher._make
    monkeypatch.setattr(Publisher, "_make", lambda self: Forbidding(make(self)))
    topics = kafka_settings.topics.model_copy(update={"updates": "forbidden"})
    forbidden = kafka_settings.model_copy(update={"topics": topics})
    failed: list[UnreachableError] = []

    def attempt() -> None:
        try:
            retire.publish(forbidden, "operator", [seal(deleted)])
        except UnreachableError as error:
            failed.append(error)

    command = threading.Thread(target=attempt, daemon=True)
    command.start()
    command.join(120)
    assert not command.is_alive()
    assert "stream 'cam' is deleted, 'driftkeel streams delete -- cam' sends its last event" in str(failed[0])
