"""Videos made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt


def make_video(path: Path, frames: int, fps: int, size: tuple[int, int] = (64, 48)) -> Path:
    """A video (width, height) that grows lighter from frame to frame."""
    width, height = size
    pictures = [np.full((height, width, 3), 20 + 200 * i // max(1, frames - 1), np.uint8) for i in range(frames)]
    return write_video(path, pictures, fps)


def write_video(path: Path, pictures: Sequence[npt.NDArray[np.uint8]], fps: int) -> Path:
    """Pictures, uint8 (h, w, 3) with even sides, as an MPEG-4 video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for pixels in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path
