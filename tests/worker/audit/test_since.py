"""From a time on, a topic of months is not read from its beginning."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from schemas.config import Kafka
from tests.broker.process import (
    bootstrap as bootstrap,
)  # a fixture; the embedded broker knows no times that senders give
from tests.conftest import Topic
from tests.worker.audit.test_audit import BEGIN, chain
from worker.audit.read import read_topic


def test_the_topic_is_read_from_a_time_on(kafka_settings: Kafka) -> None:
    topic, moment = kafka_settings.topics.updates, datetime(2026, 3, 1, 12, tzinfo=UTC)
    for hour, sealed in enumerate(chain("cam", 6)):
        sent_ms = int(1000 * (BEGIN + timedelta(hours=3 * hour)).timestamp())
        Topic(kafka_settings.bootstrap).send(topic, [(b"cam", sealed.content, [])], sent_ms)
    assert [record.event.number for record in read_topic(kafka_settings, moment)] == [5, 6]
    assert list(read_topic(kafka_settings, moment + timedelta(days=1))) == []
    assert len(list(read_topic(kafka_settings))) == 6
