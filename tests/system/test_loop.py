"""A worker in this process: it meets more streams than it keeps, and is refused."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from schemas.config import Adapt, Batch, Bundle, Kafka, Metrics, Store, WorkerConfig
from tests.conftest import Topic, picture
from worker.run import STUCK_AFTER_S, Worker


@pytest.fixture
def config(kafka_settings: Kafka, store_settings: Store, tiny_bundle_path: Path) -> WorkerConfig:
    return WorkerConfig(
        threads=1,
        kafka=kafka_settings,
        store=store_settings,
        bundle=Bundle(path=tiny_bundle_path),
        batch=Batch(max_batch=4, max_wait_ms=10, min_adapt=1),
        adapt=Adapt(max_resident_streams=4),
        metrics=Metrics(port=0),
    )


def test_nothing_is_kept_of_streams_that_made_room(config: WorkerConfig, topic: Topic) -> None:
    topic.send(config.kafka.topics.frames, [(b"cam-%d" % i, picture(i), []) for i in range(40)])
    stop = threading.Event()
    worker = Worker(config, stop)
    answered = worker.metrics.registry.get_sample_value
    deadline = time.monotonic() + 60
    while (answered("driftkeel_predictions_total") or 0) < 40 or worker._flights or worker._streams.crowded:
        assert time.monotonic() < deadline
        worker._turn()
    assert set(worker._partitions_of) == set(worker._streams.engine.streams)
    assert len(worker._partitions_of) <= 4
    stop.set()
    worker.run()


def test_a_refusal_after_a_long_outage_does_not_stop_the_loop(
    config: WorkerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest: list[float] = []
    monkeypatch.setattr("worker.run.random.uniform", lambda least, most: longest.append(most) or 0.0)
    worker = Worker(config, threading.Event())
    worker._refused(["cam"], span=300.0)  # a step that waited for the store
    assert 0 < longest[0] < STUCK_AFTER_S / 2
    worker._stop.set()
    worker.run()
