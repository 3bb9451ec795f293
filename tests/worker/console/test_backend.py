"""The console's way to the broker."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from schemas.command import Command
from schemas.config import Bundle, Kafka, Store, WorkerConfig
from tests.conftest import Topic
from worker.console.backend import SiteBackend
from worker.control.send import put_command


def test_a_command_of_the_console_says_of_itself_what_one_of_the_command_line_says(
    kafka_settings: Kafka, store_settings: Store, tiny_bundle_path: Path, topic: Topic
) -> None:
    config = WorkerConfig(kafka=kafka_settings, store=store_settings, bundle=Bundle(path=tiny_bundle_path))
    command = Command(stream="cam", action="freeze")
    nobody: Any = None
    backend = SiteBackend(config, topics=nobody, site=nobody)
    asyncio.run(backend.send(command))
    backend.close()
    put_command(kafka_settings, command)
    ours, typed = topic.read(kafka_settings.topics.commands, lambda records: len(records) == 2)
    assert (ours.key, ours.value) == (typed.key, typed.value)
    of_console, of_line = dict(ours.headers), dict(typed.headers)
    assert (of_console.pop("ce_source"), of_line.pop("ce_source")) == (b"driftkeel/console", b"driftkeel/command")
    assert of_console == of_line
    assert of_console["ce_time"] == command.time.isoformat().encode()
