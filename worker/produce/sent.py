"""Remembers in a small file what `driftkeel produce` has sent, so that a rerun continues where the last one stopped.

The file is up to a second behind the broker's acknowledgements. What it misses after a crash is read back from the
topic, from the offset that the file has: every record names its item and its frame's number.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kafka import TopicPartition
from kafka.errors import KafkaError

from schemas.config import Kafka
from schemas.errors import SourceError, UnreachableError
from schemas.frame import FRAME_TYPE
from worker.kafka.client import open_reader

LOCKED_S = 60.0  # longest wait for the file: runs for many cameras may share it, on a slow disk
_TABLES = """
CREATE TABLE IF NOT EXISTS items (
    topic TEXT, stream TEXT, item TEXT, frames INTEGER NOT NULL, done INTEGER NOT NULL,
    PRIMARY KEY (topic, stream, item)
);
CREATE TABLE IF NOT EXISTS reached (
    topic TEXT, stream TEXT, next_offset INTEGER NOT NULL, PRIMARY KEY (topic, stream)
);
"""
_ITEM = """
INSERT INTO items VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE
SET frames = max(frames, excluded.frames), done = max(done, excluded.done)
"""
_REACHED = """
INSERT INTO reached VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET next_offset = max(next_offset, excluded.next_offset)
"""


@dataclass
class Acknowledged:
    """What the broker has acknowledged: frames by item, items that are complete, and the offset after the newest."""

    frames: dict[str, int] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    next_offset: int = 0

    def take(self, item: str, number: int, offset: int, last: bool = False) -> None:
        """Add frame `number` of an item."""
        self.frames[item] = max(self.frames.get(item, 0), number + 1)
        self.next_offset = max(self.next_offset, offset + 1)
        if last:
            self.done.add(item)


class Sent:
    """The file, for any number of streams and threads, and one topic of frames. Raises SourceError.

    A topic is identified by its broker's address and, if the broker tells it, the topic's id: a topic that was created
    again has nothing yet.
    """

    def __init__(self, path: Path, kafka: Kafka, topic_id: str) -> None:
        address = f"{kafka.bootstrap}/{kafka.topics.frames}"
        self._topic = f"{address}#{topic_id}" if topic_id else address
        self._path, self._lock = path, threading.Lock()
        with self._using():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, LOCKED_S, check_same_thread=False)
            self._file.executescript(_TABLES)
        if topic_id:
            self._adopt(address)

    def frames(self, stream: str, item: str) -> tuple[int, bool]:
        """How many frames of an item are in the topic, and whether these are all."""
        query = "SELECT frames, done FROM items WHERE topic = ? AND stream = ? AND item = ?"
        with self._using():
            row = self._file.execute(query, (self._topic, stream, item)).fetchone()
        return (int(row[0]), bool(row[1])) if row else (0, False)

    def reached(self, stream: str) -> int | None:
        """The offset after the newest known frame of a stream."""
        query = "SELECT next_offset FROM reached WHERE topic = ? AND stream = ?"
        with self._using():
            row = self._file.execute(query, (self._topic, stream)).fetchone()
        return int(row[0]) if row else None

    def note(self, stream: str, acknowledged: Acknowledged) -> None:
        """Write what has been acknowledged."""
        rows = [(self._topic, stream, item, frames, 0) for item, frames in acknowledged.frames.items()]
        rows += [(self._topic, stream, item, 0, 1) for item in acknowledged.done]
        with self._using(), self._file:
            self._file.executemany(_ITEM, rows)
            self._file.execute(_REACHED, (self._topic, stream, acknowledged.next_offset))

    def forget(self, stream: str, item: str) -> None:
        """Have an item sent again."""
        with self._using(), self._file:
            row = (self._topic, stream, item)
            self._file.execute("DELETE FROM items WHERE topic = ? AND stream = ? AND item = ?", row)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        """Let one thread at a time use the file, and say what to do about its errors."""
        try:
            with self._lock:
                yield
        except (OSError, sqlite3.Error) as error:
            raise SourceError(
                f"{self._path} cannot be used to remember what was sent: {error}; name another with --state"
            ) from error

    def _adopt(self, address: str) -> None:
        """Take entries without an id, which older releases wrote, to be of this topic."""
        with self._using(), self._file:
            for table in ("items", "reached"):
                self._file.execute(f"UPDATE OR IGNORE {table} SET topic = ? WHERE topic = ?", (self._topic, address))  # noqa: S608


def read_back(kafka: Kafka, partition: int, stream: str, start: int | None) -> Acknowledged:
    """What the topic has of a stream from offset `start` on; if that is None, only the topic's end. Raises
    UnreachableError."""
    try:
        return _read_back(kafka, TopicPartition(kafka.topics.frames, partition), stream, start)
    except (KafkaError, OSError) as error:
        said = f"the broker at {kafka.bootstrap} does not tell what it has of stream {stream}"
        raise UnreachableError(f"{said}: {error}") from error


def _read_back(kafka: Kafka, place: TopicPartition, stream: str, start: int | None) -> Acknowledged:
    acknowledged = Acknowledged()
    with contextlib.closing(open_reader(kafka, auto_offset_reset="earliest")) as consumer:
        consumer.assign([place])
        end = int(consumer.end_offsets([place])[place])
        acknowledged.next_offset = end if start is None else start
        if start is None:
            return acknowledged
        consumer.seek(place, max(start, int(consumer.beginning_offsets([place])[place])))
        last = time.monotonic()
        # Some brokers report an end that is too early: read until nothing comes.
        while (records := consumer.poll(timeout_ms=1_000).get(place, [])) or consumer.position(place) < end:
            for record in records:
                _take(acknowledged, record, stream.encode())
            if records:
                last = time.monotonic()
            elif time.monotonic() - last > kafka.connect_timeout_s:
                raise UnreachableError(f"the broker at {kafka.bootstrap} does not tell what it has of stream {stream}")
    return acknowledged


def _take(acknowledged: Acknowledged, record: Any, key: bytes) -> None:
    acknowledged.next_offset = max(acknowledged.next_offset, record.offset + 1)
    headers = dict(record.headers)
    item, number = headers.get("ce_source") or b"", headers.get("ce_id") or b""
    if record.key == key and headers.get("ce_type") == FRAME_TYPE.encode() and number.isdigit():
        acknowledged.take(item.decode("ascii", "replace"), int(number), record.offset)
