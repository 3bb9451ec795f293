"""The source models of the benchmark: from a bundle, or trained once and kept in the cache folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field

from meta import data
from meta.baselines import Setup
from meta.benchmark.datasets import DataSet
from meta.bundle import Bundle, load_bundle
from meta.calibrate import source_statistics
from meta.data import LabelledImages
from meta.mgg import MGG, transplant
from meta.models import build_network
from meta.norms import AdaptableModel
from meta.paper import PaperMGG
from meta.shifts import TUNING
from meta.simulate import SimulatedStream
from meta.source import accuracy, as_frames, image_tensor, train_source
from meta.train import Preprocessing, measure_gradient
from schemas.errors import BundleError

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


@dataclass(frozen=True)
class SourceModel:
    """A source model as the methods need it, its clean accuracy, and images that trained nothing, for tuning."""

    config: ModelConfig
    setup: Setup
    clean_accuracy: float
    tuning: LabelledImages

    def generator(self, bundle: Bundle) -> MGG | PaperMGG:
        """The bundle's method on this model: as it is where the bundle was made for it, else its rule alone."""
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
    """Training images for the source model, and the rest: three to one."""
    cut = data.SOURCE_PART[1] if len(train) == data.CALIBRATION_PART[1] else len(train) * 3 // 4
    return train.part(0, cut), train.part(cut, len(train))


def open_source(config: ModelConfig, dataset: DataSet, cache: Path, say: Callable[[str], None]) -> SourceModel:
    """Load or train. Raises BundleError where a bundle does not fit the data."""
    for_source, unseen = parts(dataset.train())
    mean, std = torch.tensor(dataset.mean), torch.tensor(dataset.std)
    if config.bundle is not None:
        bundle = load_bundle(config.bundle)
        preprocess = bundle.manifest.preprocess
        shape = (preprocess.channels, preprocess.height, preprocess.width)
        if shape != image_tensor(unseen.images[:1]).shape[1:] or len(bundle.labels) != len(dataset.labels):
            raise BundleError(
                f"model {config.name!r}: bundle {config.bundle} takes frames {shape}, not {dataset.name}'s"
            )
        model, source = bundle.model, bundle.method.source
        mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
    else:
        model = AdaptableModel(_trained(config, dataset, for_source, cache, say))
        source = source_statistics(model, image_tensor(unseen.images), Preprocessing(mean, std))
    test = dataset.test()
    clean = accuracy(model, image_tensor(test.images).float() / 255, torch.from_numpy(test.labels), mean, std)
    frames = as_frames(image_tensor(unseen.images[:SOURCE_FRAMES]).float() / 255, mean, std)
    setup = Setup(model, source, len(dataset.labels), mean, std, frames, tuple(frames.shape[1:]))
    return SourceModel(config, setup, clean, unseen)


def _trained(
    config: ModelConfig, dataset: DataSet, images: LabelledImages, cache: Path, say: Callable[[str], None]
) -> torch.nn.Module:
    recipe = config.model_dump(mode="json", exclude={"name", "bundle"})
    digest = hashlib.sha256(json.dumps([recipe, len(images)], sort_keys=True).encode()).hexdigest()[:12]
    path = cache / "sources" / f"{dataset.name}-{config.name}-{digest}.safetensors"
    torch.manual_seed(config.seed)
    network = build_network(config.architecture, config.arguments)
    if path.exists():
        network.load_state_dict(safetensors.torch.load_file(path))
    else:
        say(f"training {config.name} on {dataset.name}")
        rate = 2e-3 if "vit" in config.architecture else 4e-3
        train_source(network, images, config.epochs, config.seed, 128, rate, say, dataset.mean, dataset.std)
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        path.write_bytes(safetensors.torch.save(weights))
    return network.eval().to(memory_format=torch.channels_last)
