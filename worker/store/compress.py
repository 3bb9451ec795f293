"""Lossless compression of stored tensors."""

from __future__ import annotations

import struct
import zlib
from typing import Literal

import numpy as np
import numpy.typing as npt

Compression = Literal["none", "deflate"]
_MAGIC = b"DKZ1"  # No safetensors file begins so: these bytes would announce a header of 800 MB.
_WIDTH = 4
_HEAD, _END = b"\x78\x01", b"\x01\x00\x00\xff\xff"  # of a zlib stream: its settings, and an empty last block
_BLOCK = 65_535  # the most bytes of a stored block
_NOISE, _RICH = (
    7.5,
    5.5,
)  # bits per byte: more than the first is stored as it is; less than the second has repetitions
_SAMPLE = 4  # one of so many bytes is counted


def pack(content: bytes, compression: Compression) -> bytes:
    """`content`, a safetensors file, as it is stored.

    First, bytes of equal significance are put together (as the `shuffle` filter of HDF5 does), because signs and
    exponents of neighbouring numbers resemble each other, while mantissas are noise. Noise is not compressed: that
    would take most of the time and save nothing.
    """
    if compression == "none":
        return content
    whole = len(content) // _WIDTH * _WIDTH
    planes = np.frombuffer(content, np.uint8, whole).reshape(-1, _WIDTH).T
    parts = [*map(np.ascontiguousarray, planes), np.frombuffer(content, np.uint8, offset=whole)] if content else []
    check = 1
    for part in parts:
        check = zlib.adler32(part.data, check)
    return b"".join((_MAGIC, _HEAD, *map(_blocks, parts), _END, check.to_bytes(4)))


def _blocks(part: npt.NDArray[np.uint8]) -> bytes:
    """The part as blocks of a deflate stream, none of them the last, up to a whole byte."""
    bits = _entropy(part)
    if bits > _NOISE:
        cuts = [part[i : i + _BLOCK].tobytes() for i in range(0, len(part), _BLOCK)]
        return b"".join(struct.pack("<BHH", 0, len(cut), len(cut) ^ 0xFFFF) + cut for cut in cuts)
    strategy = zlib.Z_HUFFMAN_ONLY if bits > _RICH else zlib.Z_DEFAULT_STRATEGY
    deflater = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, strategy)
    return deflater.compress(part.data) + deflater.flush(zlib.Z_SYNC_FLUSH)


def _entropy(part: npt.NDArray[np.uint8]) -> float:
    """The entropy of single bytes, in bits per byte."""
    some = part[:: _SAMPLE if len(part) > _SAMPLE << 10 else 1]
    counts = np.bincount(some)
    shares = counts[counts > 0] / max(1, len(some))
    return float(-(shares * np.log2(shares)).sum())


def unpack(content: bytes, max_bytes: int) -> bytes:
    """The content that was packed. What is damaged, or unpacks to more than `max_bytes`, is returned as it is."""
    if not content.startswith(_MAGIC):
        return content
    inflater = zlib.decompressobj()
    try:
        found = inflater.decompress(content[len(_MAGIC) :], max_bytes)
    except zlib.error:
        return content
    if not inflater.eof:
        return content
    whole = len(found) // _WIDTH * _WIDTH
    return np.frombuffer(found, np.uint8, whole).reshape(_WIDTH, -1).T.tobytes() + found[whole:]
