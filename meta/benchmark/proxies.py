"""The quality of the accuracy estimate on shifts that neither the generator nor the calibration has seen.

For comparison, every signal alone gets the same fit and interval as the combination, on the calibration shifts. Truth
is the accuracy over the same frames with the same weights: an exponential mean over about 128 frames. It has a sampling
error of its own. `best_spearman` is the rank correlation of a perfect estimate of the expected accuracy with it,
computed from two halves of the items: Spearman's correction for attenuation (1904) with the Spearman-Brown formula
(1910). Scores named `..._512` are over means of four windows, those named `..._visit` over all windows of one episode
of a camera.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meta import data
from meta.benchmark import corruptions
from meta.benchmark.report import commit
from meta.bundle import Bundle, load_bundle
from meta.calibration_shifts import CALIBRATION
from meta.estimator import AccuracyModel, Array, Table, concatenated, fit_estimator
from meta.labelled_run import WINDOW_STEPS, LabelledRun, cameras, run_labelled
from meta.proxies import SIGNALS, Observer
from meta.shifts import HELD_OUT, Shift
from meta.source import Preprocessing, image_tensor
from schemas.bundle import Estimator
from schemas.errors import BundleError

CAMERAS = 30
KINDS = ("adapted", "unadapted")
BARS = {"mae_points": 4.0, "spearman": 0.9, "coverage90": [0.85, 0.95]}
BINS = 15  # of the expected calibration error


def run_proxies(folder: Path, report: Path, command: str, quick: bool, say: Callable[[str], None] = print) -> None:
    """Measure a bundle, and write the report after every seed. Raises BundleError if it has no estimator."""
    bundle = load_bundle(folder)
    estimator = bundle.manifest.calibration.estimator
    if estimator is None:
        raise BundleError(f"{folder} has no accuracy estimator; run 'driftkeel bundle calibrate {folder}'")
    torch.set_num_threads(2)
    windows, seeds = (6, 1) if quick else (12, 3)
    say("simulated shifts of calibration, for every signal alone")
    fitted = _single_signals(bundle, windows)
    families: dict[str, dict[str, Shift]] = {
        "held_out": HELD_OUT,
        "corruptions": {name: as_shift(one) for name, one in corruptions.TEST.items()},
    }
    seen: dict[str, list[LabelledRun]] = {}
    for seed in range(seeds):
        for family, shifts in families.items():
            for kind in KINDS:
                say(f"{family}, {kind}, seed {seed}")
                one = _watched(bundle, shifts, seed, windows, kind == "adapted")
                seen.setdefault(f"{family}/{kind}", []).append(one)
        content = {
            "command": command,
            "commit": commit(),
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "bundle": bundle.hash,
            "seeds": seed + 1,
            "cameras": CAMERAS,
            "frames_per_camera": windows * 128,
            "bars": BARS,
            "results": _results(bundle, seen, estimator, fitted),
        }
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        for kind in (*KINDS, "all"):
            say(f"{kind}: {json.dumps(content['results'][kind]['combination'])}")


def _results(
    bundle: Bundle, seen: dict[str, list[LabelledRun]], estimator: Estimator, fitted: dict[str, Estimator]
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    told = {name: [_window_table(one) for one in some] for name, some in seen.items()}
    for name, tables in told.items():
        result[name] = _all_scores(tables, estimator, fitted) | {
            "published": _calibration_errors(bundle, seen[name]),
            "accuracy": round(float(np.mean([t.truth[:, 0].mean() for t in tables])), 4),
        }
    for kind in KINDS:
        both = [table for name, tables in told.items() if name.endswith(f"/{kind}") for table in tables]
        result[kind] = _all_scores(both, estimator, fitted)
    result["all"] = _all_scores([table for tables in told.values() for table in tables], estimator, fitted)
    return result


def as_shift(corruption: corruptions.Corruption) -> Shift:
    """A corruption of the accuracy benchmark as a shift: (0, 1] is divided among its five severities."""

    def shift(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
        shifted, levels = images.clone(), (5 * severity).ceil().long()
        for level in levels.unique().tolist():
            if level:
                own = levels == level
                shifted[own] = corruption(images[own], level, random).clamp(0, 1)
        return shifted

    return shift


def _watched(
    bundle: Bundle, shifts: dict[str, Shift], seed: int, windows: int, adapt: bool, part: str = "test"
) -> LabelledRun:
    own = data.fashion_mnist("test") if part == "test" else data.fashion_mnist("train").part(*data.CALIBRATION_PART)
    preprocessing, calibration = Preprocessing.of(bundle.manifest.preprocess), bundle.manifest.calibration
    random = torch.Generator().manual_seed(10_000 + 2 * seed + adapt)
    images, labels = image_tensor(own.images), torch.from_numpy(own.labels)
    observer = Observer(bundle.model, bundle.statistics, calibration.threshold, calibration.entropies)
    streams = cameras(images, labels, shifts, CAMERAS, random)
    model = AccuracyModel(calibration.estimator) if calibration.estimator is not None else None
    return run_labelled(bundle.method, observer, streams, preprocessing, windows * WINDOW_STEPS, adapt, model)


def _single_signals(bundle: Bundle, windows: int) -> dict[str, Estimator]:
    names, groups = list(CALIBRATION), []
    for number in range(3):
        shifts = {name: CALIBRATION[name] for name in names[number::3]}
        groups.append(
            concatenated(
                [_watched(bundle, shifts, 100 + number, windows, adapt, "tuning").table() for adapt in (True, False)]
            )
        )
    fitted = {}
    for place, name in enumerate(SIGNALS):
        own = [Table(group.values[:, place : place + 1], group.truth) for group in groups]
        fitted[name] = fit_estimator([name], own)[0]
    return fitted


@dataclass(frozen=True)
class WindowTable(Table):
    """A table with accuracies on two halves of the items (N, 2), and the episode that each window lies in (N,)."""

    halves: Array
    visit: Array


def _window_table(seen: LabelledRun) -> WindowTable:
    table = seen.table()
    camera = np.arange(len(table.truth)) % CAMERAS
    return WindowTable(table.values, table.truth, seen.at(seen.halves), 1_000 * seen.at(seen.visits) + camera)


def _all_scores(tables: Sequence[WindowTable], estimator: Estimator, fitted: dict[str, Estimator]) -> dict[str, Any]:
    places = [SIGNALS.index(name) for name in estimator.signals]
    return {
        "truth": _best_possible(tables),
        "combination": _scores(tables, places, estimator),
        "source": _scores(tables, places, estimator, target=1),
        **{name: _scores(tables, [place], fitted[name]) for place, name in enumerate(SIGNALS)},
    }


def _scores(
    tables: Sequence[WindowTable], places: list[int], estimator: Estimator, target: int = 0
) -> dict[str, float]:
    """The scores of an estimator; `target` 0: for the adapted model, 1: for the source. Rows: time, then camera."""
    model = AccuracyModel(estimator)
    guesses = [model.predict(table.values[:, places])[:, target] for table in tables]
    truths = [table.truth[:, target] for table in tables]
    low, high = model.interval(np.concatenate(guesses))
    real = np.concatenate(truths)
    scores = {} if target else {"coverage90": round(float(((real >= low) & (real <= high)).mean()), 3)}
    scores["bias_points"] = round(100 * float((np.concatenate(guesses) - real).mean()), 2)
    for name, means in SPANS.items():
        guess, truth = (
            np.concatenate([means(v, t) for v, t in zip(values, tables, strict=True)]) for values in (guesses, truths)
        )
        scores |= {f"mae_points{name}": round(100 * float(np.abs(guess - truth).mean()), 2)}
        scores |= {f"spearman{name}": round(spearman(guess, truth), 3)}
    return scores


def _best_possible(tables: Sequence[WindowTable]) -> dict[str, float]:
    """The rank correlation that a perfect estimate would reach, given the truth's sampling error."""
    best = {}
    for name, means in SPANS.items():
        first, second = (np.concatenate([means(t.halves[:, i], t) for t in tables]) for i in (0, 1))
        alike = max(0.0, spearman(first, second))
        best[f"best_spearman{name}"] = round(math.sqrt(2 * alike / (1 + alike)), 3)
        best[f"sampling_error_points{name}"] = round(50 * float(np.abs(first - second).mean()), 2)
    return best


def _windows(values: Array, table: WindowTable) -> Array:
    return values


def _four(values: Array, table: WindowTable) -> Array:
    """Means over four successive windows of each camera."""
    by_moment = values.reshape(-1, CAMERAS)
    whole = len(by_moment) // 4 * 4
    return by_moment[:whole].reshape(-1, 4, CAMERAS).mean(1).ravel()


def _visits(values: Array, table: WindowTable) -> Array:
    """Means over all windows of each episode."""
    _, place, count = np.unique(table.visit, return_inverse=True, return_counts=True)
    means: Array = np.bincount(place, values) / count
    return means


SPANS = {"": _windows, "_512": _four, "_visit": _visits}


def spearman(first: Array, second: Array) -> float:
    """Rank correlation, ties ranked by their mean."""
    ranks = []
    for values in (first, second):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum() - (counts - 1) / 2)[inverse])
    if min(np.ptp(r) for r in ranks) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def _calibration_errors(bundle: Bundle, seen: Sequence[LabelledRun]) -> dict[str, float]:
    """Expected calibration error (Guo et al., ICML 2017), in points, of published confidences and of raw ones."""
    calibration = bundle.manifest.calibration
    raw, published, right = [], [], []
    for one in seen:
        before = None
        for step, (answers, labels) in enumerate(zip(one.answers, one.labels, strict=True)):
            proxies = one.proxies[step]
            excess = (
                torch.zeros(len(labels)) if before is None else before.repeat_interleave(len(labels) // len(proxies))
            )
            temperature = calibration.temperature * (calibration.softening * excess).exp()
            raw.append(answers.softmax(1).amax(1))
            published.append((answers / temperature.unsqueeze(1)).softmax(1).amax(1))
            right.append(answers.argmax(1) == labels)
            before = torch.tensor([p.signals["answer_confidence"] - (p.accuracy or 0.0) for p in proxies])
    hits = torch.cat(right).float()
    return {"ece_points": _ece(torch.cat(published), hits), "ece_points_raw": _ece(torch.cat(raw), hits)}


def _ece(confidence: Tensor, right: Tensor) -> float:
    places = (confidence * BINS).long().clamp(max=BINS - 1)
    gap = torch.zeros(BINS).index_add(0, places, confidence - right)
    return round(100 * float(gap.abs().sum()) / max(1, len(right)), 2) if not math.isnan(float(gap.sum())) else math.nan
