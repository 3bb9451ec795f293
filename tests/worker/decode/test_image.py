import io
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from schemas.bundle import Preprocess
from schemas.config import Frames
from schemas.errors import FrameError
from schemas.frame import Frame, Position, parse_frame
from tests.conftest import picture
from worker.decode.image import DecodedFrame, decode_frame, decode_image

LIMITS = Frames()
GREY = Preprocess(mode="L", width=28, height=28, mean=[0.5], std=[0.2])
COLOUR = Preprocess(mode="RGB", width=32, height=24, mean=[0.5] * 3, std=[0.2] * 3)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def animated(format: str) -> bytes:
    buffer = io.BytesIO()
    pictures = [Image.new("RGB", (28, 28), colour) for colour in ("red", "blue")]
    pictures[0].save(buffer, format, save_all=True, append_images=pictures[1:])
    return buffer.getvalue()


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times more."""
    buffer = io.BytesIO()
    Image.new("L", (400, 300), 128).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * count + content[-2:]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_formats(format: str) -> None:
    pixels = decode_image(picture(format=format, mode="RGB"), LIMITS, GREY)
    assert pixels.shape == (28, 28)
    assert pixels.dtype == np.uint8


def test_lossless_pixels_arrive_as_they_are() -> None:
    original = np.random.default_rng(0).integers(0, 255, (28, 28), np.uint8)
    assert np.array_equal(decode_image(encoded(Image.fromarray(original)), LIMITS, GREY), original)


@pytest.mark.parametrize(
    ("mode", "format"),
    [("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG")],
)
@pytest.mark.parametrize("preprocess", [GREY, COLOUR])
def test_modes_are_converted(mode: str, format: str, preprocess: Preprocess) -> None:
    grey = Image.new("RGB", (28, 28), (128, 128, 128)).convert(mode)
    pixels = decode_image(encoded(grey, format), LIMITS, preprocess)
    assert pixels.shape == (preprocess.height, preprocess.width, *([3] if preprocess.mode == "RGB" else []))
    if mode != "1":
        assert abs(pixels.mean() - 128) <= 6  # palettes dither


@pytest.mark.parametrize("value", [0, 257 * 40, 65_535])
def test_sixteen_bits_are_scaled_not_clipped(value: int) -> None:
    image = Image.fromarray(np.full((28, 28), value, np.uint16))
    assert np.all(decode_image(encoded(image), LIMITS, GREY) == value // 257)


def test_palette_with_transparency() -> None:
    image = Image.new("P", (28, 28), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=b"\x00\xff")
    assert decode_image(buffer.getvalue(), LIMITS, COLOUR)[0, 0].tolist() == [0, 255, 0]


def test_sixteen_bits_take_little_more_memory_than_their_pixels() -> None:
    content = encoded(Image.fromarray(np.zeros((4_000, 4_000), np.uint16)))
    tracemalloc.start()  # Counts what numpy takes, not Pillow's own 32 MB.
    decode_image(content, LIMITS, GREY)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100 << 20


def test_of_several_pictures_in_one_jpeg_the_first_counts() -> None:
    buffer = io.BytesIO()
    first, second = (Image.new("RGB", (640, 480), colour) for colour in ("red", "blue"))
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    pixels = decode_image(buffer.getvalue(), LIMITS, COLOUR).astype(int)
    assert pixels.shape == (24, 32, 3)
    assert np.all(pixels[..., 0] > 200)
    assert np.all(pixels[..., 2] < 50)


def test_progressive_jpegs_are_decoded() -> None:
    assert abs(decode_image(scans(2), LIMITS, GREY).mean() - 128) < 2


@pytest.mark.parametrize("size", [(1, 1), (28, 56), (640, 480)])
def test_other_sizes_are_resized(size: tuple[int, int]) -> None:
    assert decode_image(picture(size=size), LIMITS, GREY).shape == (28, 28)
    assert decode_image(picture(size=size, format="JPEG"), LIMITS, COLOUR).shape == (24, 32, 3)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"hello", "not_an_image"),
        (b"\x00" * 1_000, "not_an_image"),
        (animated("GIF"), "not_an_image"),
        (animated("WEBP"), "animated"),
        (animated("PNG"), "animated"),
        (picture(size=(64, 64))[:200], "damaged"),
        (picture(size=(64, 64), format="JPEG")[:400], "damaged"),
        (png_header(30_000, 28), "too_large"),
        (png_header(8_000, 8_000), "too_large"),
        (png_header(28, 28), "damaged"),
        (scans(1_000), "damaged"),
        (png_header(0, 28), "damaged"),
    ],
)
def test_bad_images(content: bytes, kind: str) -> None:
    with pytest.raises(FrameError) as caught:
        decode_image(content, LIMITS, GREY)
    assert caught.value.kind in {kind, "not_an_image"} if content == png_header(0, 28) else caught.value.kind == kind


@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.data())
def test_no_bytes_break_the_decoder(format: str, data: st.DataObject) -> None:
    content = bytearray(picture(format=format))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    try:
        pixels = decode_image(bytes(content[:cut]), LIMITS, GREY)
    except FrameError:
        return
    assert pixels.shape == (28, 28)


def exif_of_nowhere(tags: range) -> bytes:
    """A JPEG whose EXIF places each of its tags behind its end."""
    entries = b"".join(struct.pack("<HHII", tag, 2, 1 << 20, 1 << 20) for tag in tags)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    whole = picture(format="JPEG")
    return whole[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + whole[2:]


READ_ALL = """
import sys
import PIL.TiffImagePlugin as plugin
from tests.worker.decode.test_image import GREY, LIMITS, decode_image, exif_of_nowhere
for first in range(1, 1_000, 100):
    assert decode_image(exif_of_nowhere(range(first, first + 100)), LIMITS, GREY).shape == (28, 28)
print(sorted(map(str, getattr(plugin, "__warningregistry__", {}).keys() - {"version"}))[:3])
"""


def test_nothing_is_said_or_remembered_of_damaged_exif() -> None:
    # In a process of its own, with the warnings as Python has them.
    done = subprocess.run([sys.executable, "-c", READ_ALL], capture_output=True, text=True, timeout=600)
    assert (done.stderr, done.stdout.strip(), done.returncode) == ("", "[]", 0)


def frame(offset: int, content: bytes) -> Frame:
    return parse_frame(Position("frames", 0, offset), b"cam", content, [], 0, 1 << 20, 100)


def test_a_frame_gets_its_pixels_or_its_error() -> None:
    sound = decode_frame(frame(3, picture(3)), 12.5, LIMITS, GREY)
    assert isinstance(sound, DecodedFrame)
    assert (sound.stream, sound.position.offset, sound.received) == ("cam", 3, 12.5)
    assert sound.pixels.shape == (28, 28)
    junk = decode_frame(frame(4, b"junk"), 12.5, LIMITS, GREY)
    assert isinstance(junk, FrameError)
    assert junk.kind == "not_an_image"
