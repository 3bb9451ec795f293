"""A freeze of all streams holds for a camera that begins after any number of other commands, and one of a camera for as
long as its state is stored."""

from __future__ import annotations

import pytest

from schemas.command import Command, encode_command
from schemas.config import WorkerConfig
from tests.conftest import Topic, picture
from tests.system.conftest import MakeWorker, turn_until
from worker import parts
from worker.control.commands import CommandList
from worker.run import Worker


def test_a_new_camera_obeys_a_freeze_of_long_ago(
    config: WorkerConfig, topic: Topic, monkeypatch: pytest.MonkeyPatch, make_worker: MakeWorker
) -> None:
    monkeypatch.setattr(CommandList.__init__, "__defaults__", (50, 50))
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


def test_a_camera_that_has_obeyed_stays_frozen_when_workers_know_its_freeze_no_more(
    config: WorkerConfig, topic: Topic, monkeypatch: pytest.MonkeyPatch, make_worker: MakeWorker
) -> None:
    monkeypatch.setattr(parts, "MAX_KEPT", 2)
    monkeypatch.setattr(CommandList.__init__, "__defaults__", (2, 2))
    config = config.model_copy(update={"store": config.store.model_copy(update={"max_streams": 2})})
    commands, frames = config.kafka.topics.commands, config.kafka.topics.frames

    def tell(*streams: str) -> None:
        said = [Command(stream=stream, action="freeze") for stream in streams]
        topic.send(commands, [(c.stream.encode(), encode_command(c), []) for c in said])

    tell("cam", "ahead")
    first = make_worker(config)
    topic.send(frames, [(b"cam", picture(0), [])])
    turn_until(first, lambda: _is_frozen(first, "cam"))
    first._stop.set()
    first.run()
    tell("of-monday", "of-tuesday", "of-wednesday")
    second = make_worker(config)
    topic.send(frames, [(name, picture(1), []) for name in (b"cam", b"ahead")])
    engine = second._streams.engine
    turn_until(second, lambda: "ahead" in engine and engine.resident("ahead").header.frames == 1)
    turn_until(second, lambda: "cam" in engine and engine.resident("cam").header.frames == 2)
    assert _is_frozen(second, "cam")
    assert not _is_frozen(second, "ahead")  # It had no state to stand in.


def _is_frozen(worker: Worker, stream: str) -> bool:
    engine = worker._streams.engine
    policy = engine.resident(stream).header.policy if stream in engine else None
    return policy is not None and bool(policy.frozen)
