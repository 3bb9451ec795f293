"""The source models of the benchmark: from a bundle, a file of weights, or trained once and kept in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from meta import data
from meta.baselines import Setup
from meta.benchmark.controls import train_on_shifts
from meta.benchmark.datasets import DataSet
from meta.bundle import Bundle, load_bundle, model_weights
from meta.bundle_folder import read_manifest
from meta.calibrate import source_statistics
from meta.data import LabelledImages
from meta.learned import transplant
from meta.mgg import MGG
from meta.models import build_network
from meta.norms import AdaptableModel
from meta.paper import PaperMGG
from meta.shifts import TUNING
from meta.simulate import SimulatedStream
from meta.source import Preprocessing, accuracy, image_tensor, train_source
from meta.train import measure_gradient
from schemas.errors import BundleError, ConfigError

SOURCE_FRAMES = 2_000


class ModelConfig(BaseModel):
    """A source model and its data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    data: str = Field(description="an entry of the config's data section")
    architecture: str = ""
    arguments: dict[str, int | list[int]] = Field(default_factory=dict)
    epochs: int = Field(10, ge=1)
    seed: int = 0
    bundle: Path | None = Field(None, description="take the source model from here instead of training one")
    weights: Path | None = Field(
        None,
        description="take the trained weights from this safetensors file, such as one of the cache: training on "
        "another processor does not reproduce them exactly",
    )
    shift_steps: int = Field(
        0, ge=0, description="steps of fine-tuning, with labels, under the simulated shifts of meta-training"
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if self.bundle is not None and self.weights is not None:
            raise ValueError(f"model {self.name!r} has both a bundle and weights: its bundle has weights of its own")
        return self

    def content(self) -> dict[str, Any]:
        """The options that results depend on. Unused ones are left out, so that results from before them stay valid.

        Raises ConfigError if the file of weights cannot be read.
        """
        found = self.model_dump(mode="json", exclude={"weights"} | ({"shift_steps"} if not self.shift_steps else set()))
        if self.weights is not None:
            found["weights"] = hashlib.sha256(_read(self.weights)).hexdigest()
        return found


@dataclass(frozen=True)
class SourceModel:
    """A source model with the methods' `Setup`, its clean accuracy, and images for tuning, which trained nothing."""

    config: ModelConfig
    setup: Setup
    clean_accuracy: float
    tuning: LabelledImages

    def generator(self, bundle: Bundle) -> MGG | PaperMGG:
        """The bundle's method for this model: complete if the bundle was made for it, else without the anchor.

        Raises BundleError.
        """
        setup, method = self.setup, bundle.method
        if isinstance(method, PaperMGG):
            return PaperMGG(setup.model, setup.source, method.generator, method.settings)
        if not isinstance(method, MGG):
            raise BundleError(f"bundle {bundle.manifest.name!r} has no generator")
        if torch.equal(method.model.source_affine, setup.model.source_affine):
            return MGG(setup.model, setup.source, method.learned, setup.classes)
        moved = MGG(setup.model, setup.source, transplant(method.learned, setup.model), setup.classes)
        images, labels = image_tensor(self.tuning.images), torch.from_numpy(self.tuning.labels)
        random = torch.Generator().manual_seed(self.config.seed)
        cameras = [SimulatedStream(images, labels, TUNING, random) for _ in range(16)]
        moved.learned.gradient_scale.fill_(measure_gradient(moved, cameras, Preprocessing(setup.mean, setup.std)))
        return moved


def parts(train: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
    """The training images divided three to one: for the source model, and the rest."""
    cut = data.SOURCE_PART[1] if len(train) == data.CALIBRATION_PART[1] else len(train) * 3 // 4
    return train.part(0, cut), train.part(cut, len(train))


def shown_parts(unseen: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
    """The images that trained no source model, divided: for training under simulated shifts, and the rest.

    For Fashion-MNIST the former are those of meta-training; for other data sets they are the same share.
    """
    start, stop = data.META_PART
    cut = len(unseen) * (stop - start) // (data.CALIBRATION_PART[1] - start)
    return unseen.part(0, cut), unseen.part(cut, len(unseen))


def open_source(
    config: ModelConfig,
    dataset: DataSet,
    cache: Path,
    say: Callable[[str], None],
    factories: Sequence[str] = (),
) -> SourceModel:
    """Load or train a source model. `factories`: `module:function` names of networks that the plan trusts.

    Raises BundleError if a bundle does not fit the data.
    """
    for_source, unseen = parts(dataset.train())
    preprocessing = Preprocessing(torch.tensor(dataset.mean), torch.tensor(dataset.std))
    bundle = None if config.bundle is None else load_bundle(config.bundle, factories)
    if bundle is not None:
        _check(config, bundle, dataset, unseen)
        preprocessing = Preprocessing.of(bundle.manifest.preprocess)
    if bundle is not None and not config.shift_steps:
        model, source = bundle.model, bundle.statistics
    else:
        if config.bundle is not None:
            network = _network_of(config.bundle, factories)
        elif config.weights is not None:
            network = _weighted(config, config.weights)
        else:
            network = _trained(config, dataset, for_source, cache, say)
        if config.shift_steps:
            shown, unseen = shown_parts(unseen)
            network = _shifted(config, dataset, network, shown, preprocessing, cache, say)
        # Built-in networks run their layers in the order of `norm_layers`.
        part = bundle.manifest.model if bundle is not None else None
        known = (part.norm_order, part.norm_layouts) if part is not None else ()
        model = AdaptableModel(network.eval().to(memory_format=torch.channels_last), *known)
        source = source_statistics(model, image_tensor(unseen.images), preprocessing)
    test = dataset.test()
    clean = accuracy(model, image_tensor(test.images), torch.from_numpy(test.labels), preprocessing)
    frames = preprocessing.frames(image_tensor(unseen.images[:SOURCE_FRAMES]))
    shape = tuple(frames.shape[1:])
    setup = Setup(model, source, len(dataset.labels), preprocessing.mean, preprocessing.std, frames, shape)
    return SourceModel(config, setup, clean, unseen)


def _check(config: ModelConfig, bundle: Bundle, dataset: DataSet, images: LabelledImages) -> None:
    """Raises BundleError if the bundle's frames or labels are not those of the data set."""
    preprocess = bundle.manifest.preprocess
    shape = (preprocess.channels, preprocess.height, preprocess.width)
    if shape != image_tensor(images.images[:1]).shape[1:] or len(bundle.labels) != len(dataset.labels):
        raise BundleError(f"model {config.name!r}: bundle {config.bundle} takes frames {shape}, not {dataset.name}'s")
    pairs = zip(bundle.labels, dataset.labels, strict=True)
    odd = next((pair for pair in pairs if pair[0] != pair[1]), None)
    if odd is not None and sorted(bundle.labels) == sorted(dataset.labels):
        raise BundleError(
            f"model {config.name!r}: bundle {config.bundle} has its labels in another order than {dataset.name} "
            f"({odd[0]!r} where that has {odd[1]!r}); classes are compared by number, so give the folders names that "
            "sort as the labels do, such as 000-first"
        )


def _network_of(folder: Path, factories: Sequence[str]) -> nn.Module:
    """A bundle's trained source network, with its original norm layers."""
    part = read_manifest(folder).model
    network = build_network(part.architecture, part.arguments, factories)
    network.load_state_dict(model_weights(folder))
    return network


def _weighted(config: ModelConfig, weights: Path) -> nn.Module:
    network = build_network(config.architecture, config.arguments)
    try:
        network.load_state_dict(safetensors.torch.load(_read(weights)))
    except (safetensors.SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise BundleError(
            f"model {config.name!r}: {weights} has no weights of {config.architecture}: {reason}"
        ) from error
    return network


def _read(weights: Path) -> bytes:
    try:
        return weights.read_bytes()
    except OSError as error:
        raise ConfigError(f"weights {weights} cannot be read: {error.strerror}") from error


def _trained(
    config: ModelConfig, dataset: DataSet, images: LabelledImages, cache: Path, say: Callable[[str], None]
) -> nn.Module:
    recipe = config.model_dump(mode="json", exclude={"name", "bundle", "weights", "shift_steps"})
    digest = hashlib.sha256(json.dumps([recipe, len(images)], sort_keys=True).encode()).hexdigest()[:12]
    torch.manual_seed(config.seed)
    network = build_network(config.architecture, config.arguments)

    def train() -> None:
        say(f"training {config.name} on {dataset.name}")
        rate = 2e-3 if "vit" in config.architecture else 4e-3
        train_source(network, images, config.epochs, config.seed, 128, rate, say, dataset.mean, dataset.std)

    return _once(cache / "sources" / f"{dataset.name}-{config.name}-{digest}.safetensors", network, train)


def _shifted(
    config: ModelConfig,
    dataset: DataSet,
    network: nn.Module,
    images: LabelledImages,
    preprocessing: Preprocessing,
    cache: Path,
    say: Callable[[str], None],
) -> nn.Module:
    """The network fine-tuned under simulated shifts. The name of its cache file depends on the initial weights."""
    recipe = json.dumps([config.shift_steps, config.seed, len(images)]).encode()
    digest = hashlib.sha256(recipe + _packed(network)).hexdigest()[:12]

    def train() -> None:
        say(f"training {config.name} on {dataset.name} under simulated shifts")
        train_on_shifts(network, images, config.shift_steps, config.seed, preprocessing, say)

    return _once(cache / "sources" / f"{dataset.name}-{config.name}-shifts-{digest}.safetensors", network, train)


def _once(path: Path, network: nn.Module, train: Callable[[], None]) -> nn.Module:
    """The network with the weights in the file `path`; if there is none, trained and saved there."""
    if path.exists():
        network.load_state_dict(safetensors.torch.load_file(path))
    else:
        train()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_packed(network))
    return network


def _packed(network: nn.Module) -> bytes:
    packed: bytes = safetensors.torch.save({name: t.contiguous() for name, t in network.state_dict().items()})
    return packed
