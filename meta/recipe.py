"""The recipe of a bundle: one YAML file from data to a packed bundle, as `driftkeel meta train` runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meta import data
from meta.bundle import load_bundle, write_bundle
from meta.calibrate import calibrate, source_statistics
from meta.mgg import MGG, GeneratorSettings, LearnedOptimizer
from meta.models import build_network
from meta.norms import AdaptableModel
from meta.source import accuracy, train_source
from meta.train import Preprocessing, Problem, TrainingSettings, meta_train
from schemas.bundle import Calibration, Limits, Manifest, MethodPart, ModelPart, Preprocess
from schemas.errors import ConfigError


class SourceRecipe(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str = "groupnorm-cnn"
    arguments: dict[str, int | list[int]] = Field(default_factory=dict)
    epochs: int = Field(20, ge=1)
    seed: int = 0


class Recipe(BaseModel):
    """What `driftkeel meta train --config` reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    data: Literal["fashion-mnist"]
    threads: int = Field(2, ge=1)
    source: SourceRecipe = SourceRecipe()
    generator: GeneratorSettings = GeneratorSettings()
    training: TrainingSettings = TrainingSettings()


def read_recipe(path: Path) -> Recipe:
    """Raises ConfigError."""
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"recipe {path}: {error}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(f"recipe {path}: {where}: {problem['msg']}") from error


def build_bundle(recipe: Recipe, folder: Path, command: str, say: Callable[[str], None] = print) -> Manifest:
    """Train the source model, meta-train its generator, calibrate, pack, and load the result once as a check."""
    torch.set_num_threads(recipe.threads)
    preprocessing = Preprocessing(torch.tensor([data.MEAN]), torch.tensor([data.STD]))
    train, test = data.fashion_mnist("train"), data.fashion_mnist("test")
    torch.manual_seed(recipe.source.seed)
    network = build_network(recipe.source.architecture, recipe.source.arguments)
    train_source(network, train.part(*data.SOURCE_PART), recipe.source.epochs, recipe.source.seed, say=say)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    clean = accuracy(network, *_tensors(test, scaled=True), preprocessing.mean, preprocessing.std)
    say(f"source model: {clean:.3f} on clean test images")

    model = AdaptableModel(network)
    images, labels = _tensors(train.part(*data.META_PART))
    source = source_statistics(model, images, preprocessing)
    torch.manual_seed(recipe.training.seed)
    method = MGG(model, source, LearnedOptimizer(recipe.generator, model), len(data.LABELS))
    random = torch.Generator().manual_seed(recipe.training.seed)
    meta_train([Problem(method, images, labels, preprocessing, recipe.training, random)], recipe.training, say)
    for parameter in method.learned.parameters():
        parameter.requires_grad_(False)
    unseen = _tensors(train.part(*data.CALIBRATION_PART))
    calibration, limits = calibrate(method, *unseen, preprocessing, recipe.training.seed + 1)
    say(f"calibration: temperature {calibration.temperature:.2f}, estimate off by {calibration.error:.3f}")

    manifest = write_bundle(
        folder,
        _manifest(recipe, command, clean, calibration, limits),
        {
            "model": weights,
            "generator": dict(method.learned.state_dict()),
            "statistics": source.as_tensors(),
        },
        data.LABELS,
    )
    load_bundle(folder)
    say(f"bundle {manifest.content_hash} written to {folder}")
    return manifest


def _tensors(part: data.LabelledImages, scaled: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.from_numpy(part.images.copy()).unsqueeze(1)
    return images.float() / 255 if scaled else images, torch.from_numpy(part.labels)


def _manifest(recipe: Recipe, command: str, clean: float, calibration: Calibration, limits: Limits) -> Manifest:
    return Manifest(
        name=recipe.name,
        created_by=command,
        model=ModelPart(
            architecture=recipe.source.architecture, arguments=recipe.source.arguments, clean_accuracy=clean
        ),
        method=MethodPart(name="mgg", settings=recipe.generator.model_dump(mode="json")),
        preprocess=Preprocess(mode="L", width=28, height=28, mean=[data.MEAN], std=[data.STD]),
        calibration=calibration,
        limits=limits,
        files={},
    )
