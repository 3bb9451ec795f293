"""Calibration at the centre: source statistics, temperatures, accuracy estimator, and limits of normal operation."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from meta.calibration_shifts import CALIBRATION
from meta.estimator import AccuracyModel, Array, concatenated, fit_estimator
from meta.labelled_run import WINDOW_STEPS, LabelledRun, cameras, run_labelled
from meta.mgg import MGG
from meta.norms import AdaptableModel
from meta.objective import SourceStatistics, entropy, feature_statistics
from meta.paper import PaperMGG
from meta.proxies import Observer
from meta.shifts import Shift
from meta.source import Preprocessing, frames_at_once
from schemas.bundle import Calibration, Limits

STREAMS = 24  # simulated at a time
ROUNDS = 10  # of simulation; no two have a shift in common
AT_ONCE = 2  # rounds in parallel: each takes the memory of a pass, and a large model fills that
STRENGTH = 1.6  # factor on severities, so that the estimator sees severe shifts, too
# The estimator's signals: of nearly equivalent ones, the one with the smallest error on shifts left out.
FITTED = (
    *("confidence", "answer_confidence", "above", "energy", "dropout", "marginal", "changed", "distance"),
    *("discrepancy", "discrepancy_middle", "discrepancy_last", "odd", "off_prototype"),
    *("source_confidence", "source_odd_last", "flips", "gap"),
)
QUANTILES = 65  # of the source model's entropy on clean frames
RARE = 0.001  # share of the updates in calibration that lie beyond a limit
COSINE_STEPS = 64  # updates over which the guard averages the cosine
SOFTENINGS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
LEAST_MARGIN = 0.02
Round = tuple[LabelledRun, LabelledRun]  # with updates, and without


@torch.no_grad()
def source_statistics(model: AdaptableModel, images: Tensor, preprocessing: Preprocessing) -> SourceStatistics:
    """Feature statistics of clean images uint8 (N, ch, h, w), over all and per class."""
    features, probability = [], []
    for part in images.split(frames_at_once(images)):
        logits, pooled = model.forward_with_features(preprocessing.frames(part))
        features.append(pooled)
        probability.append(logits.softmax(1))
    return feature_statistics(torch.cat(features), torch.cat(probability))


def calibrate(
    method: MGG | PaperMGG,
    images: Tensor,
    labels: Tensor,
    preprocessing: Preprocessing,
    seed: int,
    windows: int = 12,
    streams: int = STREAMS,
    say: Callable[[str], None] = print,
) -> tuple[Calibration, Limits]:
    """Run the trained method on simulated streams of new images, and fit the bundle's calibration and limits.

    images uint8 (N, ch, h, w), labels (N,). Each round takes `windows` of eight micro-batches from each of `streams`,
    once with updates and once without. No two rounds have a shift in common, so that the error of the estimate is
    measured on shifts that it was not fitted to.
    """
    threshold, entropies = _clean(method.model, images, labels, preprocessing)
    observer = Observer(method.model, method.source, threshold, entropies)
    shifts = _shares(seed)

    def play(number: int, wanted: Callable[[], bool]) -> Round:
        def seen(adapt: bool) -> LabelledRun:
            random = torch.Generator().manual_seed(1_000 * seed + 2 * number + adapt)
            line = cameras(images, labels, shifts[number], streams, random, STRENGTH)
            return run_labelled(method, observer, line, preprocessing, windows * WINDOW_STEPS, adapt, wanted=wanted)

        return seen(True), seen(False)

    rounds = _side_by_side(play, say)
    adapted = [with_updates for with_updates, _ in rounds]
    groups = [concatenated([seen.table(FITTED) for seen in both]) for both in rounds]
    estimator, guess, truth = fit_estimator(FITTED, groups)
    plain = torch.cat([part for seen in adapted for part in seen.plain])
    answers = torch.cat([part for seen in adapted for part in seen.answers])
    right = torch.cat([part for seen in adapted for part in seen.labels])
    temperature, softening = _softened(answers, right, _excess(adapted, AccuracyModel(estimator)))
    slope, intercept = _line(adapted, temperature)
    calibration = Calibration(
        temperature=temperature,
        source_temperature=_temperature(plain, right),
        softening=softening,
        intercept=intercept,
        slope=slope,
        error=float(np.abs(guess - truth)[:, 0].mean()),
        threshold=threshold,
        entropies=entropies,
        estimator=estimator,
    )
    return calibration, _limits(adapted, guess, truth)


def _shares(seed: int) -> list[dict[str, Shift]]:
    """The shifts of each round; shuffled, so that no round has all of one kind."""
    names = list(CALIBRATION)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{names[i]: CALIBRATION[names[i]] for i in order[number::ROUNDS]} for number in range(ROUNDS)]


def _side_by_side(play: Callable[[int, Callable[[], bool]], Round], say: Callable[[str], None]) -> list[Round]:
    """The results of all rounds, in order. AT_ONCE run in parallel, because more threads for one pass gain little.

    `play` gets the number of its round, and a function that says whether the round is still wanted.
    """
    threads, started, over = torch.get_num_threads(), time.monotonic(), threading.Event()
    say(f"calibration: {ROUNDS} rounds")
    lanes = min(AT_ONCE, threads)
    pool = ThreadPoolExecutor(lanes, "calibration", torch.set_num_threads, (threads // lanes,))
    try:
        rounds = [pool.submit(play, number, lambda: not over.is_set()) for number in range(ROUNDS)]
        for done, one in enumerate(as_completed(rounds), 1):
            one.result()
            left = (time.monotonic() - started) / done * (ROUNDS - done)
            say(f"calibration: {done} of {ROUNDS} rounds" + (f", about {left:.0f} s left" if done < ROUNDS else ""))
        return [one.result() for one in rounds]
    finally:
        over.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # for threads that start later


@torch.no_grad()
def _clean(
    model: AdaptableModel, images: Tensor, labels: Tensor, preprocessing: Preprocessing
) -> tuple[float, list[float]]:
    """From clean images: ATC's threshold, the quantile of confidence at the error rate; quantiles of entropy / ln K."""
    logits = torch.cat([model(preprocessing.frames(part)) for part in images.split(frames_at_once(images))])
    right = float((logits.argmax(1) == labels).float().mean())
    threshold = float(logits.softmax(1).amax(1).quantile(1 - right))
    steps = torch.linspace(0, 1, QUANTILES + 2)[1:-1]
    quantiles = (entropy(logits) / math.log(logits.shape[1])).quantile(steps)
    return threshold, [float(f"{value:.5g}") for value in quantiles.tolist()]


def _excess(adapted: Sequence[LabelledRun], model: AccuracyModel) -> Tensor:
    """For every frame, the stream's mean confidence minus its estimated accuracy after the previous micro-batch."""
    parts = []
    for seen in adapted:
        before = None
        for step, labels in enumerate(seen.labels):
            frames = len(labels) // len(seen.proxies[step])
            excess = before if before is not None else np.zeros(len(seen.proxies[step]))
            parts.append(torch.from_numpy(excess).float().repeat_interleave(frames))
            values = np.array([[one.signals.get(name, math.nan) for name in FITTED] for one in seen.proxies[step]])
            confidence = np.array([one.signals["answer_confidence"] for one in seen.proxies[step]])
            before = confidence - model.predict(values)[:, 0]
    return torch.cat(parts)


def _softened(logits: Tensor, labels: Tensor, excess: Tensor) -> tuple[float, float]:
    """The temperature without excess, and the softening: logits are divided by temperature * exp(softening * excess).

    Both by the lowest negative log-likelihood.
    """
    tried = []
    for softening in SOFTENINGS:
        softer = logits / (softening * excess).exp().unsqueeze(1)
        temperature = _temperature(softer, labels)
        tried.append((float(F.cross_entropy(softer / temperature, labels)), temperature, softening))
    _, temperature, softening = min(tried)
    return temperature, softening


def _temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature with the lowest negative log-likelihood (Guo et al., ICML 2017)."""
    candidates = torch.logspace(-1, 1, 81)
    losses = torch.stack([F.cross_entropy(logits / t, labels) for t in candidates])
    return float(candidates[int(losses.argmin())])


def _line(adapted: Sequence[LabelledRun], temperature: float) -> tuple[float, float]:
    """Slope and intercept of a linear fit from mean confidence to accuracy, over windows, for use without signals."""
    confidence, accuracy = [], []
    for seen in adapted:
        streams = len(seen.proxies[0])
        for start in range(0, len(seen.labels), WINDOW_STEPS):
            part = slice(start, start + WINDOW_STEPS)
            sure = [(a / temperature).softmax(1).amax(1).view(streams, -1).mean(1) for a in seen.answers[part]]
            hits = [
                (a.argmax(1) == y).float().view(streams, -1).mean(1)
                for a, y in zip(seen.answers[part], seen.labels[part], strict=True)
            ]
            confidence.append(torch.stack(sure).mean(0))
            accuracy.append(torch.stack(hits).mean(0))
    slope, intercept = np.polyfit(torch.cat(confidence).numpy(), torch.cat(accuracy).numpy(), 1)
    return float(slope), float(intercept)


def _limits(adapted: Sequence[LabelledRun], guess: Array, truth: Array) -> Limits:
    """Limits that a share RARE of the updates exceeds, and the margin of the estimated gain over the source model."""
    norms = {
        name: torch.stack([signals[name] for seen in adapted for signals in seen.signals])
        for name in ("raw_gradient_norm", "generated_gradient_norm", "source_distance")
    }
    upper = {name: max(1e-6, float(values.flatten().quantile(1 - RARE))) for name, values in norms.items()}
    cosines = torch.cat([_running_mean(torch.stack([s["cosine"] for s in seen.signals])) for seen in adapted])
    harmless = truth[:, 0] >= truth[:, 1]
    gain = (guess[:, 0] - guess[:, 1])[harmless]
    margin = -float(np.quantile(gain, 10 * RARE)) if len(gain) else LEAST_MARGIN
    return Limits(**upper, cosine=max(-1.0, float(cosines.quantile(RARE)) - 0.05), gain_error=max(LEAST_MARGIN, margin))


def _running_mean(values: Tensor) -> Tensor:
    """Means of values (T, S) over the guard's window of updates, from the first full window on."""
    steps = min(COSINE_STEPS, len(values))
    sums = torch.cat([torch.zeros(1, values.shape[1]), values.cumsum(0)])
    return ((sums[steps:] - sums[:-steps]) / steps).flatten()
