"""A broker that gives up reading after a fetch's wait: its records come all the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.fetcher import CompletedFetch

from schemas.config import Kafka
from tests.broker.process import start_own_broker
from tests.conftest import Topic
from worker.kafka.client import create_topics, open_client
from worker.kafka.reading import LONGEST_MS, wait_while_read

WHERE = TopicPartition("frames", 0)


@pytest.fixture(scope="module")
def slow() -> Iterator[str]:
    broker = start_own_broker(reading_ms=60)
    yield broker.bootstrap
    broker.child.stop(0)


def test_records_come_from_a_broker_that_reads_for_longer_than_a_fetch_waits(
    slow: str, caplog: pytest.LogCaptureFixture
) -> None:
    create_topics(Kafka(bootstrap=slow), 1)
    Topic(slow).send(WHERE.topic, [(b"cam", b"%d" % number, []) for number in range(5)])
    consumer = open_client(KafkaConsumer, bootstrap_servers=slow, enable_auto_commit=False, fetch_max_wait_ms=10)
    consumer.assign([WHERE])
    consumer.seek_to_beginning()
    found: list[Any] = []
    with caplog.at_level(logging.WARNING, "driftkeel.kafka"):
        while len(found) < 5:
            found += consumer.poll(timeout_ms=100).get(WHERE, [])
    waits = [line.rpartition("waits ")[2] for line in caplog.messages]
    consumer.close()
    assert [record.offset for record in found] == list(range(5))
    assert waits == ["20 ms", "40 ms", "80 ms"]


Answer = Callable[..., int]


@pytest.fixture
def answer() -> Answer:
    """Hands a consumer an answer for a partition that ends at 100; returns how long its fetches wait then."""
    fetcher = SimpleNamespace(config={"fetch_max_wait_ms": 50}, _parse_fetched_data=lambda fetched: fetched)
    wait_while_read(SimpleNamespace(_fetcher=fetcher))

    def take(offset: int, records: bytes = b"", error: int = 0) -> int:
        data = SimpleNamespace(error_code=error, high_watermark=100, records=records)
        fetched = CompletedFetch(WHERE, offset, 12, data, None)
        assert fetcher._parse_fetched_data(fetched) is fetched
        return fetcher.config["fetch_max_wait_ms"]

    return take


def test_what_has_been_read_to_its_end_is_waited_for_as_before(answer: Answer) -> None:
    assert {answer(100) for _ in range(20)} == {50}


def test_an_answer_without_records_now_and_then_changes_nothing(answer: Answer) -> None:
    """Kafka gives a fetch's room to its first partitions; the others come first in the next."""
    assert {answer(7, records) for _ in range(20) for records in (b"", b"", b"x", b"x")} == {50}


def test_a_few_records_among_many_empty_answers_are_no_reading(answer: Answer) -> None:
    assert [answer(7, records) for _ in range(3) for records in (b"", b"", b"x")] == [50] * 4 + [100] * 5
    assert max(answer(7) for _ in range(60)) == LONGEST_MS


def test_errors_say_nothing_of_the_time_that_reading_takes(answer: Answer) -> None:
    assert {answer(7, error=6) for _ in range(20)} == {50}
