"""A pass that hangs: the loop turns and takes frames, and its worker is not alive all the same."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from schemas.config import WorkerConfig
from tests.conftest import Topic, picture
from tests.system.conftest import MakeWorker, metric, turn_until
from worker import flights, run
from worker.engine.engine import Engine


def test_a_worker_whose_pass_hangs_is_not_alive_until_it_ends(
    config: WorkerConfig,
    topic: Topic,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    make_worker: MakeWorker,
) -> None:
    monkeypatch.setattr(flights, "HUNG_AFTER_S", 0.5)
    monkeypatch.setattr(run, "STUCK_AFTER_S", 2.0)
    worker = make_worker(config.model_copy(update={"threads": 2}))
    turn_until(worker, lambda: not worker.unready())
    answers, forward = threading.Event(), Engine.forward

    def hang(*arguments: Any) -> Any:
        assert answers.wait(240)
        return forward(*arguments)

    monkeypatch.setattr(Engine, "forward", hang)
    frames = [(b"cam", picture(i), []) for i in range(4)]
    topic.send(config.kafka.topics.frames, frames)
    turn_until(worker, lambda: "a pass hangs" in caplog.text)
    turn_until(worker, lambda: not worker.alive() and metric(worker, "frames_total") == 4)
    assert metric(worker, "predictions_total") == 0
    answers.set()
    turn_until(worker, lambda: metric(worker, "predictions_total") == 4)
    turn_until(worker, worker.alive)
    assert "see to cpu" in caplog.text
