"""Records that other clients write, and that the Kafka client alone would end with."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest
from kafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder

from worker.kafka.records import bytes_of, forgive_header_names


class Latin(str):
    """A header name as a client writes it that knows nothing of UTF-8."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return super().encode("latin-1")


@pytest.fixture
def batch() -> Callable[[], DefaultRecordBatch]:
    builder = DefaultRecordBatchBuilder(2, 0, False, -1, -1, -1, 1 << 20)
    for offset, name in enumerate(["plain", Latin("größe"), "after"]):
        builder.append(offset, timestamp=0, key=b"cam", value=b"\xf6\xdf" * 9, headers=[(name, b"\xf6"), ("b", None)])
    content = bytes(builder.build())
    return lambda: DefaultRecordBatch(content)


def test_a_header_name_that_is_no_text_loses_no_record(batch: Callable[[], DefaultRecordBatch]) -> None:
    forgive_header_names()
    forgive_header_names()
    records = list(batch())
    assert [record.value for record in records] == [b"\xf6\xdf" * 9] * 3
    assert [record.headers for record in records] == [
        [("plain", b"\xf6"), ("b", None)],
        [("gr\ufffd\ufffde", b"\xf6"), ("b", None)],
        [("after", b"\xf6"), ("b", None)],
    ]
    assert all(type(record.value) is bytes and type(record.headers[0][1]) is bytes for record in records)


@pytest.mark.parametrize(
    "header", [("", None), ("", b""), ("name", b"value"), ("größe", b"x" * 40), ("\N{CAMERA}", b"x")]
)
def test_headers_take_no_more_memory_than_is_counted(header: tuple[str, bytes | None]) -> None:
    builder = DefaultRecordBatchBuilder(2, 0, False, -1, -1, -1, 1 << 20)
    builder.append(0, timestamp=0, key=b"cam", value=b"x" * 1_000, headers=[header] * 20_000)
    batch = DefaultRecordBatch(bytes(builder.build()))
    tracemalloc.start()
    try:
        (record,) = batch
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert taken < bytes_of(record) < 4 * taken
