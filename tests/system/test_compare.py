"""Two groups of workers on the same frames, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from schemas.config import Kafka
from tests.conftest import Topic
from tests.system.conftest import run_cli

FRAMES = 6


def answer(kafka: Kafka, stream: str, offset: int, label: str, estimate: float, bundle: str) -> bytes:
    content = {
        **{
            "id": f"{kafka.topics.frames}/0/{offset}",
            "stream": stream,
            "event_time": f"2026-01-0{1 + offset}T00:00:00Z",
        },
        **{"index": 0, "label": label, "confidence": 0.5, "top": [], "bundle": bundle, "step": 0},
        **{
            "parameters": "adapted",
            "estimated_accuracy": estimate,
            "worker": "w",
            "wait_seconds": 0,
            "pass_seconds": 0,
        },
    }
    return json.dumps(content).encode()


@pytest.fixture
def configs(kafka_settings: Kafka, topic: Topic, tmp_path: Path) -> list[str]:
    """Of two groups: the second has answered one of cam-a's frames twice and one not, and cam-b's otherwise; it has
    no answer to the first's last frame, and one of a frame that the first has not seen."""
    kafka = kafka_settings
    trial = f"{kafka.topics.frames}.trial"
    first = [answer(kafka, "cam-a", n, "nut", 0.8, "old") for n in range(4)]
    first += [answer(kafka, "cam-b", n, "nut", 0.6, "old") for n in (4, 5)]
    second = [
        answer(kafka, "cam-a", n, label, 0.9, "new") for n, label in ((0, "bolt"), (0, "nut"), (1, "nut"), (2, "bolt"))
    ]
    second += [b"{", answer(kafka, "cam-b", 4, "bolt\x1b[2J", 0.7, "new")]
    second += [answer(kafka, "cam-c", 7, "nut", 0.9, "new\x1b[2J")]
    topic.send(kafka.topics.predictions, [(b"cam", value, []) for value in first])
    topic.send(trial, [(b"cam", value, []) for value in second])
    return [str(written(tmp_path / f"{name}.yaml", kafka, name)) for name in (kafka.topics.predictions, trial)]


def written(path: Path, kafka: Kafka, predictions: str, **topics: str) -> Path:
    content: dict[str, Any] = kafka.model_dump(mode="json", exclude_none=True)
    content["topics"] |= {"predictions": predictions, **topics}
    path.write_text(yaml.safe_dump({"kafka": content, "bundle": {"path": "none"}}))
    return path


def test_the_same_frames_are_set_side_by_side(configs: list[str]) -> None:
    told = json.loads(run_cli("compare", *configs, "--json").stdout)
    assert told["streams"]["cam-a"] == {
        "frames": 3,
        "alike": 2,
        "first": pytest.approx(0.8),
        "second": pytest.approx(0.9),
    }
    assert told["streams"]["cam-b"] == {
        "frames": 1,
        "alike": 0,
        "first": pytest.approx(0.6),
        "second": pytest.approx(0.7),
    }
    assert set(told["streams"]) == {"cam-a", "cam-b"}
    assert (told["all"]["frames"], told["all"]["alike"]) == (4, 2)
    assert (told["alone"], told["bundles"], told["differing"]) == ([2, 1], [["old"], ["new", "new\x1b[2J"]], [])
    told = json.loads(run_cli("compare", *configs, "--json", "--show", "1").stdout)
    ((first, second),) = told["differing"]
    assert first["id"] == second["id"]
    assert (first["label"], second["label"], first["event_time"]) == ("nut", "bolt\x1b[2J", "2026-01-05T00:00:00Z")


def test_what_differs_most_is_told_first_and_nothing_steers_the_terminal(configs: list[str]) -> None:
    result = run_cli("compare", *configs, "--show", "2")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines[1:4]] == ["cam-b", "cam-a", "all"], result.stderr
    assert lines[2][1:] == ["3", "66.7%", "80.0%", "90.0%", "+10.0"]
    assert ["nut", "50%", "bolt", "50%"] in [line[2:] for line in lines[-2:]]
    assert "\x1b" not in result.stdout
    assert "cam-b" in result.stdout.splitlines()[-1]  # the newest last


def test_only_frames_of_a_time(configs: list[str]) -> None:
    told = json.loads(run_cli("compare", *configs, "--json", "--since", "2026-01-02", "--until", "2026-01-03").stdout)
    assert told["all"] == {"frames": 1, "alike": 1, "first": pytest.approx(0.8), "second": pytest.approx(0.9)}


def test_what_cannot_be_compared_is_named(configs: list[str], kafka_settings: Kafka, tmp_path: Path) -> None:
    other = written(tmp_path / "other.yaml", kafka_settings, "elsewhere", frames="other")
    assert "only answers to the same frames can be compared" in run_cli("compare", configs[0], str(other)).stderr
    assert "both publish to" in run_cli("compare", configs[0], configs[0]).stderr
    early = run_cli("compare", *configs, "--until", "2025-01-01")
    assert (early.returncode, early.stderr.count("\n")) == (1, 1)
    assert "no frame was answered by both: 0 by the first only, 0 by the second only" in early.stderr
