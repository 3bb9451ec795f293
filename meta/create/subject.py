"""The inputs of a bundle, read and checked: a user's network and weights, labels and images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from meta.create.images import (
    LEAST_IMAGES,
    SUFFIXES,
    Decode,
    Images,
    common_mode,
    common_size,
    image_files,
    read_files,
    read_labels,
    read_npz,
    split,
    without_duplicates,
)
from meta.create.measure import BATCH
from meta.create.network import adaptable, built_again, load_weights, read_weights
from meta.create.piecewise import frames_in_pass
from meta.models import build_network
from meta.norms import AdaptableModel
from meta.source import Preprocessing
from schemas.bundle import Preprocess
from schemas.errors import BundleError, ConfigError, DataError, mistakes

Say = Callable[[str], None]
SHOWN = 8  # images with which a network is checked
ROUGH = 1_000  # images below which a note says that estimates are rough


class CreateSettings(BaseModel):
    """Options of `driftkeel bundle create`.

    architecture: a built-in name, `module:function`, `timm:NAME` or `torchvision:NAME`
    width, height, mode: by default those of the images, which must agree
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    weights: Path
    data: Path
    labels: Path | None = None
    generator: Path | None = Field(None, description="a bundle to take the update rule from")
    width: int | None = Field(None, ge=1, le=4_096)
    height: int | None = Field(None, ge=1, le=4_096)
    mode: Literal["L", "RGB"] | None = None
    mean: list[float]
    std: list[float]
    steps: int | None = Field(None, ge=0, description="of meta-training; 300, or 0 with a generator")
    calibration_windows: int = Field(12, ge=2)
    # The first micro-batch is predicted with the source parameters, so there must be a second one.
    frames: int = Field(320, ge=2 * BATCH, description="frames of each camera in the measurement")
    repeats: int = Field(2, ge=1, description="cameras for each setting of the measurement")
    max_images: int = Field(10_000, ge=LEAST_IMAGES)
    seed: int = 0

    @property
    def meta_steps(self) -> int:
        if self.steps is not None:
            return self.steps
        return 300 if self.generator is None else 0


@dataclass(frozen=True)
class Subject:
    """A network that can be adapted, and the images for its bundle, divided into a part for each stage.

    truth: whether labels are the user's, or the source model's predictions of undisturbed images
    """

    settings: CreateSettings
    preprocess: Preprocess
    preprocessing: Preprocessing
    labels: list[str]
    weights: dict[str, Tensor]
    model: AdaptableModel
    parts: dict[str, Images]
    truth: Literal["labels", "source"]

    def part(self, name: str) -> tuple[Tensor, Tensor]:
        found = self.parts[name]
        if found.labels is None:
            raise DataError("images must be labelled before they are divided")
        return found.images, found.labels


def prepare(settings: CreateSettings, decode: Decode, say: Say) -> Subject:
    """Read and check all inputs. Raises BundleError, ConfigError or DataError."""
    torch.manual_seed(settings.seed)
    labels = read_labels(settings.labels, settings.data)
    images, preprocess = _images(settings, labels, decode, say)
    images = without_duplicates(images, say)
    preprocessing = Preprocessing.of(preprocess)
    network = _network(settings)
    weights = load_weights(network, read_weights(settings.weights, say), settings.weights, say)
    shown = preprocessing.frames(images.images[:SHOWN])
    model = adaptable(network, shown, len(labels), say)
    built_again(_network(settings), weights, model, shown)
    truth: Literal["labels", "source"] = "labels"
    if images.labels is None:
        truth = "source"
        images = Images(images.images, answers(model, images.images, preprocessing))
        say("data: no labels, so right means what the source model says of the undisturbed image; accuracy is unknown")
    parts = split(images, len(labels), settings.seed, say, by_class=truth == "labels")
    _check_accuracy(model, parts["generator"], preprocessing, len(labels), say)
    if len(images) < ROUGH:
        say(f"data: {len(images)} images make rough estimates; {ROUGH} or more are better")
    return Subject(settings, preprocess, preprocessing, labels, weights, model, parts, truth)


def _network(settings: CreateSettings) -> nn.Module:
    return build_network(settings.architecture, settings.arguments, [settings.architecture])


def _images(settings: CreateSettings, labels: list[str], decode: Decode, say: Say) -> tuple[Images, Preprocess]:
    """The images, and the preprocessing that makes them the network's input. Raises ConfigError or DataError."""
    given = (settings.width, settings.height)
    if settings.data.suffix == ".npz":
        images = read_npz(settings.data, settings.max_images, settings.seed)
        mode, height, width = "L" if images.images.shape[1] == 1 else "RGB", *images.images.shape[2:]
        if settings.mode not in (None, mode) or given not in ((None, None), (width, height)):
            raise DataError(f"{settings.data} holds {mode} images of {width}x{height}; --size and --mode say otherwise")
        return images, _preprocess(settings, mode, width, height)
    paths, classes = image_files(settings.data, labels)
    if not paths:
        raise DataError(f"no image under {settings.data}; files must end with {', '.join(SUFFIXES)}")
    width, height = (settings.width, settings.height) if None not in given else common_size(paths)
    preprocess = _preprocess(settings, settings.mode or common_mode(paths), width, height)
    read = read_files(paths, classes, preprocess, decode, settings.max_images, settings.seed, say)
    return read, preprocess


def _preprocess(settings: CreateSettings, mode: str, width: int | None, height: int | None) -> Preprocess:
    channels = 1 if mode == "L" else 3
    mean, std = (given * channels if len(given) == 1 else given for given in (settings.mean, settings.std))
    try:
        return Preprocess.model_validate({"mode": mode, "width": width, "height": height, "mean": mean, "std": std})
    except ValidationError as error:
        raise ConfigError(f"--size, --mode, --mean, --std: {mistakes(error)[0][1]}") from error


@torch.no_grad()
def first_logits(subject: Subject) -> Tensor:
    """The logits of the first images of the part for the generator."""
    return subject.model(subject.preprocessing.frames(subject.parts["generator"].images[:SHOWN]))


@torch.inference_mode()
def answers(model: AdaptableModel, images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The classes (N,) that the source model predicts for images uint8 (N, ch, h, w)."""
    found = [model(preprocessing.frames(part)).argmax(1) for part in images.split(frames_in_pass(*images.shape[2:]))]
    return torch.cat(found).clone()


def _check_accuracy(
    model: AdaptableModel, images: Images, preprocessing: Preprocessing, classes: int, say: Say
) -> None:
    """Raises BundleError if accuracy on clean images is near chance: pixels or labels then differ from training's."""
    right = float((answers(model, images.images, preprocessing) == images.labels).float().mean())
    if right < 2 / (classes + 1):
        raise BundleError(
            f"the network is right on {right:.1%} of the images, about as chance has it: check --mean, --std, --size, "
            "--mode and the order of --labels; all must be as in its training"
        )
    say(f"network: right on {right:.1%} of the images for the generator")
