"""The data sets of the benchmark, and their corrupted images, which are computed once and kept in the cache folder."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from meta import data
from meta.benchmark.corruptions import corrupt
from meta.data import LabelledImages
from schemas.errors import DataError

CIFAR10_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_VARIABLE = "DRIFTKEEL_CIFAR10"
CLEAN = "clean"
CORRUPTIONS_VERSION = 1  # part of names in the cache: increase it with every change of the corruptions


class DataConfig(BaseModel):
    """Where frames come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["fashion-mnist", "cifar10", "cifar10-c", "image-folder"]
    path: Path | None = Field(
        None,
        description="cifar10: folder of its binary version, or of train.npz and test.npz (or $DRIFTKEEL_CIFAR10); "
        "cifar10-c: folder of the .npy files; image-folder: folder with train/ and test/, one folder per class in each",
    )
    train: Path | None = Field(
        None,
        description="cifar10-c, which has test images alone: folder of CIFAR-10 as the kind cifar10 has it, for "
        "training and tuning (or $DRIFTKEEL_CIFAR10)",
    )
    size: int = Field(32, ge=8, le=512, description="image-folder: side to which frames are resized")

    @model_validator(mode="after")
    def _train_is_needed(self) -> DataConfig:
        if self.train is not None and self.kind != "cifar10-c":
            raise ValueError(f"train is for the kind cifar10-c; {self.kind} has training images of its own")
        return self

    def content(self) -> dict[str, Any]:
        """The options that results depend on. Unused ones are left out, so that results from before them stay valid."""
        return self.model_dump(mode="json", exclude={"train"} if self.train is None else set())


@dataclass(frozen=True)
class DataSet:
    """Images for training and testing; `ready` (shift, severity) returns corrupted images that the data set has."""

    name: str
    labels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Callable[[], LabelledImages]
    test: Callable[[], LabelledImages]
    ready: Callable[[str, int], np.ndarray] | None = None

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return len(self.mean)


def open_dataset(name: str, config: DataConfig) -> DataSet:
    """The data set of an entry of the plan. Raises DataError if files are missing or invalid."""
    if config.kind == "fashion-mnist":
        parts = {split: lambda split=split: data.fashion_mnist(split) for split in ("train", "test")}
        return DataSet(name, data.LABELS, (data.MEAN,), (data.STD,), parts["train"], parts["test"])
    if config.kind == "image-folder":
        return _image_folder(name, config)
    return _cifar10(name, config)


def _cifar10(name: str, config: DataConfig) -> DataSet:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    option, given = ("path", config.path) if config.kind == "cifar10" else ("train", config.train)
    variable = os.environ.get(CIFAR10_VARIABLE)
    folder = given or (Path(variable) if variable else None)

    def read(split: str) -> LabelledImages:
        if folder is None:
            raise DataError(f"data {name!r}: give the folder of CIFAR-10 as {option}, or in ${CIFAR10_VARIABLE}")
        return read_cifar10(folder, split)

    if config.kind == "cifar10":
        return DataSet(name, CIFAR10_LABELS, mean, std, lambda: read("train"), lambda: read("test"))
    ready = Cifar10C(config.path or Path("CIFAR-10-C"))
    return DataSet(name, CIFAR10_LABELS, mean, std, lambda: read("train"), ready.unshifted, ready.shifted)


def read_cifar10(folder: Path, split: str) -> LabelledImages:
    """The `train` or `test` split: of the published binary version (`cifar-10-batches-bin`), else an .npz file.

    The version for Python is not read, since unpickling can run code. Raises DataError.
    """
    batches = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    archive = folder / f"{split}.npz"
    if not (folder / batches[0]).exists():
        if not archive.exists():
            raise DataError(f"{folder} has neither {batches[0]}, of CIFAR-10's binary version, nor {archive.name}")
        return read_archive(archive)
    parts = [_binary_batch(folder / name) for name in batches]
    return LabelledImages(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _binary_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 32, 32, 3) and labels int64 (N,), from records of a label byte and three colour planes."""
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; CIFAR-10 has five batches and a test batch"
        ) from error
    if not len(content) or len(content) % (1 + 3 * 32 * 32):
        raise DataError(f"{path} is no batch of CIFAR-10's binary version: it has {len(content)} bytes")
    rows = content.reshape(-1, 1 + 3 * 32 * 32)
    return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0].astype(np.int64)


def read_archive(path: Path) -> LabelledImages:
    """Labelled images from an .npz file of one of two kinds. Raises DataError.

    Either `images` uint8 (N, h, w, 3) and `labels` (N,), or `jpeg` uint8, all JPEG files concatenated, with `offset`
    int64 (N,) or (N + 1,) and `label` uint8 (N,).
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = ("images", "labels") if "images" in archive else ("jpeg", "offset", "label")
            arrays = [archive[name] for name in names]
    except Exception as error:  # NumPy and zipfile raise anything for a damaged file, such as BadZipFile.
        raise DataError(
            f"{path} is no archive of images and labels, nor of JPEG frames with jpeg, offset and label: {error}"
        ) from error
    if len(arrays) == 2:
        return _whole(*arrays, path)
    joined, offset, label = arrays
    if len(offset) not in (len(label), len(label) + 1) or offset.min() < 0 or offset.max() > len(joined):
        raise DataError(f"{path}: offsets and labels do not fit the frames")
    ends = [*offset[1:], len(joined)][: len(label)]
    files = (joined[start:end].tobytes() for start, end in zip(offset, ends, strict=False))
    images = np.stack([_decoded(file, str(path), "RGB", None) for file in files])
    return LabelledImages(images, label.astype(np.int64))


def _whole(images: np.ndarray, labels: np.ndarray, path: Path) -> LabelledImages:
    if images.dtype != np.uint8 or images.shape[3:] != (3,) or labels.shape != images.shape[:1]:
        raise DataError(
            f"{path} has images {images.dtype} {images.shape} with labels {labels.shape}; "
            "it takes uint8 (N, h, w, 3) with (N,)"
        )
    return LabelledImages(images, labels.astype(np.int64))


class Cifar10C:
    """The published folder of CIFAR-10-C: an array (50,000, 32, 32, 3) per corruption, with 10,000 per severity."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def shifted(self, shift: str, severity: int) -> np.ndarray:
        """Test images under a published corruption, uint8 (N, 32, 32, 3); severity 1 to 5."""
        images, count = self._array(shift), len(self._labels())
        if images.dtype != np.uint8 or images.shape != (count, 32, 32, 3):
            raise self._odd(
                shift, f"{images.dtype} {images.shape}", f"uint8 ({count}, 32, 32, 3) for its {count} labels"
            )
        each = count // 5
        return images[(severity - 1) * each : severity * each]

    def unshifted(self) -> LabelledImages:
        """The labels, with images of brightness at severity 1, as the folder has no clean ones."""
        labels = self._labels()
        return LabelledImages(self.shifted("brightness", 1), labels[: len(labels) // 5].astype(np.int64))

    def _labels(self) -> np.ndarray:
        labels = self._array("labels")
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) % 5:
            raise self._odd(
                "labels", f"{labels.dtype} {labels.shape}", "uint8 (50000,), those of every severity in turn"
            )
        if labels.max() >= len(CIFAR10_LABELS):
            raise self._odd("labels", f"labels up to {labels.max()}", "ten classes; CIFAR-100-C is not read")
        return labels

    def _odd(self, name: str, found: str, expected: str) -> DataError:
        return DataError(f"{self.folder / name}.npy has {found}; CIFAR-10-C has {expected}")

    def _array(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # NumPy raises anything for a damaged header, such as EOFError.
            raise DataError(f"{path} cannot be read: {error}; the benchmark expects CIFAR-10-C as published") from error


def _image_folder(name: str, config: DataConfig) -> DataSet:
    if config.path is None:
        raise DataError(f"data {name!r}: an image-folder needs a path")
    root = config.path
    classes = tuple(sorted(entry.name for entry in _shown(root / "test") if entry.is_dir()))
    if len(classes) < 2:
        raise DataError(
            f"{root / 'test'}: expected one folder per class, and at least two; an image-folder has such folders in "
            "train/ and in test/"
        )

    def read(split: str) -> LabelledImages:
        images, labels = [], []
        for index, label in enumerate(classes):
            paths = [path for path in _shown(root / split / label) if path.is_file()]
            if not paths:
                raise DataError(f"{root / split / label} has no images, and test/ has that class")
            images += [_decoded(path.read_bytes(), str(path), "RGB", config.size) for path in paths]
            labels += [index] * len(paths)
        order = np.random.default_rng(0).permutation(len(labels))
        return LabelledImages(np.stack(images)[order], np.array(labels, np.int64)[order])

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return DataSet(name, classes, mean, std, lambda: read("train"), lambda: read("test"))


def _shown(folder: Path) -> list[Path]:
    """What lies in it, sorted, but for hidden files, which other programs leave there."""
    return sorted(path for path in folder.glob("*") if not path.name.startswith("."))


def _decoded(content: bytes, where: str, mode: str, size: int | None) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP", "BMP")) as image:
            image = image.convert(mode)
            return np.asarray(image if size is None else image.resize((size, size), Image.Resampling.BILINEAR))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where} holds a frame that cannot be decoded: {error}") from error


class Pool:
    """A fixed set of labelled images, clean and corrupted, from which streams draw."""

    def __init__(self, clean: LabelledImages, cache: Path, ready: Callable[[str, int], np.ndarray] | None) -> None:
        self.clean, self.labels, self._ready = clean, clean.labels, ready
        digest = zlib.crc32(np.ascontiguousarray(clean.images).tobytes())
        self._folder = cache / "shifted" / f"{len(clean)}-{digest:08x}-v{CORRUPTIONS_VERSION}"

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, shift: str, severity: int) -> np.ndarray:
        """All images of the pool under a corruption, uint8; computed once and kept on disk."""
        if shift == CLEAN:
            return self.clean.images
        if self._ready is not None:
            return self._ready(shift, severity)[: len(self)]
        path = self._folder / f"{shift}-{severity}.npy"
        if not path.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            with partial.open("wb") as file:
                np.save(file, corrupt(self.clean.images, shift, severity), allow_pickle=False)
            partial.replace(path)
        return np.load(path, mmap_mode="r", allow_pickle=False)
