"""A broker that is there and refuses what the worker publishes: the worker is not ready, and says why."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType

from schemas.config import WorkerConfig
from tests.broker.process import bootstrap as bootstrap  # a fixture
from tests.conftest import Topic, picture
from tests.servers import get, wait_until
from tests.system.conftest import metric
from worker.run import Worker

FRAMES = 8


def configure(config: WorkerConfig, topic: str, **settings: str) -> None:
    admin = KafkaAdminClient(bootstrap_servers=config.kafka.bootstrap)
    named = {name.replace("_", "."): value for name, value in settings.items()}
    admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, named)], raise_on_unknown=False)
    admin.close()


def readiness(worker: Worker) -> tuple[int, str]:
    return get(worker._server.port, "/readyz")


@pytest.mark.parametrize(
    ("topic", "refused", "mended", "reason"),
    [
        ("predictions", {"max_message_bytes": "10"}, {"max_message_bytes": "1000000"}, "MessageSizeTooLargeError"),
        ("updates", {"min_insync_replicas": "2"}, {"min_insync_replicas": "1"}, ""),  # The client is still at it.
    ],
)
def test_a_worker_whose_records_are_refused_is_not_ready_until_they_are_taken(
    config: WorkerConfig,
    topic: str,
    refused: dict[str, str],
    mended: dict[str, str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("worker.reach.SILENT_S", 3.0)
    monkeypatch.setattr("worker.reach.LOOK_S", 0.05)
    caplog.set_level(logging.INFO, "driftkeel.reach")
    begin = f"not ok: the broker at {config.kafka.bootstrap} has not taken what is published for "
    name = getattr(config.kafka.topics, topic)
    configure(config, name, **refused)
    worker = Worker(config, threading.Event())
    with ThreadPoolExecutor(1) as threads:
        ran = threads.submit(worker.run)
        try:
            wait_until(lambda: readiness(worker)[0] == 200, "the worker being ready")
            frames = [(b"cam", picture(i), []) for i in range(FRAMES)]
            Topic(config.kafka.bootstrap).send(config.kafka.topics.frames, frames)
            wait_until(lambda: "has not taken" in caplog.text, "the log saying so")
            wait_until(lambda: reason in readiness(worker)[1], "the reason")
            wait_until(lambda: readiness(worker)[1].startswith(begin), "the broker being named")
            assert readiness(worker)[0] == 503
            assert worker.alive()
            assert caplog.text.count("has not taken") == 1
            configure(config, name, **mended)
            wait_until(lambda: readiness(worker)[0] == 200, "the worker being ready again")
            wait_until(lambda: metric(worker, "predictions_total") == FRAMES, "all predictions")
        finally:
            worker._stop.set()
            ran.result()
    assert "takes records again" in caplog.text
