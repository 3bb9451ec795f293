"""Recipes, from which `driftkeel meta train` makes bundles of Fashion-MNIST: source model, generator, calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from meta import data
from meta.baselines import Baseline
from meta.benchmark import corruptions
from meta.bundle import Bundle, load_bundle, model_weights, write_bundle
from meta.bundle_folder import read_manifest, rewrite_manifest
from meta.calibrate import calibrate, source_statistics
from meta.correction import Correction, fit_correction
from meta.generator import MetaGradientGenerator
from meta.learned import GeneratorSettings, LearnedOptimizer
from meta.mgg import MGG
from meta.models import build_network
from meta.norms import AdaptableModel
from meta.objective import SourceStatistics
from meta.paper import PaperMGG, PaperSettings, meta_train_paper
from meta.source import Preprocessing, accuracy, image_tensor, train_source
from meta.train import Problem, TrainingSettings, meta_train
from meta.yaml_file import read_yaml
from schemas.bundle import Manifest, MethodPart, ModelPart, Preprocess
from schemas.errors import BundleError

PREPROCESS = Preprocess(mode="L", width=28, height=28, mean=[data.MEAN], std=[data.STD])
PREPROCESSING = Preprocessing.of(PREPROCESS)


class SourceRecipe(BaseModel):
    """The source model: that of another bundle, or one to be trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: Path | None = None
    architecture: str = "groupnorm-cnn"
    arguments: dict[str, int | list[int]] = Field(default_factory=dict)
    epochs: int = Field(20, ge=1)
    learning_rate: float = Field(4e-3, gt=0)
    seed: int = 0


class PaperRecipe(BaseModel):
    """The paper's meta-training: few unlabelled images of four corruptions, one-step truncation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: PaperSettings = PaperSettings()
    images: int = Field(128, ge=4)
    batch: int = Field(2, ge=2)
    epochs: int = Field(40, ge=1)
    learning_rate: float = Field(1e-2, gt=0)
    inner_step_size: float = Field(1e-4, gt=0)
    severity: int = Field(5, ge=1, le=5)


class Recipe(BaseModel):
    """What `driftkeel meta train --config` reads. With a `paper` section the generator is the paper's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    data: Literal["fashion-mnist"]
    threads: int = Field(2, ge=1)
    source: SourceRecipe = SourceRecipe()
    generator: GeneratorSettings = GeneratorSettings()
    training: TrainingSettings = TrainingSettings()
    start: Path | None = Field(None, description="a bundle whose generator is trained further; by default a new one")
    paper: PaperRecipe | None = None
    correction_draws: int = Field(
        200, ge=0, description="shifts to fit the correction of single frames on; 0: no correction"
    )
    calibration_windows: int = Field(
        12, ge=2, description="windows of eight micro-batches from each stream, in each of twenty runs"
    )
    calibration_streams: int = Field(24, ge=1)

    @model_validator(mode="after")
    def _starts_from_its_own_kind(self) -> Recipe:
        if self.paper is not None and self.start is not None:
            raise ValueError("start goes on with a generator of ours; the paper's begins anew: leave one of them out")
        return self


def read_recipe(path: Path) -> Recipe:
    """Raises ConfigError."""
    return read_yaml(path, Recipe, "recipe")


def build_bundle(recipe: Recipe, folder: Path, command: str, say: Callable[[str], None] = print) -> Manifest:
    """Train the source model, meta-train its generator, calibrate, write the bundle, and load it once as a check."""
    torch.set_num_threads(recipe.threads)
    train = data.fashion_mnist("train")
    part, weights, source, correction = _source(recipe.source, train, say)
    network = build_network(part.architecture, part.arguments)
    network.load_state_dict(weights)
    model = AdaptableModel(network.eval().to(memory_format=torch.channels_last), part.norm_order)
    clean = _tensors(train.part(*data.META_PART))[0]
    if source is None:
        source = source_statistics(model, clean, PREPROCESSING)
    if recipe.paper is not None or not recipe.correction_draws:
        correction = None
    elif correction is None:
        correction = fit_correction(model, clean, PREPROCESSING, recipe.training.seed, recipe.correction_draws)
    model.correction = correction
    made = _ours if recipe.paper is None else _paper
    method, settings, tensors = made(recipe, model, source, train, say)
    unseen = _tensors(train.part(*data.CALIBRATION_PART))
    calibration, limits = calibrate(
        method,
        *unseen,
        PREPROCESSING,
        recipe.training.seed + 1,
        recipe.calibration_windows,
        recipe.calibration_streams,
        say=say,
    )
    say(f"calibration: temperature {calibration.temperature:.2f}, estimate off by {calibration.error:.3f}")
    manifest = Manifest(
        name=recipe.name,
        created_by=command,
        model=part,
        method=MethodPart(name="mgg" if recipe.paper is None else "mgg-paper", settings=settings),
        preprocess=PREPROCESS,
        calibration=calibration,
        limits=limits,
        files={},
    )
    parts = {"model": weights, "generator": tensors, "statistics": source.as_tensors()}
    if correction is not None:
        parts["correction"] = correction.as_tensors()
    manifest = write_bundle(folder, manifest, parts, data.LABELS)
    load_bundle(folder)
    say(f"bundle {manifest.content_hash} written to {folder}")
    return manifest


def calibrate_bundle(
    folder: Path, command: str, seed: int, windows: int, say: Callable[[str], None] = print
) -> Manifest:
    """Repeat the calibration of a bundle with the present program; its learned parameters stay bit-identical.

    For bundles of Fashion-MNIST, whose calibration images trained neither model nor generator. Raises BundleError for
    others.
    """
    bundle = _of_fashion_mnist(folder)
    if isinstance(bundle.method, Baseline):
        raise BundleError(f"{folder} has no generator to calibrate")
    unseen = _tensors(data.fashion_mnist("train").part(*data.CALIBRATION_PART))
    preprocessing = Preprocessing.of(bundle.manifest.preprocess)
    calibration, limits = calibrate(bundle.method, *unseen, preprocessing, seed, windows, say=say)
    say(f"calibration: temperature {calibration.temperature:.2f}, estimate off by {calibration.error:.3f}")
    manifest = bundle.manifest.model_copy(
        update={"calibration": calibration, "limits": limits, "calibrated_by": command}
    )
    rewrite_manifest(folder, manifest)
    load_bundle(folder)
    say(f"bundle {manifest.content_hash} written to {folder}")
    return manifest


def _of_fashion_mnist(folder: Path) -> Bundle:
    """The loaded bundle. Raises BundleError if it is not one of Fashion-MNIST."""
    preprocess = read_manifest(folder).preprocess
    if (preprocess.mode, preprocess.width, preprocess.height) == ("L", 28, 28):
        bundle = load_bundle(folder)
        if tuple(bundle.labels) == data.LABELS:
            return bundle
    raise BundleError(
        f"{folder} is no bundle of Fashion-MNIST; 'driftkeel bundle create' calibrates on your own images"
    )


class _Source(NamedTuple):
    """A source model: its entry in the manifest, its weights, and what another bundle's makers measured of it.

    The latter is kept: measured again, by other code or on another machine, it would differ by rounding, and with it
    what other methods do with this model.
    """

    part: ModelPart
    weights: dict[str, Tensor]
    statistics: SourceStatistics | None = None
    correction: Correction | None = None


def _source(recipe: SourceRecipe, train: data.LabelledImages, say: Callable[[str], None]) -> _Source:
    if recipe.bundle is not None:
        bundle = load_bundle(recipe.bundle)
        statistics = bundle.method.source if isinstance(bundle.method, MGG | PaperMGG) else None
        correction = bundle.model.correction if isinstance(bundle.model.correction, Correction) else None
        return _Source(bundle.manifest.model, model_weights(recipe.bundle), statistics, correction)
    torch.manual_seed(recipe.seed)
    network = build_network(recipe.architecture, recipe.arguments)
    images = train.part(*data.SOURCE_PART)
    train_source(network, images, recipe.epochs, recipe.seed, peak_rate=recipe.learning_rate, say=say)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    clean = accuracy(network, *_tensors(data.fashion_mnist("test")), PREPROCESSING)
    say(f"source model: {clean:.3f} on clean test images")
    part = ModelPart(architecture=recipe.architecture, arguments=recipe.arguments, clean_accuracy=clean)
    return _Source(part, weights)


Made = tuple[MGG | PaperMGG, dict[str, Any], dict[str, Tensor]]


def _ours(
    recipe: Recipe,
    model: AdaptableModel,
    source: SourceStatistics,
    train: data.LabelledImages,
    say: Callable[[str], None],
) -> Made:
    torch.manual_seed(recipe.training.seed)
    learned = LearnedOptimizer(recipe.generator.in_training(), model)
    if recipe.start is not None:
        _go_on_from(recipe.start, learned)
    method = MGG(model, source, learned, len(data.LABELS))
    random = torch.Generator().manual_seed(recipe.training.seed)
    images = _tensors(train.part(*data.META_PART))
    meta_train([Problem(method, *images, PREPROCESSING, recipe.training, random)], recipe.training, say)
    learned.requires_grad_(False).eval()
    learned.settings = recipe.generator
    served = MGG(model, source, learned, len(data.LABELS))
    return served, recipe.generator.model_dump(mode="json"), dict(learned.state_dict())


def _go_on_from(folder: Path, learned: LearnedOptimizer) -> None:
    """Start from the parameters of another bundle's generator. Raises BundleError if they do not fit."""
    method = load_bundle(folder).method
    if not isinstance(method, MGG):
        raise BundleError(f"{folder} has no generator of ours to start from")
    try:
        learned.load_state_dict(method.learned.state_dict())
    except RuntimeError as error:
        raise BundleError(f"the generator of {folder} does not fit: it has other inputs, sizes or layers") from error


def _paper(
    recipe: Recipe,
    model: AdaptableModel,
    source: SourceStatistics,
    train: data.LabelledImages,
    say: Callable[[str], None],
) -> Made:
    paper = recipe.paper or PaperRecipe()
    torch.manual_seed(recipe.training.seed)
    generator = MetaGradientGenerator(2, paper.settings.hidden)
    method = PaperMGG(model, source, generator, paper.settings)
    shown = _corrupted(train.part(*data.META_PART), paper.images, paper.severity)
    order = torch.randperm(len(shown[1]), generator=torch.Generator().manual_seed(recipe.training.seed))
    batches = shown[0][order].split(paper.batch)
    judged = _corrupted(train.part(*data.CALIBRATION_PART), 4 * 256, paper.severity)
    meta_train_paper(
        method,
        batches,
        lambda subject: _streamed_accuracy(subject, *judged),
        paper.epochs,
        paper.learning_rate,
        paper.inner_step_size,
        say,
    )
    generator.requires_grad_(False).eval()
    return method, paper.settings.model_dump(mode="json"), dict(generator.state_dict())


def _corrupted(images: data.LabelledImages, count: int, severity: int) -> tuple[Tensor, Tensor]:
    """Standardised frames and labels of `count` images, a quarter under each of the four tuning corruptions."""
    quarter = count // len(corruptions.TUNING)
    frames = [
        corruptions.corrupt(images.images[i * quarter : (i + 1) * quarter], name, severity)
        for i, name in enumerate(corruptions.TUNING)
    ]
    labels = torch.from_numpy(images.labels[: quarter * len(frames)])
    return PREPROCESSING.frames(image_tensor(np.concatenate(frames))), labels


def _streamed_accuracy(method: PaperMGG, frames: Tensor, labels: Tensor, batch: int = 64) -> float:
    """The accuracy on one stream, where each batch is predicted before it is adapted on."""
    state, right = method.fresh(1), 0
    for part, truth in zip(frames.split(batch), labels.split(batch), strict=True):
        forward = method.predict(part, torch.zeros(len(part), dtype=torch.long), state)
        right += int((forward.answer.argmax(1) == truth).sum())
        state = method.update(forward).state
    return right / len(labels)


def _tensors(part: data.LabelledImages) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, ch, h, w) and labels (N,)."""
    return image_tensor(part.images), torch.from_numpy(part.labels)
