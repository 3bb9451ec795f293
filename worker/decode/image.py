"""From hostile bytes to pixels: decode, convert and resize, within limits."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from schemas.bundle import Preprocess
from schemas.config import Frames
from schemas.errors import FrameError
from schemas.frame import Frame, Position

FORMATS = ("JPEG", "PNG", "WEBP")
# MPO is several JPEGs in one file, as phones write for depth or brightness; the first is the picture.
JPEG = ("JPEG", "MPO")
MAX_SCANS = 64  # of a JPEG. Encoders write some ten; for each the decoder goes over the whole picture again.
STRIP = 256  # rows that are converted at a time
Pixels = npt.NDArray[np.uint8]

Image.MAX_IMAGE_PIXELS = None  # `_check_size` has the configured limits.
# Pillow's warnings quote the picture. Python would log each new text and remember it for ever, and senders can make up
# any number of them.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(slots=True)
class DecodedFrame:
    """A frame as the engine takes it. `pixels` is uint8 (h, w) or (h, w, 3).

    `received` is in monotonic seconds, `sent` the record's timestamp in seconds since the epoch. `published`: its
    prediction was sent, and only its update is still to come.
    """

    stream: str
    position: Position
    pixels: Pixels
    event_time: datetime
    received: float
    traceparent: str | None = None
    published: bool = False
    sent: float = 0.0


def decode_frame(frame: Frame, received: float, limits: Frames, preprocess: Preprocess) -> DecodedFrame | FrameError:
    """A frame with its pixels, or the error where it cannot be decoded."""
    try:
        pixels = decode_image(frame.image, limits, preprocess)
    except FrameError as error:
        return error
    return DecodedFrame(
        stream=frame.stream,
        position=frame.position,
        pixels=pixels,
        event_time=frame.event_time,
        received=received,
        traceparent=frame.traceparent,
        sent=frame.sent,
    )


def decode_image(content: bytes, limits: Frames, preprocess: Preprocess) -> Pixels:
    """Pixels in the bundle's mode and size, uint8 (h, w) for L or (h, w, 3) for RGB.

    Raises FrameError with kind not_an_image, animated, too_large or damaged.
    """
    image = open_image(content, limits)
    try:
        if image.format not in JPEG and getattr(image, "n_frames", 1) != 1:
            raise FrameError("animated", "the image has several frames; send one record per frame")
        if image.format in JPEG:
            # Have the decoder shrink by powers of two, as long as that leaves twice the size that is needed.
            image.draft(preprocess.mode, (2 * preprocess.width, 2 * preprocess.height))
        converted = _converted(image, preprocess.mode)
        if converted.size != (preprocess.width, preprocess.height):
            converted = converted.resize((preprocess.width, preprocess.height), Image.Resampling.BILINEAR)
        # np.asarray(image) takes twice as long for a small image.
        shape = (preprocess.height, preprocess.width) + ((3,) if preprocess.mode == "RGB" else ())
        return np.frombuffer(converted.tobytes(), np.uint8).reshape(shape)
    except FrameError:
        raise
    except Exception as error:  # Decoders fail on damaged bytes in ways that no list of exceptions covers.
        raise FrameError("damaged", f"the image cannot be decoded: {error}") from error


def open_image(content: bytes, limits: Frames) -> Image.Image:
    """The image with its header read and its size checked. No pixel is decoded yet.

    Raises FrameError with kind not_an_image, too_large or damaged.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise FrameError("not_an_image", f"the bytes are none of {', '.join(FORMATS)}") from error
    except Exception as error:  # As above.
        raise FrameError("damaged", f"the image header cannot be read: {error}") from error
    _check_size(image, limits)
    # Entropy-coded bytes never look like a marker, so this counts scans, also those of thumbnails.
    if image.format in JPEG and (scans := content.count(b"\xff\xda")) > MAX_SCANS:
        raise FrameError("damaged", f"the JPEG has {scans} scans, more than the {MAX_SCANS} that are decoded")
    return image


def _check_size(image: Image.Image, limits: Frames) -> None:
    width, height = image.size
    if max(width, height) > limits.max_side:
        raise FrameError("too_large", f"{width} x {height} pixels exceed frames.max_side = {limits.max_side}")
    if width * height > limits.max_pixels:
        raise FrameError("too_large", f"{width} x {height} pixels exceed frames.max_pixels = {limits.max_pixels}")


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The upper eight of sixteen bits per pixel. Pillow's own conversion would clip instead of scale.

    In strips, because the numbers in between take eight times the memory of the picture.
    """
    values = np.asarray(image)
    scaled = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), STRIP):
        rows = slice(top, top + STRIP)
        scaled[rows] = (values[rows] / np.float32(257)).clip(0, 255).round()
    return Image.fromarray(scaled)
