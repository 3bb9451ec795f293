"""How much work a picture is, from its header alone."""

import io
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from tests.worker.decode.test_image import png_header, scans
from worker.decode.weigh import HEAVY, weight


def encoded(format: str, size: tuple[int, int], **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA" if options.pop("alpha", False) else "RGB", size).save(buffer, format, **options)
    return buffer.getvalue()


@given(
    width=st.integers(1, 2_000),
    height=st.integers(1, 2_000),
    kind=st.sampled_from(
        [("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}), ("WEBP", {"exif": b"Exif\0\0", "quality": 1})]
    ),
)
def test_of_what_does_not_shrink_all_pixels_count(width: int, height: int, kind: tuple[str, dict[str, object]]) -> None:
    content = encoded(kind[0], (width, height), **kind[1])
    assert weight(content) == max(width * height, len(content))


@given(width=st.integers(1, 2_000), height=st.integers(1, 2_000), exif=st.binary(max_size=200))
@example(width=640, height=480, exif=encoded("JPEG", (16, 16)))  # a thumbnail
def test_a_jpeg_is_lighter(width: int, height: int, exif: bytes) -> None:
    content = encoded("JPEG", (width, height), exif=b"Exif\0\0" + exif)
    assert weight(content) == max(width * height // 4, len(content))


def test_each_scan_counts() -> None:
    assert weight(scans(60)) >= 6 * weight(scans(1))


def test_many_bytes_are_heavy_whatever_they_are() -> None:
    assert weight(encoded("PNG", (9, 9)) + bytes(5_000_000)) > 5_000_000
    assert weight(b"junk") == 4
    assert weight(b"") == 0


@pytest.mark.parametrize(
    "content",
    [
        png_header(28, 28)[:20],
        png_header(28, 28) + png_header(8_000, 3_000)[8:],
        png_header(28, 28) + b"iCCP" * 2,
        encoded("JPEG", (9, 9))[:30],
        b"\xff\xd8\xff\xff" + encoded("JPEG", (9, 9))[3:],
        b"RIFF....WEBPVP8 ",
        b"RIFF....WEBP" + b"odd " * 9,
    ],
)
def test_what_hides_its_size_is_heavy(content: bytes) -> None:
    assert weight(content) >= HEAVY


@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.data())
def test_no_bytes_make_it_fail(format: str, data: st.DataObject) -> None:
    content = bytearray(encoded(format, (40, 30)))
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    assert weight(bytes(content[: data.draw(st.integers(0, len(content)))])) >= 0


def test_segments_without_end_take_no_time() -> None:
    content = b"\xff\xd8\xff\xe0\x00\x02" + b"\xff\xe0\x00\x02" * (2 << 20)
    began = time.process_time()
    assert weight(content) == HEAVY
    assert time.process_time() - began < 0.05
