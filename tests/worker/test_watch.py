"""Watching a broker that goes away and comes back."""

from __future__ import annotations

import logging
import re
import threading
from pathlib import Path

import pytest

from schemas.config import Kafka, WorkerConfig
from tests.chaos.proxy import flaky_broker
from tests.conftest import Topic
from tests.monitoring.console.records import prediction
from tests.servers import wait_until
from worker.kafka.answer import last_answer
from worker.kafka.client import create_topics
from worker.watch import Drawer, Watcher


@pytest.mark.parametrize("hangs", [False, True])
def test_a_broker_that_goes_away_is_said_once_and_that_it_is_back(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    looks: list[float] = []
    look = Watcher._look_at_broker

    def noted(self: Watcher, since: float) -> None:
        look(self, since)
        looks.append(last_answer(self._consumer))

    monkeypatch.setattr(Watcher, "_look_at_broker", noted)
    caplog.set_level(logging.INFO, "driftkeel.watch")

    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "driftkeel.watch"]

    with flaky_broker() as broker:
        kafka = Kafka(bootstrap=f"127.0.0.1:{broker.port}", fetch_max_wait_ms=100)
        create_topics(kafka, 1)
        stop, found = threading.Event(), []
        watcher = Watcher(WorkerConfig(kafka=kafka), set(), True, stop)
        thread = threading.Thread(target=lambda: found.extend(watcher.predictions()))
        thread.start()
        wait_until(lambda: len(set(looks)) > 10, "answers without news")
        assert said() == []
        away = broker.hold if hangs else broker.down
        for times in (1, 2):
            away(True)
            wait_until(lambda n=times: len(said()) == 2 * n - 1, "the line that it is away")
            before = len(looks)
            wait_until(lambda n=before: len(looks) > n + 10, "more looks")
            away(False)
            wait_until(lambda n=times: len(said()) == 2 * n, "the line that it is back")
            assert re.search(r"has not answered for [1-9]\d* s", said()[-2])  # one, or more on a busy machine
            assert "answers again" in said()[-1]
        topic = Topic(kafka.bootstrap)
        topic.send(kafka.topics.predictions, [(b"cam", prediction("cam").model_dump_json().encode(), [])])
        wait_until(lambda: len(found) == 1 or not thread.is_alive(), "a prediction")
        stop.set()
        thread.join()
        watcher.close()
    assert len(found) == 1


def test_no_id_of_a_prediction_ends_the_drawing(kafka_settings: Kafka, tmp_path: Path) -> None:
    """Whoever may write to the topic chooses them."""
    drawer = Drawer(WorkerConfig(kafka=kafka_settings), tmp_path, threading.Event())
    for end in ("0/\N{SUPERSCRIPT TWO}", f"0/{10**30}", "-1/0", "0", ""):
        assert drawer.draw(prediction("cam", id=f"{kafka_settings.topics.frames}/{end}")) is None
    drawer.close()
