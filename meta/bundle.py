"""Bundles: written at the centre, checked and loaded at a site.

A bundle is a folder with manifest.json, model.safetensors, generator.safetensors, statistics.safetensors, labels.txt,
and optionally correction.safetensors and verdict.json. Nothing in it is executed, and no file is used before its hash
has been checked.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from meta.baselines import BASELINES, Baseline, Setup, build
from meta.bundle_folder import LABELS, MGG_NAME, VERDICT, checked_file, read_labels, read_manifest, rewrite_manifest
from meta.correction import Correction
from meta.generator import MetaGradientGenerator
from meta.learned import GeneratorSettings, LearnedOptimizer
from meta.method import CPU
from meta.mgg import MGG
from meta.models import ARCHITECTURES, build_network
from meta.norms import AdaptableModel
from meta.objective import SourceStatistics
from meta.paper import PaperMGG, PaperSettings
from schemas.bundle import FileEntry, Limits, Manifest
from schemas.errors import BundleError, first_mistake
from schemas.verdict import Verdict

CORRECTION = "correction.safetensors"


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle, ready to predict and adapt."""

    manifest: Manifest
    labels: list[str]
    model: AdaptableModel
    method: MGG | PaperMGG | Baseline
    method_name: str = MGG_NAME

    @property
    def hash(self) -> str:
        """The content hash: sixteen hexadecimal digits."""
        return self.manifest.content_hash

    @property
    def is_estimated(self) -> bool:
        """Whether the bundle's accuracy estimator is fitted to the method."""
        return self.method_name == MGG_NAME

    @property
    def source_accuracy(self) -> float | None:
        """For the guard: the source model's accuracy on clean frames if the method's is not estimated, else None."""
        return None if self.is_estimated else self.manifest.model.clean_accuracy

    @property
    def limits(self) -> Limits:
        """The limits of normal operation.

        They were calibrated with the bundle's generator. A baseline's gradients are in other units, so only the limit
        of its distance from source holds.
        """
        if self.is_estimated:
            return self.manifest.limits
        return Limits(raw_gradient_norm=math.inf, source_distance=self.manifest.limits.source_distance)

    @property
    def statistics(self) -> SourceStatistics:
        """Feature statistics of clean source frames."""
        return self.method.setup.source if isinstance(self.method, Baseline) else self.method.source


def write_bundle(
    folder: Path,
    manifest: Manifest,
    tensors: dict[str, dict[str, Tensor]],
    labels: Iterable[str],
    verdict: Verdict | None = None,
) -> Manifest:
    """Write a bundle; `manifest.files` is filled in here. `tensors` maps a file's stem to its content.

    Returns the manifest as written. Equal content gives equal bytes. Raises BundleError.
    """
    contents = {
        f"{stem}.safetensors": safetensors.torch.save({k: v.contiguous() for k, v in sorted(content.items())})
        for stem, content in tensors.items()
    }
    contents[LABELS] = "".join(f"{label}\n" for label in labels).encode()
    if verdict is not None:
        contents[VERDICT] = (verdict.model_dump_json(indent=2) + "\n").encode()
    entries = {
        name: FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
        for name, content in sorted(contents.items())
    }
    manifest = manifest.model_copy(update={"files": entries})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        rewrite_manifest(folder, manifest)
    except OSError as error:
        raise BundleError(f"bundle {folder} cannot be written: {error.strerror}; remove what is there of it") from error
    return manifest


def load_bundle(
    folder: Path, factories: Iterable[str] = (), method: str = MGG_NAME, device: torch.device = CPU
) -> Bundle:
    """Check every hash, then build the model and the method, on the CPU, and move both to `device`.

    factories: `module:function` names of network factories that are trusted
    method: `mgg` for the bundle's generator, else the name of a baseline (`meta.baselines`). A baseline has no source
        frames here: `eata` is then ETA

    Raises BundleError if a file is missing or altered, or if the parts do not fit together.
    """
    if method not in (MGG_NAME, *BASELINES):
        raise BundleError(f"there is no method {method!r}; known: {', '.join((MGG_NAME, *BASELINES))}")
    manifest = read_manifest(folder)
    contents = {name: checked_file(folder, name, entry) for name, entry in manifest.files.items()}
    labels = read_labels(folder, manifest)
    weights = _tensors(contents, folder, "model.safetensors")
    _check_size(manifest, weights, folder)
    network = build_network(manifest.model.architecture, manifest.model.arguments, factories).float()
    _load_weights(network, weights, "model.safetensors")
    model = AdaptableModel(network, manifest.model.norm_order, manifest.model.norm_layouts)
    source = _statistics(_tensors(contents, folder, "statistics.safetensors"), model, len(labels))
    generator = _tensors(contents, folder, "generator.safetensors")
    if CORRECTION in contents:
        model.correction = _correction(_tensors(contents, folder, CORRECTION), model).to(device)
    _check_output(model, manifest, labels, folder)
    model.move_to(device)
    source = source.to(device)
    if method != MGG_NAME:
        return Bundle(manifest, labels, model, _baseline(method, manifest, model, source, len(labels)), method)
    made = _paper if manifest.method.name == "mgg-paper" else _ours
    try:
        return Bundle(manifest, labels, model, made(manifest, generator, model, source, len(labels)))
    except ValidationError as error:
        raise BundleError(f"{folder}: method settings: {first_mistake(error)}") from error


def _ours(
    manifest: Manifest, tensors: dict[str, Tensor], model: AdaptableModel, source: SourceStatistics, classes: int
) -> MGG:
    learned = LearnedOptimizer(GeneratorSettings.model_validate(manifest.method.settings), model)
    _load_weights(learned, tensors, "generator.safetensors")
    return MGG(model, source, learned.requires_grad_(False).eval().to(model.device), classes)


def _paper(
    manifest: Manifest, tensors: dict[str, Tensor], model: AdaptableModel, source: SourceStatistics, classes: int
) -> PaperMGG:
    settings = PaperSettings.model_validate(manifest.method.settings)
    generator = MetaGradientGenerator(2, settings.hidden)
    _load_weights(generator, tensors, "generator.safetensors")
    return PaperMGG(model, source, generator.requires_grad_(False).eval().to(model.device), settings)


def model_weights(folder: Path) -> dict[str, Tensor]:
    """The checked weights of the source model. Raises BundleError."""
    return _tensors_alone(folder, "model.safetensors", read_manifest(folder))


def portable_rule(folder: Path) -> tuple[GeneratorSettings, dict[str, Tensor]]:
    """The settings and weights of a bundle's generator without its anchor, which serve any model.

    The bundle's network is not built, so its code is not needed. Raises BundleError.
    """
    name, manifest = "generator.safetensors", read_manifest(folder)
    if manifest.method.name != MGG_NAME:
        raise BundleError(f"{folder} has the generator {manifest.method.name!r}, which serves its own model only")
    tensors = _tensors_alone(folder, name, manifest)
    try:
        settings = GeneratorSettings.model_validate(manifest.method.settings)
    except ValidationError as error:
        raise BundleError(f"{folder}: method settings: {first_mistake(error)}") from error
    return settings, {key: tensor for key, tensor in tensors.items() if not key.startswith("anchor.")}


def _baseline(name: str, manifest: Manifest, model: AdaptableModel, source: SourceStatistics, classes: int) -> Baseline:
    preprocess = manifest.preprocess
    shape = (preprocess.channels, preprocess.height, preprocess.width)
    mean, std = (torch.tensor(values, device=model.device) for values in (preprocess.mean, preprocess.std))
    return build(name, Setup(model, source, classes, mean, std, frame_shape=shape))


def _tensors(contents: dict[str, bytes], folder: Path, name: str) -> dict[str, Tensor]:
    if name not in contents:
        raise BundleError(f"the manifest in {folder} does not list {name}")
    try:
        return safetensors.torch.load(contents[name])
    except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a dtype that this torch does not have
        raise BundleError(f"{folder / name} is no safetensors file: {error}") from error


def _tensors_alone(folder: Path, name: str, manifest: Manifest) -> dict[str, Tensor]:
    entries = {name: manifest.files[name]} if name in manifest.files else {}
    return _tensors({key: checked_file(folder, key, entry) for key, entry in entries.items()}, folder, name)


def _check_size(manifest: Manifest, weights: dict[str, Tensor], folder: Path) -> None:
    """Compare the number of weights before memory is allocated: the manifest's arguments may ask for a network of any
    size. Networks of the site's own code are trusted."""
    name = manifest.model.architecture
    if name not in ARCHITECTURES:
        return
    with torch.device("meta"):
        asked = sum(tensor.numel() for tensor in build_network(name, manifest.model.arguments).state_dict().values())
    had = sum(tensor.numel() for tensor in weights.values())
    if asked > had:
        raise BundleError(
            f"{folder}: model.safetensors does not fit its architecture: it has {had:,} numbers, and {name} with the "
            f"manifest's arguments {asked:,}; get the bundle again"
        )


def _load_weights(module: torch.nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        first = " ".join(str(error).split())
        raise BundleError(f"{name} does not fit its architecture: {first[:300]}") from error
    for key, tensor in module.state_dict().items():  # of the module: `isfinite` has all of its dtypes
        if not bool(torch.isfinite(tensor).all()):
            raise BundleError(f"{name}: tensor {key!r} has values that are not finite")


def _statistics(tensors: dict[str, Tensor], model: AdaptableModel, classes: int) -> SourceStatistics:
    features = model.feature_count
    shapes = {"mean": (features,), "std": (features,)}
    if "class_mean" in tensors or "class_square" in tensors:
        shapes |= {"class_mean": (classes, features), "class_square": (classes, features)}
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            raise BundleError(f"statistics.safetensors: {name!r} must have the shape {shape} for this architecture")
        tensors[name] = tensors[name].float()
        if not bool(torch.isfinite(tensors[name]).all()):
            raise BundleError(f"statistics.safetensors: {name!r} has values that are not finite")
    return SourceStatistics(**{name: tensors[name] for name in shapes})


def _correction(tensors: dict[str, Tensor], model: AdaptableModel) -> Correction:
    for name, shape in Correction.shapes(model.feature_count).items():
        if name not in tensors or tensors[name].dim() != len(shape) or tensors[name].shape[0] != shape[0]:
            raise BundleError(f"{CORRECTION}: {name!r} must have the shape {shape} for this architecture")
        if not bool(torch.isfinite(tensors[name]).all()):
            raise BundleError(f"{CORRECTION}: {name!r} has values that are not finite")
    found = Correction(**{name: tensors[name].float() for name in Correction.shapes(0)})
    if found.reduce.shape != found.expand.shape or not bool((found.deviation > 0).all() & (found.spread > 0).all()):
        raise BundleError(f"{CORRECTION}: deviations and spreads must be above 0, and its two maps of one shape")
    return found


def _check_output(model: AdaptableModel, manifest: Manifest, labels: list[str], folder: Path) -> None:
    # Two frames: some networks run with one only, such as those that join frames and channels with `view`.
    shape = (2, manifest.preprocess.channels, manifest.preprocess.height, manifest.preprocess.width)
    with torch.no_grad():
        try:
            model.fit_layout(torch.zeros(shape))
            logits = model(torch.zeros(shape))
        except RuntimeError as error:
            raise BundleError(f"{folder}: the model cannot take frames of shape {shape}: {error}") from error
    if tuple(logits.shape) != (2, len(labels)):
        raise BundleError(f"{folder}: the model gives {tuple(logits.shape)} for {len(labels)} labels in labels.txt")
