"""Has consumers pass over record batches that cannot be read.

kafka-python raises for such a batch, and again after every restart, so that nothing behind it would ever be read. Here
one record takes the place of what cannot be read, so that offsets go on as with any other record.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from kafka import TopicPartition
from kafka.consumer.fetcher import Fetcher
from kafka.errors import UnsupportedCodecError
from kafka.record.default_records import DefaultRecord

from schemas.errors import ConfigError
from worker.terminal import counted

log = logging.getLogger("driftkeel.kafka")
FORMAT = 2  # of batches since Kafka 0.11; older ones have no last offset
CODECS = range(5)  # none, gzip, snappy, lz4, zstd
OURS = (UnsupportedCodecError, MemoryError)  # errors for which the batch is not to blame


class Unreadable(bytes):
    """The value, empty, of a record that stands for `records` records that cannot be read. It has the offset of the
    last of them."""

    reason: str
    records: int

    def __new__(cls, reason: str, records: int = 1) -> Unreadable:
        made = super().__new__(cls)
        made.reason, made.records = reason, records
        return made


class PassedOver:
    """Leaves unreadable records out, for commands that only look on, and logs the 1st, the 2nd, the 4th batch, ..."""

    def __init__(self) -> None:
        self._batches = self._records = 0

    def readable(self, records: Iterable[Any]) -> Iterator[Any]:
        """The records that could be read."""
        for record in records:
            if isinstance(record.value, Unreadable):
                self._note(record.value)
            else:
                yield record

    def _note(self, missing: Unreadable) -> None:
        self._batches += 1
        self._records += missing.records
        if self._batches.bit_count() == 1:
            log.warning("%s passed over so far; newest: %s", counted(self._records, "record"), missing.reason)


def pass_over_unreadable(consumer: Any) -> None:
    """Have a KafkaConsumer return an `Unreadable` value rather than raise for a batch, or for the rest of one."""
    doubted: dict[TopicPartition, int] = {}

    class PartitionRecords(Fetcher.PartitionRecords):  # type: ignore[misc]
        def _unpack_records(self, tp: TopicPartition, records: Any, *deserializers: Any) -> Iterator[Any]:
            found: Iterator[Any] = super()._unpack_records(tp, _Batches(self, tp, records, doubted), *deserializers)
            return found

    consumer._fetcher.PartitionRecords = PartitionRecords


class _Batches:
    """Takes the place of the client's iterator over the batches of a fetch."""

    def __init__(self, part: Any, where: TopicPartition, records: Any, doubted: dict[TopicPartition, int]) -> None:
        self._part, self._where, self._records, self._doubted = part, where, records, doubted
        self._next, self._ended = 0, False

    def next_batch(self) -> _Batch | None:
        """The next batch, of which at least the header can be read, or one that stands for damage. None at the end."""
        if self._ended:
            return None
        first, batch, damage = max(self._next, self._part.next_fetch_offset), None, ""
        try:
            batch = self._records.next_batch()
            if batch is not None and not batch.validate_crc():
                damage = "its checksum is wrong"
        except OURS:
            raise
        except Exception as error:  # noqa: BLE001 - damaged bytes fail in ways that no list of exceptions covers
            damage = _text(error)
        if damage:
            return self._damaged(batch, first, damage)
        if batch is None:
            return None
        last = batch.last_offset if batch.magic == FORMAT else batch.base_offset
        self._next = last + 1
        return _Batch(batch, self._where, first, last)

    def _damaged(self, batch: Any, first: int, damage: str) -> _Batch | None:
        """A damaged batch. It may have been damaged on its way, so it is fetched again, once. Where it ends is not
        sure, nor what follows, so that nothing more of this fetch is read."""
        self._ended = True
        if self._doubted.get(self._where) != first:
            self._doubted[self._where] = first
            log.warning("the batch at offset %d of %s is asked for again: %s", first, _name(self._where), damage)
            return None
        last = first
        if batch is not None and batch.magic == FORMAT and batch.records_count == batch.last_offset_delta + 1:
            last = max(first, batch.last_offset)
        return _Batch(None, self._where, first, last, damage)


class _Batch:
    """A batch whose iteration ends with one `Unreadable` record rather than an error."""

    def __init__(self, batch: Any, where: TopicPartition, first: int, last: int, damage: str = "") -> None:
        self._batch, self._where, self._first, self._last, self._damage = batch, where, first, last, damage
        self.magic = batch.magic if batch is not None else 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def validate_crc(self) -> bool:
        """`_Batches` has validated it."""
        return True

    def __iter__(self) -> Iterator[Any]:
        first, damage = self._first, self._damage
        if not damage:
            try:
                for record in self._batch:
                    first = max(first, record.offset + 1)
                    yield record
            except UnsupportedCodecError as error:
                if self._batch.compression_type in CODECS:
                    raise ConfigError(
                        f"topic {self._where.topic} has records in a compression that cannot be read here: {error}; "
                        "pip install 'kafka-python[lz4,snappy,zstd]'"
                    ) from error
                damage = _text(error)
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - as above, and codecs have errors of their own
                damage = _text(error)
        if damage and first <= self._last:
            reason = f"offsets {first} to {self._last} of {_name(self._where)} cannot be read: {damage}"
            yield DefaultRecord(0, self._last, 0, 0, None, Unreadable(reason, self._last - first + 1), [])


def _name(where: TopicPartition) -> str:
    return f"{where.topic}/{where.partition}"


def _text(error: Exception) -> str:
    return " ".join(" ".join(map(str, error.args)).split()) or type(error).__name__
