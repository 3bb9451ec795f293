"""One partition: record batches as they came, in memory, and in a file where there is a folder for it."""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from kafka.record import MemoryRecords
from kafka.record.util import calc_crc32c

from tests.broker import errors

# Base offset, length, leader epoch, magic, crc, attributes, last offset delta, first and last timestamp, producer's id
# and epoch, base sequence, count: the header of a record batch (magic 2).
HEADER = struct.Struct(">qiibIhiqqqhii")
OUTSIDE_LENGTH = 12  # bytes before what the length counts
CHECKED_FROM = 21  # where the bytes begin that the crc covers
NO_PRODUCER = -1
LAST_SEQUENCE = 2**31 - 1
REMEMBERED = 5  # batches per producer: as many as a client may have on their way


class RefusedError(Exception):
    """The broker does not take it; `code` says why."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True)
class Batch:
    base: int
    last: int
    newest_ms: int
    producer: int
    epoch: int
    sequence: int
    content: bytes

    @property
    def last_sequence(self) -> int:
        return (self.sequence + self.last - self.base) % (LAST_SEQUENCE + 1)


def parse(content: bytes, base: int | None = None) -> Batch:
    """A batch, with offsets from `base` on, or as they are. Raises RefusedError."""
    if len(content) < HEADER.size:
        raise RefusedError(errors.CORRUPT_MESSAGE)
    old, length, _, magic, crc, _, delta, _, newest, producer, epoch, sequence, _ = HEADER.unpack_from(content)
    if magic != 2 or length + OUTSIDE_LENGTH != len(content) or calc_crc32c(content[CHECKED_FROM:]) != crc:
        raise RefusedError(errors.CORRUPT_MESSAGE)
    if base is None:
        base = old
    content = struct.pack(">qii", base, length, 0) + content[16:]
    return Batch(base, base + delta, newest, producer, epoch, sequence, content)


@dataclass
class Log:
    """`path` is where the batches are kept; what is in it is read first. Where it begins is not kept."""

    path: Path | None = None
    batches: list[Batch] = field(default_factory=list)
    start: int = 0
    end: int = 0
    producers: dict[int, deque[Batch]] = field(default_factory=dict)
    waiting: set[asyncio.Event] = field(default_factory=set)
    _file: BinaryIO | None = None

    def __post_init__(self) -> None:
        if self.path is None:
            return
        content = self.path.read_bytes() if self.path.exists() else b""
        at = 0
        while at + OUTSIDE_LENGTH <= len(content):
            size = OUTSIDE_LENGTH + struct.unpack_from(">i", content, at + 8)[0]
            if at + size > len(content):  # killed in the middle of a write: nobody was told of this batch
                break
            self._take(parse(content[at : at + size]))
            at += size
        self._file = self.path.open("r+b" if self.path.exists() else "w+b", buffering=0)
        self._file.truncate(at)
        self._file.seek(at)

    def append(self, content: bytes) -> int:
        """Offset of the first record, also of a batch that a producer sends a second time. Raises RefusedError."""
        batch = parse(content, self.end)
        if batch.producer != NO_PRODUCER and (known := self._sent_before(batch)) is not None:
            return known
        if self._file is not None:
            self._file.write(batch.content)  # not buffered: what is acknowledged survives a kill
        self._take(batch)
        for event in self.waiting:
            event.set()
        return batch.base

    def _take(self, batch: Batch) -> None:
        self.batches.append(batch)
        self.end = batch.last + 1
        if batch.producer != NO_PRODUCER:
            self.producers.setdefault(batch.producer, deque(maxlen=REMEMBERED)).append(batch)

    def _sent_before(self, batch: Batch) -> int | None:
        """Idempotence (KIP-98): sequence numbers have no gaps, and one that comes again is no new batch."""
        known = self.producers.get(batch.producer)
        if not known:
            return None
        last = known[-1]
        if batch.epoch < last.epoch:
            raise RefusedError(errors.INVALID_PRODUCER_EPOCH)
        if batch.epoch > last.epoch:
            if batch.sequence != 0:
                raise RefusedError(errors.OUT_OF_ORDER_SEQUENCE_NUMBER)
            known.clear()
            return None
        for other in known:
            if (other.sequence, other.last_sequence) == (batch.sequence, batch.last_sequence):
                return other.base
        if batch.sequence != (last.last_sequence + 1) % (LAST_SEQUENCE + 1):
            raise RefusedError(errors.OUT_OF_ORDER_SEQUENCE_NUMBER)
        return None

    def read(self, offset: int, most: int, at_least_one: bool) -> bytes:
        """Whole batches from the one that holds `offset` on, up to `most` bytes; or one at least."""
        found: list[bytes] = []
        size = 0
        for batch in self.batches[self._index(offset) :]:
            size += len(batch.content)
            if size > most and (found or not at_least_one):
                break
            found.append(batch.content)
        return b"".join(found)

    def _index(self, offset: int) -> int:
        low, high = 0, len(self.batches)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.batches[middle].last < offset else (low, middle)
        return low

    def since(self, timestamp_ms: int) -> tuple[int, int]:
        """Offset and time of the first record that is not older; (-1, -1) where none is."""
        for batch in self.batches:
            if batch.newest_ms >= timestamp_ms:
                for record in MemoryRecords(batch.content).next_batch():
                    if record.timestamp >= timestamp_ms:
                        return record.offset, record.timestamp
        return -1, -1

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def delete(self) -> None:
        self.close()
        if self.path is not None:
            self.path.unlink()
        self.end = -1
        for event in self.waiting:
            event.set()
