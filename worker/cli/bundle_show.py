"""A bundle on the terminal: what it is made of, how it was made, and what is normal for it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from meta.bundle import Bundle
from schemas.bundle import Manifest
from worker.terminal import facts

MOST_LABELS = 12


def show(console: Console, bundle: Bundle) -> None:
    """The most important facts; the manifest has all of them."""
    console.print(facts(_rows(bundle)))


def _rows(bundle: Bundle) -> Iterator[tuple[str, str]]:
    manifest, labels = bundle.manifest, bundle.labels
    yield "name", manifest.name
    yield "created by", manifest.created_by
    if manifest.calibrated_by:
        yield "calibrated by", manifest.calibrated_by
    model, preprocess = manifest.model, manifest.preprocess
    arguments = ", ".join(f"{name}={value}" for name, value in model.arguments.items())
    yield "model", f"{model.architecture}({arguments}), hash {manifest.model_hash}"
    yield "input", f"{preprocess.width}x{preprocess.height}, {preprocess.mode}"
    more = f" and {len(labels) - MOST_LABELS} more" if len(labels) > MOST_LABELS else ""
    yield "labels", f"{len(labels)}: {', '.join(labels[:MOST_LABELS])}{more}"
    yield "clean accuracy", f"{100 * model.clean_accuracy:.1f}%"
    said = f"{bundle.model.coordinates} norm coordinates, hash {manifest.generator_hash}"
    yield "adapts by", f"{manifest.method.name}, {said}"
    yield "estimate", _estimate(manifest)
    yield "guard's limits", ", ".join(f"{name} {value:.4g}" for name, value in manifest.limits if value is not None)
    yield "files", ", ".join(f"{name} ({_size(entry.size)})" for name, entry in manifest.files.items())


def _estimate(manifest: Manifest) -> str:
    calibration = manifest.calibration
    estimator = calibration.estimator
    signals = f"from {len(estimator.signals)} signals" if estimator else "from the confidence alone"
    return f"of the accuracy {signals}, off by {100 * calibration.error:.1f} points on average in calibration"


def _size(size: int) -> str:
    if size < 1 << 10:
        return f"{size} B"
    return f"{size / 1024:.0f} KB" if size < 1 << 20 else f"{size / (1 << 20):.1f} MB"
