"""Stored tensors in fewer bytes, without loss."""

from __future__ import annotations

import zlib
from typing import Literal

import numpy as np

Compression = Literal["none", "deflate"]
_MAGIC = b"DKZ1"  # As the first bytes of a safetensors file it would announce a header of 800 MB.
_WIDTH = 4


def pack(content: bytes, compression: Compression) -> bytes:
    """`content`, a safetensors file, for the store.

    Bytes of equal significance are put together first: signs and exponents of neighbouring numbers resemble each
    other, their mantissas are noise (the `shuffle` filter of HDF5).
    """
    if compression == "none":
        return content
    whole = len(content) // _WIDTH * _WIDTH
    planes = np.frombuffer(content, np.uint8, whole).reshape(-1, _WIDTH).T.tobytes()
    return _MAGIC + zlib.compress(planes + content[whole:], 1)


def unpack(content: bytes, max_bytes: int) -> bytes:
    """What `pack` got. Content that is damaged or unpacks to more than `max_bytes` comes back as it is."""
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
