"""A broker that has records and gives none: the worker says so, where it looked as well as one without frames."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from schemas.config import WorkerConfig
from tests.broker.process import start_own_broker
from tests.conftest import Topic, picture
from tests.system.conftest import metric, running, turn_until
from worker.consume import standstill
from worker.kafka.client import create_topics
from worker.kafka.reading import LONGEST_MS


@pytest.fixture
def silent(config: WorkerConfig) -> Iterator[WorkerConfig]:
    """The site at a broker that reads for longer than any fetch waits."""
    broker = start_own_broker(reading_ms=LONGEST_MS + 1)
    kafka = config.kafka.model_copy(update={"bootstrap": broker.bootstrap})
    create_topics(kafka, 2)
    yield config.model_copy(update={"kafka": kafka})
    broker.child.stop(0)


def test_a_worker_that_gets_nothing_of_what_there_is_is_not_ready(
    silent: WorkerConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(standstill, "STUCK_AFTER_S", 0.1)
    with running(silent) as worker:
        turn_until(worker, lambda: not worker.unready())
        Topic(silent.kafka.bootstrap).send(silent.kafka.topics.frames, [(b"cam", picture(1), [])])
        turn_until(worker, lambda: metric(worker, "stuck_partitions") == 1)
        assert worker.unready().startswith("nothing comes of 1 partition")
        assert worker.alive()
    assert "nothing has come of partition" in caplog.text
