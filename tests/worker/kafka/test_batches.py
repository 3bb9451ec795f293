"""Batches that no client can read, or that nobody should: what is behind them is read all the same."""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from kafka import KafkaProducer, TopicPartition
from kafka.consumer.fetcher import Fetcher
from kafka.record import MemoryRecords
from kafka.record.default_records import DefaultRecordBatchBuilder
from kafka.record.legacy_records import LegacyRecordBatchBuilder
from kafka.record.util import calc_crc32c

from schemas.config import Kafka
from schemas.errors import ConfigError
from worker.kafka.batches import PassedOver, Unreadable, pass_over_unreadable
from worker.kafka.records import MAX_HEADERS, forgive_header_names
from worker.kafka.unpack import MAX_UNPACKED, bound_unpacking

WHERE = TopicPartition("frames", 3)
ZEROS = b"\0" * (MAX_UNPACKED + 1)
Read = Callable[..., tuple[list[Any], int]]
Pack = Callable[..., bytearray]


@pytest.fixture(autouse=True)
def bounded() -> None:
    forgive_header_names()
    bound_unpacking()


@pytest.fixture
def read() -> Read:
    """What a poll makes of bytes from the broker, and where the next fetch begins."""
    consumer = SimpleNamespace(_fetcher=SimpleNamespace())
    pass_over_unreadable(consumer)

    def take(content: bytes, at: int = 0) -> tuple[list[Any], int]:
        part = consumer._fetcher.PartitionRecords(at, WHERE, MemoryRecords(content))
        found: list[Any] = []
        while taken := part.take(2) if part else []:
            found += taken
        return [r.value.reason if isinstance(r.value, Unreadable) else r.offset for r in found], part.next_fetch_offset

    return take


def pack(base: int, values: list[bytes], codec: int = 0, headers: int = 0) -> bytearray:
    """A batch as it is in a topic."""
    builder = DefaultRecordBatchBuilder(2, codec, False, -1, -1, -1, 1 << 30)
    for offset, value in enumerate(values):
        assert builder.append(offset, timestamp=0, key=b"cam", value=value, headers=[("", b"")] * headers)
    content = bytearray(builder.build())
    content[:8] = base.to_bytes(8, "big")  # not covered by the checksum: brokers write it
    return content


@contextlib.contextmanager
def packing(settings: Kafka) -> Iterator[Callable[..., None]]:
    """Sends records of one key to partition 0, as one gzip batch; or as one whose bytes are no gzip."""
    arguments = {"max_request_size": 1 << 30, "batch_size": 1 << 30, "linger_ms": 60_000}  # until the flush
    producer = KafkaProducer(bootstrap_servers=settings.bootstrap, compression_type="gzip", **arguments)

    def send(
        values: list[bytes], broken: bool = False, partition: int = 0, topic: str = settings.topics.frames
    ) -> None:
        with pytest.MonkeyPatch.context() as changed:
            if broken:
                changed.setattr("kafka.record.default_records.gzip_encode", lambda content: b"no gzip")
            futures = [producer.send(topic, key=b"cam", value=v, partition=partition) for v in values]
            producer.flush()
            assert len({future.get(timeout=60).offset for future in futures}) == len(values)

    yield send
    producer.close()


def packed_as(monkeypatch: pytest.MonkeyPatch, base: int, what: Callable[[bytes], bytes]) -> bytearray:
    with monkeypatch.context() as changed:
        changed.setattr("kafka.record.default_records.gzip_encode", what)
        return pack(base, [b"x" * 1_000] * 3, codec=1)


@pytest.mark.parametrize(("codec", "library"), [(1, "gzip"), (2, "snappy"), (3, "lz4.frame"), (4, "zstandard")])
def test_a_batch_that_becomes_too_large_is_passed_over(read: Read, codec: int, library: str) -> None:
    pytest.importorskip(library)
    good, bomb = pack(0, [b"a" * 999, b"b" * 999], codec), pack(2, [b"x", ZEROS, b"y"], codec)
    found, following = read(bytes(good + bomb + pack(5, [b"c"])))
    assert found[:2] + found[3:] == [0, 1, 5]
    assert found[2] == "offsets 2 to 4 of frames/3 cannot be read: a compressed batch becomes more than 64 MiB"
    assert following == 6


def test_snappy_blocks_of_other_clients(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    snappy = pytest.importorskip("snappy")
    with monkeypatch.context() as changed:
        changed.setattr("kafka.record.default_records.snappy_encode", snappy.compress)
        plain, bomb = pack(0, [b"a" * 999], codec=2), pack(1, [ZEROS], codec=2)
    found, _ = read(bytes(plain + bomb))
    assert found[0] == 0
    assert "more than 64 MiB" in found[1]


def test_a_large_batch_within_the_limit_is_read(read: Read) -> None:
    assert read(bytes(pack(0, [ZEROS[: MAX_UNPACKED // 2], ZEROS[: MAX_UNPACKED // 4]], codec=1))) == ([0, 1], 2)


def test_old_batches_are_held_to_the_limit_too(read: Read) -> None:
    builder = LegacyRecordBatchBuilder(1, 1, 1 << 30)
    builder.append(0, timestamp=0, key=b"cam", value=ZEROS)
    found, following = read(bytes(builder.build() + pack(1, [b"a"])))
    assert "more than 64 MiB" in found[0]
    assert (found[1:], following) == ([1], 2)


def test_headers_without_end_are_not_unpacked(read: Read) -> None:
    found, _ = read(bytes(pack(0, [b"a"], 1, MAX_HEADERS) + pack(1, [b"a"], 1, MAX_HEADERS + 1) + pack(2, [b"a"])))
    assert found[::2] == [0, 2]
    assert "1001 headers" in found[1]


def test_what_cannot_be_unpacked_is_passed_over(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = packed_as(monkeypatch, 1, lambda content: b"no gzip")
    found, following = read(bytes(pack(0, [b"a"]) + broken + pack(4, [b"b"])))
    assert found[0] == 0
    assert found[1].startswith("offsets 1 to 3 of frames/3 cannot be read: ")
    assert (found[2:], following) == ([4], 5)
    assert read(bytes(broken), at=2) == ([found[1].replace("offsets 1", "offsets 2")], 4)


def test_records_before_the_damage_are_read(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = packed_as(monkeypatch, 10, lambda content: gzip.compress(content[:1_500]))
    found, following = read(bytes(cut + pack(13, [b"b"])), at=10)
    assert found[0] == 10
    assert found[1].startswith("offsets 11 to 12 of")
    assert (found[2:], following) == ([13], 14)


def test_a_wrong_checksum_is_asked_for_again_and_then_passed_over(read: Read) -> None:
    good, damaged, after = pack(0, [b"a"]), pack(1, [b"b"] * 3), pack(4, [b"c"])
    damaged[-1] ^= 1
    content = bytes(good + damaged + after)
    assert read(content) == ([0], 1)
    assert read(content[len(good) :], at=1) == (["offsets 1 to 3 of frames/3 cannot be read: its checksum is wrong"], 4)
    assert read(bytes(pack(1, [b"b"] * 3) + after), at=1) == ([1, 2, 3, 4], 5)  # had it come sound


@pytest.mark.parametrize("place", [8, 11, 16, 23, 25])  # length, format, last offset
def test_a_damaged_header_is_left_by_single_offsets(read: Read, place: int) -> None:
    damaged = pack(1, [b"b"] * 3)
    damaged[place] ^= 0x85
    at, reasons = 1, []
    for _ in range(20):
        content = bytes((damaged if at < 4 else bytearray()) + pack(4, [b"c"]))
        if place in (8, 11) and not MemoryRecords(content).has_next():
            return  # The client takes it for an answer that was cut off.
        found, following = read(content, at)
        assert following >= at
        if following > at and at >= 4:
            assert (found, following) == ([4], 5)
            break
        assert following <= 4
        reasons += found
        at = following
    else:
        pytest.fail("stuck")
    assert len(reasons) in (1, 3)


def test_a_codec_that_is_missing_here_is_no_damage(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(pack(0, [b"a" * 999], codec=1))
    monkeypatch.setattr("kafka.codec.has_gzip", lambda: False)
    with pytest.raises(ConfigError, match=r"topic frames .* gzip .* pip install"):
        read(content)


def test_a_codec_that_nobody_knows_is_damage(read: Read) -> None:
    strange = pack(1, [b"a" * 999] * 2, codec=1)
    strange[22] = 7  # attributes
    strange[17:21] = calc_crc32c(bytes(strange[21:])).to_bytes(4, "big")
    found, following = read(bytes(pack(0, [b"a"]) + strange + pack(3, [b"b"])))
    assert found[0] == 0
    assert found[1].startswith("offsets 1 to 2 of frames/3 cannot be read: Unrecognized compression type")
    assert (found[2:], following) == ([3], 4)


def test_who_looks_on_is_told_seldom(caplog: pytest.LogCaptureFixture) -> None:
    passed_over = PassedOver()
    values = [b"a", Unreadable("offsets 1 to 3", 3), b"b", *(Unreadable(f"offset {n}") for n in range(5, 11)), b"c"]
    records = [SimpleNamespace(value=value) for value in values]
    assert [record.value for record in passed_over.readable(records)] == [b"a", b"b", b"c"]
    assert [record.getMessage() for record in caplog.records] == [
        "3 records passed over so far; newest: offsets 1 to 3",
        "4 records passed over so far; newest: offset 5",
        "6 records passed over so far; newest: offset 7",
    ]


def test_the_client_alone_would_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once this fails, `pass_over_unreadable` can go."""
    part = Fetcher.PartitionRecords(0, WHERE, MemoryRecords(bytes(packed_as(monkeypatch, 0, lambda c: b"no gzip"))))
    with pytest.raises(OSError, match="gzip"):
        part.take()
