"""A freeze of all streams holds for a camera that begins after any number of other commands."""

from __future__ import annotations

import pytest

from schemas.command import Command
from schemas.config import WorkerConfig
from tests.conftest import Topic, picture
from tests.system.conftest import MakeWorker, turn_until
from worker.control.commands import CommandList


def test_a_new_camera_obeys_a_freeze_of_long_ago(
    config: WorkerConfig, topic: Topic, monkeypatch: pytest.MonkeyPatch, make_worker: MakeWorker
) -> None:
    monkeypatch.setattr(CommandList.__init__, "__defaults__", (50,))
    said = [Command(stream="*", action="freeze", reason="audit day")]
    said += [Command(stream=f"door-{i % 3}", action=("freeze", "unfreeze")[i % 2]) for i in range(300)]
    commands = config.kafka.topics.commands
    topic.send(commands, [(c.stream.encode(), c.model_dump_json(exclude_none=True).encode(), []) for c in said])
    worker = make_worker(config)
    topic.send(config.kafka.topics.frames, [(b"new", picture(i), []) for i in range(12)])
    engine = worker._streams.engine
    turn_until(worker, lambda: "new" in engine and engine.resident("new").header.frames == 12)
    header = engine.resident("new").header
    assert header.policy is not None
    assert header.policy.frozen
    assert header.step == 0
