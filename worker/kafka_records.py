"""A way around what kafka-python 3.0.12 does with a header whose name is no UTF-8 text: it reads no record of the
batch, nor any behind it. Brokers take such names, and other clients read them, with a mark for what is none.
"""

from __future__ import annotations

from typing import Any

from kafka.record.default_records import DefaultRecordBatch


class _Forgiving(bytearray):
    """Bytes whose parts decode whatever they hold."""

    def __getitem__(self, where: Any) -> Any:
        found = super().__getitem__(where)
        return _Forgiving(found) if isinstance(where, slice) else found

    def decode(self, encoding: str = "utf-8", errors: str = "replace") -> str:
        return super().decode(encoding, "replace")


def forgive_header_names() -> None:
    """From here on, in this process. Again does nothing."""
    strict = DefaultRecordBatch._read_msg
    if getattr(strict, "forgiving", False):
        return

    def read(batch: Any, *arguments: Any) -> Any:
        try:
            return strict(batch, *arguments)
        except UnicodeDecodeError:  # Only names are decoded; the batch has not moved on.
            batch._buffer = _Forgiving(batch._buffer)
            return strict(batch, *arguments)

    read.forgiving = True  # type: ignore[attr-defined]
    DefaultRecordBatch._read_msg = read
