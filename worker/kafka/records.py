"""Has consumers read headers whose names are not UTF-8, and limits the headers of compressed records.

kafka-python 3.0.12 reads no record of a batch with such a name, nor any behind it. Brokers take these names, and other
clients read them with replacement characters. Compressed headers are limited because two bytes of them become seventy.
"""

from __future__ import annotations

from sys import getsizeof
from typing import Any

from kafka.errors import CorruptRecordError
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.util import decode_varint

MAX_HEADERS = 1_000
PAIR_BYTES = 80  # of a header beside its name and value


def bytes_of(record: Any) -> int:
    """The memory of a record's key, value and headers. Headers take some even where they are empty."""
    headers = sum(PAIR_BYTES + getsizeof(name) + getsizeof(value) for name, value in record.headers)
    return len(record.key or b"") + len(record.value or b"") + headers


class _Forgiving(bytearray):
    """Bytes of which every slice can be decoded as text."""

    def __getitem__(self, where: Any) -> Any:
        found = super().__getitem__(where)
        return _Forgiving(found) if isinstance(where, slice) else found

    def decode(self, encoding: str = "utf-8", errors: str = "replace") -> str:
        return super().decode(encoding, "replace")


def forgive_header_names() -> None:
    """Patch this process. Calling it again does nothing."""
    strict = DefaultRecordBatch._read_msg
    if getattr(strict, "forgiving", False):
        return

    def read(batch: Any, *arguments: Any) -> Any:
        if batch.compression_type:
            _check_headers(batch._buffer, batch._pos)
        try:
            return strict(batch, *arguments)
        except UnicodeDecodeError:  # Only names are decoded; the batch's position has not moved on.
            batch._buffer = _Forgiving(batch._buffer)
            return strict(batch, *arguments)

    read.forgiving = True  # type: ignore[attr-defined]
    DefaultRecordBatch._read_msg = read


def _check_headers(buffer: bytearray, at: int) -> None:
    for _ in ("length", "attributes", "timestamp", "offset"):
        _, at = decode_varint(buffer, at)
    for _ in ("key", "value"):
        size, at = decode_varint(buffer, at)
        at += max(size, 0)
    count, _ = decode_varint(buffer, at)
    if count > MAX_HEADERS:
        raise CorruptRecordError(f"a compressed record has {count} headers, more than {MAX_HEADERS}")
