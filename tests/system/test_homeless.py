"""Streams under whose key in the store lies something else: answered, not stored, and nobody else is held up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from meta.bundle import load_bundle
from schemas.command import Command
from schemas.config import Kafka, WorkerConfig
from schemas.prediction import Prediction
from schemas.state import decode_header, encode_header
from schemas.update import UpdateEvent
from tests.conftest import Topic, picture
from tests.system.conftest import MakeWorker, metric, partition_of, running, turn_until
from worker.control.operate import Operator
from worker.control.retire import delete
from worker.control.send import put_command
from worker.engine.engine import Engine
from worker.run import Worker
from worker.site.doctor import examine
from worker.store.store import StateStore

FRAMES = 12


@pytest.fixture
def worker(config: WorkerConfig, make_worker: MakeWorker) -> Worker:
    return make_worker(config)


def send(topic: Topic, kafka: Kafka, worker: Worker, *streams: str) -> None:
    """Frames of each, and turns until they are all finished."""
    records = [(stream.encode(), picture(i), []) for i in range(FRAMES) for stream in streams]
    before = metric(worker, "predictions_total")
    topic.send(kafka.topics.frames, records)
    turn_until(worker, lambda: metric(worker, "predictions_total") >= before + len(records))
    turn_until(worker, lambda: set(worker._consumer.lag().values()) == {0})


def answers(topic: Topic, kafka: Kafka, count: int) -> dict[str, list[Prediction]]:
    found: dict[str, list[Prediction]] = {}
    for record in topic.read(kafka.topics.predictions, lambda rs: len(rs) >= count):
        prediction = Prediction.model_validate_json(record.value)
        found.setdefault(prediction.stream, []).append(prediction)
    return found


def events(topic: Topic, kafka: Kafka, folded: str) -> list[UpdateEvent]:
    """Of all streams, once there are those of all frames of `folded`."""

    def parse(records: list[Any]) -> list[UpdateEvent]:
        return [UpdateEvent.model_validate_json(record.value) for record in records]

    def complete(records: list[Any]) -> bool:
        return sum(len(event.frames) for event in parse(records) if event.stream == folded) == FRAMES

    return parse(topic.read(kafka.topics.updates, complete))


@pytest.mark.parametrize(
    ("part", "put"),
    [
        ("", lambda client, key: client.rpush(key, "theirs")),
        ("", lambda client, key: client.hset(key, "name", "theirs")),
        ("", lambda client, key: client.hset(key, "token", 10**20)),
        (":tensors", lambda client, key: client.sadd(key, "theirs")),
        (":snapshots", lambda client, key: client.set(key, "theirs")),
        (":deleted", lambda client, key: client.hset(key, "name", "theirs")),
    ],
)
def test_source_answers_until_the_key_is_free(
    part: str,
    put: Callable[..., object],
    worker: Worker,
    client: Any,
    kafka_settings: Kafka,
    store: StateStore,
    topic: Topic,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    key = store.keys("odd")[0] + part
    put(client, key)
    theirs = client.dump(key)
    send(topic, kafka_settings, worker, "odd", "good")
    found = answers(topic, kafka_settings, 2 * FRAMES)
    assert {p.parameters for p in found["odd"]} == {"source"}
    assert found["good"][-1].step > 0
    assert len({p.id for p in found["odd"]}) == FRAMES
    assert client.dump(key) == theirs
    assert sum(client.exists(k) for k in store._all_keys("odd")) == 1
    (line,) = {r.getMessage() for r in caplog.records if r.levelname == "ERROR"}
    assert line.startswith(f"stream odd is answered by source, and nothing of it is kept: key {key} in the store is a ")
    assert line.endswith("which no worker wrote; rename or delete it")
    assert metric(worker, "homeless_streams") == 1

    put_command(kafka_settings, Command(stream="odd", action="freeze"))
    turn_until(worker, lambda: worker._control._commands.next_offset(f"{kafka_settings.topics.commands}/0") == 1)
    worker._turn()
    assert {event.stream for event in events(topic, kafka_settings, "good")} == {"good"}
    worker._consumer.commit(now=True)  # What is not committed yet would be read again.
    client.delete(key)
    monkeypatch.setattr("worker.streams.streams.LOOK_AGAIN_S", 0.0)
    turn_until(worker, lambda: not metric(worker, "homeless_streams"))
    send(topic, kafka_settings, worker, "odd")
    seen = [event for event in events(topic, kafka_settings, "odd") if event.stream == "odd"]
    assert (seen[0].decision, seen[0].number) == ("frozen", 1)  # it had waited


def test_a_key_that_is_taken_while_its_stream_runs(
    worker: Worker, client: Any, kafka_settings: Kafka, store: StateStore, topic: Topic
) -> None:
    send(topic, kafka_settings, worker, "odd", "good")
    key = store.keys("odd")[0]
    client.delete(key)
    client.sadd(key, "theirs")
    send(topic, kafka_settings, worker, "odd", "good")
    assert client.smembers(key) == {b"theirs"}
    assert metric(worker, "homeless_streams") == 1
    assert answers(topic, kafka_settings, 4 * FRAMES)["odd"][-1].parameters == "source"


def test_a_position_beyond_the_end_of_a_log_is_its_stream_s_alone(
    config: WorkerConfig,
    client: Any,
    kafka_settings: Kafka,
    store: StateStore,
    topic: Topic,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The whole partition was refused, with every camera in it."""
    # Of one partition.
    names = [name for name in (f"cam-{i}" for i in range(50)) if partition_of(name) == 0][:4]
    odd, *others = names
    key, log = store.keys(odd)[0], f"{kafka_settings.topics.frames}/0"
    with running(config) as first:
        send(topic, kafka_settings, first, *names)
        first._consumer.commit(now=True)
    before = decode_header(client.hget(key, "header"))
    client.hset(key, "header", encode_header(before.model_copy(update={"positions": {log: 10**12}})))
    with running(config) as worker:
        send(topic, kafka_settings, worker, *names)
        assert (metric(worker, "refused_partitions"), metric(worker, "homeless_streams")) == (0, 1)
        assert not worker.unready()
        found = answers(topic, kafka_settings, 8 * FRAMES)
        assert {p.parameters for p in found[odd][-FRAMES:]} == {"source"}
        assert [decode_header(client.hget(store.keys(s)[0], "header")).frames for s in others] == [2 * FRAMES] * 3
        (line,) = {r.getMessage() for r in caplog.records if r.levelname == "ERROR"}
        assert line.startswith(
            f"stream {odd} is answered by source, and nothing of it is kept: its position in {log} is "
        )
        assert f"'driftkeel streams delete -- {odd}' " in line

        (finding,) = [one for one in examine(config) if one.subject == "positions"]
        assert finding.level == "failed"
        assert f"'driftkeel streams delete -- {odd}' " in finding.text

        # As the line says. The parameters come back with `import`; what is read from now on is folded.
        operator = Operator(config, store, Engine(load_bundle(config.bundle.path)), "operator")
        kept = operator.export(odd)
        delete(store, odd, "its position is wrong", "operator")
        operator.import_file(odd, kept, "its own")
        monkeypatch.setattr("worker.streams.streams.LOOK_AGAIN_S", 0.0)
        worker._consumer.commit(now=True)
        turn_until(worker, lambda: not metric(worker, "homeless_streams"))
        send(topic, kafka_settings, worker, *names)
        header = worker._streams.engine.resident(odd).header
        assert (header.frames, header.step > before.step) == (FRAMES, True)
        assert header.positions[log] < 10**6


def test_a_mark_that_is_nonsense_is_cured_by_hand(
    config: WorkerConfig, client: Any, kafka_settings: Kafka, store: StateStore, topic: Topic
) -> None:
    """As the runbook says."""
    (stream, *_) = [name for name in (f"cam-{i}" for i in range(50)) if partition_of(name) == 0]
    with running(config) as first:
        send(topic, kafka_settings, first, stream)
        first._consumer.commit(now=True)
    mark = store._mark_key(kafka_settings.group, (kafka_settings.topics.frames, 0))
    client.set(mark, 10**12)
    with running(config) as worker:
        topic.send(kafka_settings.topics.frames, [(stream.encode(), picture(0), [])])
        turn_until(worker, lambda: metric(worker, "refused_partitions") == 1)
    client.delete(mark)
    with running(config) as worker:
        send(topic, kafka_settings, worker, stream)
        assert worker._streams.engine.resident(stream).header.frames == 2 * FRAMES + 1
        assert (metric(worker, "refused_partitions"), metric(worker, "homeless_streams")) == (0, 0)


def test_a_mark_that_is_none_is_written_anew(
    config: WorkerConfig, client: Any, kafka_settings: Kafka, store: StateStore, topic: Topic
) -> None:
    group = kafka_settings.group
    partitions = [(kafka_settings.topics.frames, number) for number in range(3)]
    client.set(store._mark_key(group, partitions[0]), "theirs")
    client.rpush(store._mark_key(group, partitions[1]), "theirs")
    client.set(store._mark_key(group, partitions[2]), "7")
    assert store.marks(group, partitions) == {partitions[2]: 7}
    store.mark(group, dict.fromkeys(partitions, 9))
    assert store.marks(group, partitions) == dict.fromkeys(partitions, 9)
