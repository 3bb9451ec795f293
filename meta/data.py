"""Fashion-MNIST, the example's data set.

It is read from the cache folder, else from Debian's package `dataset-fashion-mnist`, else from its public address. The
sizes and SHA-256 sums of the four uncompressed files are checked.
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from schemas.errors import DataError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
HOME = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion"
LABELS = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
MEAN, STD = 0.2860, 0.3530


@dataclass(frozen=True)
class _File:
    name: str
    size: int
    sha256: str


_FILES = {
    ("train", "images"): _File(
        "train-images-idx3-ubyte.gz", 47_040_016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
    ),
    ("train", "labels"): _File(
        "train-labels-idx1-ubyte.gz", 60_008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
    ),
    ("test", "images"): _File(
        "t10k-images-idx3-ubyte.gz", 7_840_016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
    ),
    ("test", "labels"): _File(
        "t10k-labels-idx1-ubyte.gz", 10_008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
    ),
}


@dataclass(frozen=True)
class LabelledImages:
    """`images` uint8 (N, h, w) or (N, h, w, 3), `labels` int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> LabelledImages:
        """The images from `start` to before `stop`."""
        return LabelledImages(self.images[start:stop], self.labels[start:stop])


def cache_folder() -> Path:
    """`$DRIFTKEEL_CACHE`, else the user's cache folder."""
    base = os.environ.get("DRIFTKEEL_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "driftkeel"


def fashion_mnist(split: str, folders: Sequence[Path] | None = None, home: str = HOME) -> LabelledImages:
    """The `train` (60,000) or `test` (10,000) split.

    Raises DataError, with every place that was tried, if none has a correct copy.
    """
    cache = cache_folder() / "fashion-mnist"
    folders = [cache, DEBIAN] if folders is None else list(folders)
    images = _content(_FILES[split, "images"], folders, cache, home)
    labels = _content(_FILES[split, "labels"], folders, cache, home)
    return LabelledImages(
        np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28),
        np.frombuffer(labels, np.uint8, offset=8).astype(np.int64),
    )


# The division of the 60,000 training images. Demo and results use the 10,000 test images only.
SOURCE_PART = (0, 45_000)
META_PART = (45_000, 56_000)
CALIBRATION_PART = (56_000, 60_000)


def _content(file: _File, folders: Sequence[Path], cache: Path, home: str) -> bytes:
    tried: list[str] = []
    for folder in folders:
        path = folder / file.name
        try:
            return _checked(path.read_bytes(), file)
        except FileNotFoundError:
            tried.append(f"{path} (not there)")
        except (OSError, DataError) as error:
            tried.append(f"{path} ({error})")
    url = f"{home}/{file.name}"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - a constant https address
            packed = answer.read(64 << 20)
        content = _checked(packed, file)
    except (urllib.error.URLError, OSError, ValueError, DataError) as error:
        tried.append(f"{url} ({error})")
        raise DataError(
            f"Fashion-MNIST file {file.name} was not found: tried {'; '.join(tried)}. Either run "
            f"'apt-get install dataset-fashion-mnist' as root, or put the four .gz files into {cache}"
        ) from error
    cache.mkdir(parents=True, exist_ok=True)
    partial = cache / f".{file.name}.{os.getpid()}"
    partial.write_bytes(packed)
    partial.replace(cache / file.name)
    return content


def _checked(packed: bytes, file: _File) -> bytes:
    unpack = zlib.decompressobj(wbits=31)
    try:
        content = unpack.decompress(packed, file.size + 1)
    except zlib.error as error:
        raise DataError(f"not a gzip file: {error}") from error
    if len(content) != file.size or hashlib.sha256(content).hexdigest() != file.sha256:
        raise DataError("size or checksum differs from the published file")
    return content
