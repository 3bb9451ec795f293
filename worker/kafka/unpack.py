"""Limits how much memory a batch of compressed records may take.

kafka-python decompresses a batch as a whole, however large it becomes: 400 KB of gzip can be a gigabyte. These
functions take the place of its own, and give up at a limit.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from types import ModuleType
from typing import Any

from kafka import codec
from kafka.errors import CorruptRecordError
from kafka.record import default_records, legacy_records

MAX_UNPACKED = 64 << 20  # bytes of a batch; senders seldom pack more than one
PIECE = 1 << 20
XERIAL_HEADER = 16  # bytes before the blocks of what Java's snappy writes


def bound_unpacking() -> None:
    """Patch this process. Calling it again does nothing."""
    bounded: dict[str, Callable[[Any], bytes | bytearray]] = {
        "gzip_decode": _gzip,
        "snappy_decode": _snappy,
        "zstd_decode": _zstd,
    }
    if codec.lz4 is not None:
        bounded["lz4_decode"] = _lz4
    modules: tuple[ModuleType, ...] = (codec, default_records, legacy_records)
    for module in modules:
        for name, function in bounded.items():
            if hasattr(module, name):
                setattr(module, name, function)


def _gzip(content: Any) -> bytearray:
    return _read(gzip.GzipFile(fileobj=io.BytesIO(content)))


def _zstd(content: bytes) -> bytearray:
    return _read(codec.zstd.ZstdDecompressor().stream_reader(io.BytesIO(content), read_across_frames=True))


def _lz4(content: bytes) -> bytearray:
    return _read(codec.lz4.LZ4FrameFile(io.BytesIO(content)))


def _read(stream: Any) -> bytearray:
    unpacked = bytearray()
    while piece := stream.read(PIECE):
        unpacked += piece
        _check(len(unpacked))
    return unpacked


def _snappy(content: bytes) -> bytes | bytearray:
    """Every block says how large it becomes, and the decompressor refuses one that becomes anything else."""
    if not codec._detect_xerial_stream(content):
        _check(_declared(content))
        unpacked: bytes = codec.snappy.decompress(content)
        return unpacked
    joined, at = bytearray(), XERIAL_HEADER
    while at < len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        block = content[at + 4 : at + 4 + size]
        _check(len(joined) + _declared(block))
        joined += codec.snappy.decompress(block)
        at += 4 + size
    return joined


def _declared(block: bytes) -> int:
    """The decompressed size of a snappy block: the varint at its beginning."""
    size = 0
    for place, byte in enumerate(block[:5]):
        size |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            break
    return size


def _check(size: int) -> None:
    if size > MAX_UNPACKED:
        raise CorruptRecordError(f"a compressed batch becomes more than {MAX_UNPACKED >> 20} MiB")
