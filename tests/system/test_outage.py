"""Broker or store away, with a worker in this process: it says so, and shows what it can."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest
import redis
from kafka import TopicPartition
from pydantic import SecretStr

from schemas.config import Adapt, Batch, Bundle, Kafka, Metrics, Store, WorkerConfig
from schemas.errors import UnreachableError
from schemas.state import decode_header
from tests.chaos.proxy import FlakyProxy, flaky_broker
from tests.conftest import Topic, picture
from tests.servers import wait_until
from tests.system.conftest import MakeWorker, metric, turn_until
from worker.embedded import free_port
from worker.kafka.client import create_topics
from worker.publish.publisher import Message
from worker.run import Worker

SILENT_S = 1.0  # in these tests


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of an outage count as minutes do; but an acknowledgement is waited for longer than any test takes."""
    monkeypatch.setattr("worker.publish.publisher.ACKNOWLEDGE_TIMEOUT_S", 600.0)
    monkeypatch.setattr("worker.reach.SILENT_S", SILENT_S)
    monkeypatch.setattr("worker.reach.LOOK_S", 0.05)
    monkeypatch.setattr("worker.consume.ends.ASK_S", 0.1)
    monkeypatch.setattr("worker.run.LAG_INTERVAL_S", 0.1)


@pytest.fixture
def broker() -> Iterator[FlakyProxy]:
    with flaky_broker() as proxy:
        yield proxy


@pytest.fixture
def store_proxy(store_url: str) -> Iterator[FlakyProxy]:
    proxy = FlakyProxy(int(store_url.rsplit(":", 1)[1].split("/")[0]), free_port())
    yield proxy
    proxy.close()


@pytest.fixture
def config(broker: FlakyProxy, store_proxy: FlakyProxy, store_settings: Store, tiny_bundle_path: Path) -> WorkerConfig:
    kafka = Kafka(
        bootstrap=f"127.0.0.1:{broker.port}",
        session_timeout_ms=10_000,
        heartbeat_interval_ms=200,
        fetch_max_wait_ms=20,
        connect_timeout_s=60,
    )
    create_topics(kafka, 1)
    url = SecretStr(f"redis://127.0.0.1:{store_proxy.port}/0")
    return WorkerConfig(
        threads=1,
        kafka=kafka,
        store=store_settings.model_copy(update={"url": url}),
        bundle=Bundle(path=tiny_bundle_path),
        batch=Batch(max_batch=4, max_wait_ms=10, min_adapt=1),
        adapt=Adapt(),
        metrics=Metrics(port=0),
    )


@pytest.fixture
def worker(config: WorkerConfig, make_worker: MakeWorker) -> Worker:
    """One that has joined."""
    worker = make_worker(config)
    turn_until(worker, lambda: not worker.unready() and metric(worker, "assigned_partitions") == 1)
    return worker


def test_a_start_is_no_standstill(config: WorkerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a scrape gets while the worker waits for broker and store."""
    shown: list[float] = []

    def connect(*arguments: Any) -> NoReturn:
        metrics = arguments[2]
        shown.append(metrics.registry.get_sample_value("driftkeel_last_progress_timestamp_seconds"))
        raise UnreachableError("away")

    monkeypatch.setattr("worker.run.connect", connect)
    with pytest.raises(UnreachableError):
        Worker(config, threading.Event())
    assert shown == [pytest.approx(time.time(), abs=120)]


@pytest.mark.parametrize("hangs", [False, True])
def test_a_broker_that_is_away_shows_without_a_frame(
    worker: Worker, broker: FlakyProxy, caplog: pytest.LogCaptureFixture, hangs: bool
) -> None:
    turn_until(worker, lambda: time.time() - metric(worker, "broker_last_answer_timestamp_seconds") < SILENT_S / 2)
    away = broker.hold if hangs else broker.down
    with caplog.at_level(logging.INFO, "driftkeel.reach"):
        away(True)
        turn_until(worker, lambda: caplog.text.count("has not answered for") >= 2)
        assert "has not answered for" in worker.unready()
        assert worker.alive()
        assert time.time() - metric(worker, "broker_last_answer_timestamp_seconds") > SILENT_S
        away(False)
        turn_until(worker, lambda: "answers again" in caplog.text)
    turn_until(worker, lambda: not worker.unready())
    turn_until(worker, lambda: time.time() - metric(worker, "broker_last_answer_timestamp_seconds") < SILENT_S)


def test_a_store_that_is_away_is_said_once(
    worker: Worker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.store.retry.FIRST_PAUSE_S", 0.0)
    tries = iter([False] * 5 + [True])

    def action() -> bool:
        if not (answers := next(tries)):
            raise UnreachableError("the store refuses the connection")
        return answers

    with caplog.at_level(logging.INFO, "driftkeel.worker"):
        assert worker._retry(action)
        assert worker._retry(lambda: True)
    assert len(caplog.messages) == 2
    assert "refuses the connection" in caplog.messages[0]
    assert "answers again" in caplog.messages[1]


@pytest.mark.parametrize("paused", [False, True])
def test_a_broker_that_answers_is_heard_of_all_the_while(worker: Worker, paused: bool) -> None:
    """By an idle worker, and by one that takes no records over."""
    worker._consumer.pause(paused)
    heard: set[float] = set()

    def often() -> bool:
        heard.add(worker._consumer.answered())
        return len(heard) > 20

    if paused:
        wait_until(lambda: bool(worker._keep_alive()) or often(), "twenty answers")
    else:
        turn_until(worker, often)


def test_a_store_that_is_away_is_no_standstill_and_lag_shows(
    worker: Worker, config: WorkerConfig, store_proxy: FlakyProxy
) -> None:
    topic, frames = Topic(config.kafka.bootstrap), config.kafka.topics.frames

    def send() -> None:
        topic.send(frames, [(b"cam", picture(i), []) for i in range(10)])

    def lag() -> float:
        return metric(worker, "consumer_lag_records", topic=frames, partition="0")

    send()
    # Committed, not only answered: the last write waits a moment, and the first lag shown is that of an empty topic.
    turn_until(worker, lambda: worker._consumer.consumer.committed(TopicPartition(frames, 0)) == 10 and lag() == 0)
    store_proxy.down(True)
    stored: list[float] = []

    def progress() -> float:
        return metric(worker, "last_progress_timestamp_seconds")

    def scrape() -> None:
        """On a thread of its own, as Prometheus does: the loop waits for the store."""
        try:
            for behind in (10.0, 20.0, 30.0):
                send()
                wait_until(lambda behind=behind: lag() == behind, f"a lag of {behind}")
                before, errors = progress(), metric(worker, "store_errors_total")
                wait_until(lambda errors=errors: metric(worker, "store_errors_total") > errors, "another try")
                wait_until(lambda before=before: progress() > before, "progress")
                stored.append(metric(worker, "store_last_answer_timestamp_seconds"))
            assert worker.unready() == f"the store at {config.store.address} does not answer"
        finally:
            store_proxy.down(False)

    with ThreadPoolExecutor(1) as threads:
        scraped = threads.submit(scrape)
        turn_until(worker, lambda: scraped.done() and metric(worker, "predictions_total") >= 40 and lag() == 0)
        scraped.result()
    assert stored[0] == stored[-1]
    assert metric(worker, "broker_errors_total", operation="commit") == 0
    turn_until(worker, lambda: not worker.unready())
    turn_until(worker, lambda: metric(worker, "store_last_answer_timestamp_seconds") > stored[-1])


def test_a_store_that_lost_its_last_second_is_compared_before_anything_is_noted(
    worker: Worker, config: WorkerConfig, store_proxy: FlakyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a commit is the first to meet it, because no frame has come since."""
    topic, frames, group = Topic(config.kafka.bootstrap), config.kafka.topics.frames, config.kafka.group
    store = redis.Redis(port=store_proxy.target, socket_timeout=120)
    header, mark = worker._store.keys("cam")[0], worker._store._mark_key(group, (frames, 0))

    def folded() -> int:
        content = store.hget(header, "header")
        return decode_header(content).frames if content else 0

    def send() -> None:
        topic.send(frames, [(b"cam", picture(i), []) for i in range(4)])

    def noted() -> int:
        return int(store.get(mark) or 0)

    send()
    turn_until(worker, lambda: noted() == 4)
    kept = {key: store.dump(key) for key in store.scan_iter(f"{config.store.prefix}:*")}
    monkeypatch.setattr("worker.consume.consumer.COMMIT_INTERVAL_S", 60.0)
    send()
    turn_until(worker, lambda: folded() == 8)
    for key, content in kept.items():
        store.restore(key, 0, content, replace=True)
    store_proxy.cut()
    monkeypatch.setattr("worker.consume.consumer.COMMIT_INTERVAL_S", 0.0)
    for _ in range(20):
        worker._turn()
    assert noted() == 4
    send()
    turn_until(worker, lambda: folded() == 12 and noted() == 12)
    store.close()


def test_a_worker_that_fails_while_the_broker_is_away_ends(
    worker: Worker, broker: FlakyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for no acknowledgement: whoever starts it again must see that it ended."""
    monkeypatch.setattr("worker.publish.publisher.ACKNOWLEDGE_TIMEOUT_S", 1.0)

    def fails() -> None:
        raise RuntimeError("a mistake of ours")

    broker.down(True)
    worker._parts.publisher.send(Message("predictions", b"cam", b"{}", []))
    monkeypatch.setattr(worker, "_turn", fails)
    with ThreadPoolExecutor(1) as threads:
        ended = threads.submit(worker.run)
        try:
            with pytest.raises(RuntimeError, match="a mistake of ours"):
                ended.result(timeout=120)
        finally:
            broker.down(False)


@pytest.mark.parametrize("hangs", [False, True])
def test_a_worker_that_is_told_to_stop_waits_seconds_for_a_broker_that_is_away(
    worker: Worker, config: WorkerConfig, broker: FlakyProxy, hangs: bool, make_worker: MakeWorker
) -> None:
    """And what it did not get acknowledged is neither stored nor committed, but read again."""
    topic, frames, header = Topic(config.kafka.bootstrap), config.kafka.topics.frames, worker._store.keys("cam")[0]
    topic.send(frames, [(b"cam", picture(i), []) for i in range(8)])
    store = redis.Redis(
        port=int(str(config.store.url.get_secret_value()).rsplit(":", 1)[1].split("/")[0]), socket_timeout=120
    )

    def folded() -> int:
        content = store.hget(header, "header")
        return decode_header(content).frames if content else 0

    turn_until(worker, lambda: bool(worker._flights))
    before = folded()
    away = broker.hold if hangs else broker.down
    away(True)
    timer = threading.Timer(0.5, worker._stop.set)  # while acknowledgements are waited for
    timer.start()
    began = time.monotonic()
    worker.run()
    took = time.monotonic() - began
    away(False)
    assert took < 300  # It did not wait for the acknowledgements.
    assert folded() == before < 8
    second = make_worker(config)
    turn_until(second, lambda: folded() == 8)
    store.close()
