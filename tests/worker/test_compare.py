"""From a time on, a topic of months of predictions is not read from its beginning."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from schemas.config import Bundle, Kafka, WorkerConfig
from tests.broker.process import (
    bootstrap as bootstrap,
)  # a fixture; the embedded broker knows no times that senders give
from tests.conftest import Topic
from tests.system.test_compare import answer
from worker.compare import ComparedAnswer, answers, compared, table


def test_the_topic_is_read_from_a_time_on(kafka_settings: Kafka) -> None:
    """Clocks differ: a frame may be of half an hour after its answer. One that is of days after it shows what is not
    read."""
    topic, begin = kafka_settings.topics.predictions, datetime(2026, 1, 1, tzinfo=UTC)
    sent = [begin, *(begin + timedelta(days=day, minutes=-30) for day in range(1, 6))]
    for moment, day in zip(sent, (4, 1, 2, 3, 4, 5), strict=True):
        content = answer(kafka_settings, "cam", day, "nut", 0.8, "old")
        Topic(kafka_settings.bootstrap).send(topic, [(b"cam", content, [])], int(1000 * moment.timestamp()))

    def days(since: datetime | None) -> list[int]:
        config = WorkerConfig(kafka=kafka_settings, bundle=Bundle(path="none"))
        return [one.event_time.day for one in answers(config, since)]

    assert days(begin + timedelta(days=3)) == [4, 5, 6]
    assert days(None) == days(datetime(1, 1, 1, tzinfo=UTC)) == [5, 2, 3, 4, 5, 6]


def test_where_one_side_estimates_nothing_nothing_stands_in_its_place() -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)

    def said(estimates: list[float | None]) -> list[ComparedAnswer]:
        given = enumerate(estimates)
        return [ComparedAnswer(f"frames/0/{i}", "cam", moment, "nut", 0.99, one, "b") for i, one in given]

    found = compared(said([0.8, 0.9]), said([None, 0.9]))
    assert (found.total.first, found.total.second) == (pytest.approx(0.85), None)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table(found))
    assert capture.get().splitlines()[1].split() == ["cam", "2", "100.0%", "85.0%", "-", "-"]
