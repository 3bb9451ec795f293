"""The commands topic. Every worker reads all of it, from its beginning, without a consumer group.

A stream's state has the newest offset of this topic, per partition, that the stream has obeyed. It is written together
with what the command changed. So each command is obeyed once, by whichever worker has the stream, now or later.

The newest ten thousand commands are kept; of older ones those that still hold (see `worker.control.standing`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from kafka import TopicPartition
from pydantic import ValidationError

from schemas.command import EVERY_STREAM, Command
from schemas.config import Kafka
from schemas.errors import first_mistake
from schemas.frame import Position
from schemas.state import StreamHeader
from worker.consume.group import METADATA_MAX_AGE_MS
from worker.control.standing import Standing
from worker.kafka.batches import Unreadable
from worker.kafka.client import open_reader

log = logging.getLogger("driftkeel.commands")
MAX_KEPT = 10_000
MAX_BYTES = 64 << 10
POLL_MS = 200
FETCH_MAX_WAIT_MS = 500  # commands are rare, and every worker asks for them all the time
LOOK_AGAIN_S = 30.0


@dataclass(frozen=True)
class Numbered:
    """A command, its position in the topic, and when it was read (monotonic seconds)."""

    command: Command
    position: Position
    arrived: float


class CommandList:
    """The commands read so far. Filled by one thread, read by another."""

    def __init__(self, max_kept: int = MAX_KEPT, max_names: int = MAX_KEPT) -> None:
        """Keeps the newest `max_kept` commands, and those that still hold for up to `max_names` streams and for all."""
        self._lock = threading.Lock()
        self._max_kept = max_kept
        self._kept: deque[Numbered] = deque()
        self._of: dict[str, deque[Numbered]] = {}
        self._standing: Standing[Numbered] = Standing(max_names)
        self._max_names = max_names
        self._forgotten = 0
        self._ids: dict[str, Position] = {}
        self._new: dict[str, None] = {}
        self._read: dict[str, int] = {}
        self.unreadable = 0

    def add(self, position: Position, content: bytes | None) -> None:
        """Add a record of the topic. One that is no command is logged and counted. A command whose id has come before
        is passed over, and logged, because its sender may have meant a new one."""
        command = self._parsed(position, content)
        with self._lock:
            self._read[position.log] = position.offset
            self.unreadable += command is None
            if command is None:
                return
            first = self._ids.get(command.id, position)
            if first != position:
                log.warning(
                    "command %s at %s (%s, stream %s) is passed over: the one at %s had this id, and is the one done; "
                    "a new command needs an id of its own, or none",
                    command.id,
                    position,
                    command.action,
                    command.stream,
                    first,
                )
            if command.id in self._ids:
                return
            if len(self._kept) == self._max_kept:
                self._forget_oldest()
            numbered = Numbered(command, position, time.monotonic())
            self._kept.append(numbered)
            self._of.setdefault(command.stream, deque()).append(numbered)
            self._standing.add(numbered)
            self._ids[command.id] = position
            self._new[command.stream] = None

    def news(self) -> list[str]:
        """The streams, or `*`, that commands have come for since the last call."""
        with self._lock:
            new, self._new = self._new, {}
            return list(new)

    def next_offset(self, partition: str) -> int:
        """The offset to read on from in a topic/partition."""
        with self._lock:
            return self._read.get(partition, -1) + 1

    def after(self, header: StreamHeader) -> list[Numbered]:
        """The commands that the stream has not obeyed yet, in order."""
        with self._lock:
            mine = {
                numbered.position: numbered
                for name in (header.stream, EVERY_STREAM)
                for numbered in (*self._standing.of(name), *self._of.get(name, ()))
            }
        due = [n for n in mine.values() if n.position.offset > header.commands.get(n.position.log, -1)]
        return sorted(due, key=lambda numbered: numbered.arrived)

    def _forget_oldest(self) -> None:
        oldest = self._kept.popleft()
        stream = oldest.command.stream
        self._of[stream].popleft()
        if not self._of[stream]:
            del self._of[stream]
        del self._ids[oldest.command.id]
        self._forgotten += 1
        if self._forgotten.bit_count() == 1:  # The 1st, 2nd, 4th, ...
            log.warning(
                "more than %d commands in the topic: the oldest, %d by now, up to %s, are forgotten, but for those "
                "that still stand (freeze, policy) of the %d streams that were told one last",
                self._max_kept,
                self._forgotten,
                oldest.position,
                self._max_names,
            )

    def _parsed(self, position: Position, content: bytes | None) -> Command | None:
        try:
            if isinstance(content, Unreadable):
                raise ValueError(content.reason)
            if content is None or len(content) > MAX_BYTES:
                raise ValueError(f"{len(content or b'')} bytes, where a command has 1 to {MAX_BYTES}")
            command = Command.model_validate_json(content)
            if "id" not in command.model_fields_set:  # All workers must give it the same id.
                command = command.model_copy(update={"id": f"record:{position.partition}:{position.offset}"})
            return command
        except ValidationError as error:
            reason = first_mistake(error)
        except ValueError as error:
            reason = str(error)
        log.error("record %s is no command and is passed over: %s", position, reason)
        return None


class CommandReader:
    """Reads the commands topic in a thread of its own, so that no frame waits for it. `caught_up` is set once all that
    was there at the start is read, or there is no such topic."""

    def __init__(self, settings: Kafka, commands: CommandList) -> None:
        self._settings, self._commands = settings, commands
        self._stop, self.caught_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="commands", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)

    def _run(self) -> None:
        topic, warned = self._settings.topics.commands, False
        while not self._stop.is_set():
            try:
                if self._follow(topic) is None and not warned:
                    log.warning("the broker has no topic %s: this worker takes no commands until it is created", topic)
                    warned = True
                    self.caught_up.set()
            except Exception as error:  # noqa: BLE001 - whatever the client raises, this thread must go on
                log.warning("the commands topic cannot be read (%s: %s); trying again", type(error).__name__, error)
            self._stop.wait(LOOK_AGAIN_S if warned else 1.0)

    def _follow(self, topic: str) -> bool | None:
        """Read until told to stop, or the topic gets more partitions. None where there is no such topic."""
        options = {"metadata_max_age_ms": METADATA_MAX_AGE_MS, "fetch_max_wait_ms": FETCH_MAX_WAIT_MS}
        with closing(open_reader(self._settings, auto_offset_reset="earliest", **options)) as consumer:
            numbers = consumer.partitions_for_topic(topic)
            if not numbers:
                return None
            self._read_all(consumer, [TopicPartition(topic, number) for number in sorted(numbers)])
            return True

    def _read_all(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        consumer.assign(partitions)
        for p in partitions:  # After an error it reads on where it was. A command that is read twice counts once.
            consumer.seek(p, self._commands.next_offset(f"{p.topic}/{p.partition}"))
        ends = consumer.end_offsets(partitions)
        topic = partitions[0].topic
        while not self._stop.is_set() and len(consumer.partitions_for_topic(topic)) == len(partitions):
            for records in consumer.poll(timeout_ms=POLL_MS).values():
                for record in records:
                    self._commands.add(Position(record.topic, record.partition, record.offset), record.value)
            if not self.caught_up.is_set() and all(consumer.position(p) >= ends[p] for p in partitions):
                self.caught_up.set()
