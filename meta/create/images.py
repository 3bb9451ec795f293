"""The images that a bundle is made with: a folder per class, a flat folder without labels, or an .npz file."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from schemas.bundle import Preprocess
from schemas.errors import DataError, FrameError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LEAST_IMAGES, LEAST_PER_CLASS = 100, 5
MOST_BYTES = 1 << 30  # of decoded pixels
SHARES = {"generator": 0.6, "calibration": 0.2, "measurement": 0.2}
Pixels = npt.NDArray[np.uint8]
Decode = Callable[[bytes, Preprocess], Pixels]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Images:
    """Images uint8 (N, ch, h, w), and labels int64 (N,); None without labels."""

    images: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: Tensor) -> Images:
        return Images(self.images[index], None if self.labels is None else self.labels[index])


def read_labels(path: Path | None, data: Path) -> list[str]:
    """The labels, in the order of the network's outputs: the file's lines, or without a file the folders of `data`.

    Raises DataError.
    """
    if path is None:
        labels = [] if data.suffix == ".npz" else [folder.name for folder in _class_folders(data)]
        if len(labels) < 2:
            raise DataError(f"{data} has no folder per class to take labels from; name them with --labels")
        if odd := [label for label in labels if "\n" in label or not _is_text(label)]:
            raise DataError(f"{data}: folder {odd[0]!r} is no line of text in UTF-8, as a label must be; rename it")
        return labels
    try:
        labels = path.read_text(encoding="utf-8-sig").splitlines()  # -sig: editors on Windows write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read labels {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(labels) < 2 or not all(label.strip() for label in labels):
        raise DataError(f"labels {path}: one label a line is needed, two or more, none of them empty")
    if len(set(labels)) != len(labels):
        raise DataError(f"labels {path}: a label stands there twice")
    return labels


def _is_text(name: str) -> bool:
    """Whether a file name could be decoded completely."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def image_files(data: Path, labels: list[str]) -> tuple[list[Path], list[int] | None]:
    """The image files under `data`, sorted, and their classes; None for a flat folder. Raises DataError."""
    folders = _class_folders(data)
    if not folders:
        return [path for path in sorted(data.iterdir()) if path.suffix.lower() in SUFFIXES], None
    number = {label: i for i, label in enumerate(labels)}
    if unknown := [folder.name for folder in folders if folder.name not in number]:
        raise DataError(
            f"{data}: folder {unknown[0]!r} is none of the {len(labels)} labels; folders are named by label"
        )
    paths, classes = [], []
    for folder in folders:
        found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
        paths += found
        classes += [number[folder.name]] * len(found)
    return paths, classes


def _class_folders(data: Path) -> list[Path]:
    """The folders in `data`, sorted by name, without hidden ones. Raises DataError."""
    if not data.is_dir():
        raise DataError(f"{data} is no folder of images and no .npz file")
    return sorted(child for child in data.iterdir() if child.is_dir() and not child.name.startswith("."))


def common_size(paths: list[Path]) -> tuple[int, int]:
    """The common width and height of all image files. Raises DataError if they differ."""
    sizes = {size for size, _ in _looked_at(paths)}
    if not sizes:
        raise DataError(f"none of the {len(paths)} images can be read, first {paths[0]}")
    if len(sizes) != 1:
        raise DataError(f"the images have {len(sizes)} different sizes; say --size WxH, that of the model's training")
    return sizes.pop()


def common_mode(paths: list[Path]) -> Literal["L", "RGB"]:
    """L if all image files are grey, else RGB."""
    return "L" if all(mode.startswith(("L", "1", "I", "F")) for _, mode in _looked_at(paths)) else "RGB"


def _looked_at(paths: list[Path]) -> Iterator[tuple[tuple[int, int], str]]:
    """Size and mode of each readable image file."""
    for path in paths:
        # Pillow can raise anything for a bad file; it is reported when it is decoded.
        with contextlib.suppress(Exception), Image.open(path) as image:
            yield image.size, image.mode


def read_files(
    paths: list[Path],
    classes: list[int] | None,
    preprocess: Preprocess,
    decode: Decode,
    limit: int,
    seed: int,
    say: Say,
) -> Images:
    """Decode and resize image files as a worker does, at most `limit` of them, drawn by `seed`. Raises DataError."""
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
    limit = min(limit, MOST_BYTES // (preprocess.channels * preprocess.height * preprocess.width))
    if len(order) > limit:
        say(f"data: {limit} of {len(order)} images are used; --max-images sets how many, up to a gigabyte of pixels")
    pixels, kept, bad = [], [], []
    for i in sorted(order[:limit]):
        try:
            pixels.append(decode(paths[i].read_bytes(), preprocess))
            kept.append(i)
        except (OSError, FrameError) as error:
            bad.append(f"{paths[i]} ({error})")
    if bad:
        say(f"data: {len(bad)} files are left out, first {bad[0]}")
    if not pixels:
        raise DataError(f"no image can be read; files must end with {', '.join(SUFFIXES)}")
    labels = None if classes is None else torch.tensor([classes[i] for i in kept])
    return Images(as_tensor(np.stack(pixels)), labels)


def read_npz(path: Path, limit: int, seed: int) -> Images:
    """`images` uint8 (N, h, w) or (N, h, w, 3) and optional `labels` (N,), at most `limit`. Raises DataError."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            images = content["images"]
            labels = content.get("labels")
    except Exception as error:  # NumPy and zipfile raise anything for a damaged file, such as BadZipFile.
        raise DataError(f"{path}: an .npz with the arrays 'images' and 'labels' is needed: {error}") from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)):
        raise DataError(f"{path}: 'images' must be uint8 (N, h, w) or (N, h, w, 3), not {images.dtype} {images.shape}")
    if not images.size:
        raise DataError(f"{path}: 'images' is empty: {images.shape}")
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise DataError(f"{path}: 'labels' must be whole numbers, one for each of the {len(images)} images")
    limit = min(limit, max(1, MOST_BYTES // max(1, images[:1].nbytes)))
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:limit].sort().values.numpy()
    as_labels = None if labels is None else torch.from_numpy(labels[chosen].astype(np.int64))
    return Images(as_tensor(images[chosen]), as_labels)


def as_tensor(pixels: Pixels) -> Tensor:
    """Pixels uint8 (N, h, w) or (N, h, w, ch) as a contiguous tensor (N, ch, h, w), copied only if necessary."""
    tensor = torch.from_numpy(np.ascontiguousarray(pixels))
    return tensor.unsqueeze(1) if tensor.dim() == 3 else tensor.permute(0, 3, 1, 2).contiguous()


def without_duplicates(images: Images, say: Say) -> Images:
    """Remove duplicates: the same image must not be in two parts."""
    first: dict[bytes, int] = {}
    for i, image in enumerate(images.images):
        first.setdefault(hashlib.sha256(image.numpy().tobytes()).digest(), i)
    if len(first) < len(images):
        say(f"data: {len(images) - len(first)} images stand there more than once and are used once")
    return images.take(torch.tensor(sorted(first.values())))


def split(images: Images, classes: int, seed: int, say: Say, by_class: bool = True) -> dict[str, Images]:
    """Divide images into three disjoint parts, named as in SHARES; with `by_class` each has every class that occurs.

    Parts are shuffled, because some of their users take the first images only. Raises DataError for too few images.
    """
    if images.labels is None:
        raise DataError("images must be labelled before they are divided")
    if int(images.labels.min()) < 0 or int(images.labels.max()) >= classes:
        raise DataError(f"a label of the images is outside of 0 to {classes - 1}, which --labels names")
    counts = torch.bincount(images.labels, minlength=classes)
    few = [int(c) for c in counts.nonzero().flatten() if by_class and counts[c] < LEAST_PER_CLASS]
    if len(images) < LEAST_IMAGES or few:
        where = f"class {few[0]} has {int(counts[few[0]])}" if few else f"there are {len(images)}"
        raise DataError(
            f"too few images: {where}; {LEAST_IMAGES} are needed in all, and {LEAST_PER_CLASS} of each class that is "
            "shown; some thousand make good estimates"
        )
    if by_class and (absent := int((counts == 0).sum())):
        say(f"data: {absent} of {classes} classes have no image, so nothing is known of how they fare")
    random = torch.Generator().manual_seed(seed)
    groups = [torch.nonzero(images.labels == c).flatten() for c in counts.nonzero()] if by_class else []
    parts: dict[str, list[Tensor]] = {name: [] for name in SHARES}
    for group in groups or [torch.arange(len(images))]:
        shuffled = group[torch.randperm(len(group), generator=random)]
        own = [max(1, round(SHARES[name] * len(group))) for name in ("calibration", "measurement")]
        for name, index in zip(SHARES, shuffled.split([len(group) - sum(own), *own]), strict=True):
            parts[name].append(index)
    return {name: images.take(_shuffled(torch.cat(index), random)) for name, index in parts.items()}


def _shuffled(index: Tensor, random: torch.Generator) -> Tensor:
    return index[torch.randperm(len(index), generator=random)]
