"""Batches that nobody can read, in topics that people look into: what is behind them is shown, and a line says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring.console.fleet import Fleet
from schemas.config import Kafka, WorkerConfig
from schemas.update import UpdateEvent, seal
from tests.monitoring.console.records import event, prediction
from tests.servers import wait_until
from tests.system.conftest import run_cli
from tests.worker.kafka.test_batches import packing
from worker.audit.read import read_topic
from worker.audit.verify import verify
from worker.console.topics import TopicReader
from worker.watch import Watcher

LOST = [b"x" * 500] * 3
Pack = Callable[..., None]


@pytest.fixture
def pack(kafka_settings: Kafka) -> Iterator[Pack]:
    with packing(kafka_settings) as send:
        yield send


def predictions(count: int, start: int = 0) -> list[bytes]:
    return [prediction("cam", offset=start + i).model_dump_json().encode() for i in range(count)]


def chained(count: int) -> list[bytes]:
    """Events of a stream, each with the hash of the one before."""
    sealed = [seal(event("cam", 1))]
    for number in range(2, count + 1):
        sealed.append(seal(event("cam", number, previous=sealed[-1].digest)))
    return [one.content for one in sealed]


def test_watching_goes_on(kafka_settings: Kafka, pack: Pack, caplog: pytest.LogCaptureFixture) -> None:
    topic = kafka_settings.topics.predictions
    pack(predictions(2), topic=topic)
    pack(LOST, broken=True, topic=topic)
    pack(predictions(2, 2), topic=topic)
    stop = threading.Event()
    watcher = Watcher(WorkerConfig(kafka=kafka_settings), set(), True, stop)
    seen = [p.id for p in islice(watcher.predictions(), 4)]
    watcher.close()
    assert seen == [f"frames/0/{i}" for i in range(4)]
    assert f"3 records passed over so far; newest: offsets 2 to 4 of {topic}/0 cannot be read: " in caplog.text


def test_the_console_goes_on(kafka_settings: Kafka, pack: Pack, caplog: pytest.LogCaptureFixture) -> None:
    topics = kafka_settings.topics
    for topic, contents in ((topics.predictions, predictions(2)), (topics.updates, chained(2))):
        pack(contents[:1], topic=topic)
        pack(LOST, broken=True, topic=topic)
        pack(contents[1:], topic=topic)
    fleet, stop = Fleet(10), threading.Event()
    reader = TopicReader(kafka_settings, fleet, stop)
    reader.start()
    wait_until(lambda: _shown(fleet), "what can be read")
    stop.set()
    reader.join(120)
    assert "6 records passed over so far" in caplog.text


def _shown(fleet: Fleet) -> bool:
    stream: Any = fleet.named("cam")
    return stream is not None and stream.prediction is not None and stream.event_count == 2


def test_the_audit_names_what_it_cannot_read(kafka_settings: Kafka, pack: Pack, tmp_path: Path) -> None:
    topic, contents = kafka_settings.topics.updates, chained(6)
    pack(contents[:3], topic=topic)
    pack(LOST, broken=True, topic=topic)
    pack(contents[3:], topic=topic)
    verification = verify(read_topic(kafka_settings))
    assert (verification.streams, verification.events) == (1, 6)
    (finding,) = verification.findings
    assert (finding.kind, finding.event) == ("unreadable", f"{topic}/0/5")
    lost = f"offsets 3 to 5 of {topic}/0 cannot be read: "
    assert finding.text.startswith(lost)

    site, lines = tmp_path / "site.yaml", tmp_path / "lines.jsonl"
    site.write_text(yaml.safe_dump({"kafka": kafka_settings.model_dump(mode="json", exclude_none=True)}))
    shown = run_cli("audit", "show", "--config", str(site))
    assert shown.returncode == 0, shown.stderr
    assert [line.split()[:2] for line in shown.stdout.splitlines()[1:]] == [["cam", "6"]]
    assert f"driftkeel: 3 records left out; {lost}" in shown.stderr
    exported = run_cli("audit", "export", "--output", str(lines), "--config", str(site))
    assert "6 records" in exported.stdout
    assert "3 records left out" in exported.stderr
    assert [UpdateEvent.model_validate_json(line).number for line in lines.read_text().splitlines()] == [*range(1, 7)]
