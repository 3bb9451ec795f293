"""How much work it is to decode a picture, estimated from its unchecked header. For scheduling only."""

from __future__ import annotations

import struct

HEAVY = 1 << 62  # weight of a picture whose header does not tell its size
MAX_SEGMENTS = 64  # of a JPEG before its first scan; phones write some ten
FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of the JPEG segments that have the picture's size
SCAN = 0xDA
JPEG_SHARE = 4  # decoders of JPEG shrink while they decode: a quarter of a PNG's time for as many pixels, or less


def weight(content: bytes) -> int:
    """The number of pixels of a PNG that takes as long to decode; at least the number of bytes.

    Bytes alone say little: a kilobyte may hold as many pixels as are allowed. What is in no known format fails at once,
    so it weighs its bytes.
    """
    if content.startswith(b"\xff\xd8\xff"):
        pixels = _jpeg(content)
    elif content.startswith(b"\x89PNG\r\n\x1a\n"):
        pixels = _png(content)
    elif content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        pixels = _webp(content)
    else:
        pixels = 0
    return max(pixels, len(content))


def _jpeg(content: bytes) -> int:
    at, pixels = 2, HEAVY
    for _ in range(MAX_SEGMENTS):
        if at + 9 > len(content) or content[at] != 0xFF:
            break
        marker = content[at + 1]
        if marker == SCAN:
            return pixels * content.count(b"\xff\xda", at) // JPEG_SHARE  # Scans before this are a thumbnail's.
        if marker in FRAME:
            height, width = struct.unpack_from(">HH", content, at + 5)
            pixels = height * width
        at += 2 + struct.unpack_from(">H", content, at + 2)[0]
    return HEAVY


def _png(content: bytes) -> int:
    # A valid picture has at most one colour profile. A kilobyte of one may unpack to a megabyte.
    if content[12:16] != b"IHDR" or len(content) < 24 or content.count(b"IHDR") > 1 or content.count(b"iCCP") > 1:
        return HEAVY
    width, height = struct.unpack_from(">II", content, 16)
    return int(width * height)


def _webp(content: bytes) -> int:
    if len(content) < 30:
        return HEAVY
    kind = content[12:16]
    if kind == b"VP8X":
        width = int.from_bytes(content[24:27], "little") + 1
        height = int.from_bytes(content[27:30], "little") + 1
    elif kind == b"VP8L":
        both = int.from_bytes(content[21:25], "little")
        width, height = (both & 0x3FFF) + 1, (both >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", content, 26))
    else:
        return HEAVY
    return width * height
