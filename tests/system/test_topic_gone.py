"""A topic of frames that is deleted under a running worker: it says which, and goes on once there is one again."""

from __future__ import annotations

import logging

import pytest
from kafka import KafkaAdminClient
from kafka.admin import NewTopic

from schemas.config import WorkerConfig
from tests.broker.process import bootstrap as bootstrap  # a fixture
from tests.conftest import Topic, picture
from tests.system.conftest import metric, running, turn_until


def test_a_worker_whose_topic_is_gone_says_so_and_goes_on_with_the_next(
    config: WorkerConfig, topic: Topic, caplog: pytest.LogCaptureFixture
) -> None:
    name = config.kafka.topics.frames
    gone = f"the broker at {config.kafka.bootstrap} has no topic {name} any more"
    admin = KafkaAdminClient(bootstrap_servers=config.kafka.bootstrap)
    with running(config) as worker:
        turn_until(worker, lambda: not worker.unready())
        admin.delete_topics([name])
        turn_until(worker, lambda: worker.unready() == gone)
        admin.create_topics([NewTopic(name=name, num_partitions=1, replication_factor=1)])
        turn_until(worker, lambda: not worker.unready())
        topic.send(name, [(b"cam", picture(1), [])])
        turn_until(worker, lambda: metric(worker, "predictions_total") == 1)
    admin.close()
    ours = [record for record in caplog.records if record.name.startswith("driftkeel.")]
    said = [record.getMessage() for record in ours if record.levelno == logging.ERROR]
    assert len(said) == 1
    assert said[0].startswith(gone)
    assert "kafka.topics.frames" in said[0]
