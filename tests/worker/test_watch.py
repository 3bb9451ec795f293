"""Watching a broker that goes away and comes back, and drawing what is watched."""

from __future__ import annotations

import logging
import re
import threading
from pathlib import Path

import pytest

from schemas.config import Kafka, WorkerConfig
from schemas.errors import SourceError
from tests.chaos.proxy import flaky_broker
from tests.conftest import Topic, picture
from tests.monitoring.console.records import prediction
from tests.servers import wait_until
from worker.kafka.client import create_topics
from worker.kafka.inside import last_answer
from worker.watch import FrameMarker, Watcher


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


def test_whatever_a_stream_is_called_its_frames_are_drawn(kafka_settings: Kafka, topic: Topic, tmp_path: Path) -> None:
    frames = kafka_settings.topics.frames
    marker = FrameMarker(WorkerConfig(kafka=kafka_settings), tmp_path, threading.Event())
    names = ["../cam", "\N{GREEK SMALL LETTER ALPHA}" * 100, "\N{GREEK SMALL LETTER ALPHA}" * 99 + "b"]
    for number, name in enumerate(names):
        (sent,) = topic.send(frames, [(name.encode(), picture(number), [])])
        drawn = marker.draw(prediction(name, id=f"{frames}/{sent.partition}/{sent.offset}"))
        assert drawn is not None
        assert (drawn.exists(), drawn.parent) == (True, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    for place in ("0/\N{SUPERSCRIPT TWO}", "0/" + "9" * 30, "9" * 30 + "/0", "../0"):
        assert marker.draw(prediction("cam", id=f"{frames}/{place}")) is None
    marker.close()


def test_a_full_disk_is_named(kafka_settings: Kafka, topic: Topic, tmp_path: Path) -> None:
    frames = kafka_settings.topics.frames
    (sent,) = topic.send(frames, [(b"cam", picture(), [])])
    (tmp_path / f"cam-{sent.partition}-{sent.offset}.jpg").symlink_to("/dev/full")
    marker = FrameMarker(WorkerConfig(kafka=kafka_settings), tmp_path, threading.Event())
    with pytest.raises(SourceError, match=r"cam-\d+-\d+.jpg cannot be written: No space left on device"):
        marker.draw(prediction("cam", id=f"{frames}/{sent.partition}/{sent.offset}"))
    marker.close()
