"""Calibration at the centre: source statistics, temperature, the accuracy estimate, and what is normal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from meta.method import AdaptationMethod
from meta.norms import AdaptableModel
from meta.objective import SourceStatistics, feature_statistics
from meta.shifts import TUNING
from meta.simulate import SimulatedStream
from meta.source import as_frames, frames_at_once
from meta.train import Preprocessing, draw
from schemas.bundle import Calibration, Limits


@torch.no_grad()
def source_statistics(model: AdaptableModel, images: Tensor, preprocessing: Preprocessing) -> SourceStatistics:
    """Feature statistics on clean images uint8 (N, ch, h, w), over all and per class."""
    features, probability = [], []
    for part in images.split(frames_at_once(images)):
        frames = as_frames(part.float() / 255, preprocessing.mean, preprocessing.std)
        logits, pooled = model.forward_with_features(frames)
        features.append(pooled)
        probability.append(logits.softmax(1))
    return feature_statistics(torch.cat(features), torch.cat(probability))


@dataclass
class _Observed:
    logits: Tensor  # (windows, frames, classes)
    right: Tensor  # (windows, frames)
    labels: Tensor  # (windows, frames)
    gradient_norms: Tensor
    distances: Tensor


def calibrate(
    method: AdaptationMethod,
    images: Tensor,
    labels: Tensor,
    preprocessing: Preprocessing,
    seed: int,
    windows: int = 12,
    streams: int = 24,
) -> tuple[Calibration, Limits]:
    """Run the finished method on simulated streams it was not trained on, and fit what the bundle promises.

    images uint8 (N, ch, h, w), labels (N,); `windows` of eight micro-batches are taken from each of the `streams`.
    """
    seen = _observe(method, images, labels, preprocessing, seed, windows, streams)
    temperature = _temperature(seen.logits.flatten(0, 1), seen.labels.flatten())
    confidence = (seen.logits / temperature).softmax(-1).amax(-1).mean(1).numpy()
    accuracy = seen.right.float().mean(1).numpy()
    slope, intercept = np.polyfit(confidence, accuracy, 1)
    estimate = np.clip(intercept + slope * confidence, 0, 1)
    calibration = Calibration(
        temperature=temperature,
        intercept=float(intercept),
        slope=float(slope),
        error=float(np.abs(estimate - accuracy).mean()),
    )
    limits = Limits(
        raw_gradient_norm=float(seen.gradient_norms.quantile(0.999)),
        source_distance=float(seen.distances.quantile(0.999)),
    )
    return calibration, limits


def _observe(
    method: AdaptationMethod,
    images: Tensor,
    labels: Tensor,
    preprocessing: Preprocessing,
    seed: int,
    windows: int,
    streams: int,
) -> _Observed:
    random = torch.Generator().manual_seed(seed)
    cameras = [SimulatedStream(images, labels, TUNING, random) for _ in range(streams)]
    frames, window = 16, 8
    steps = windows * window
    state = {name: tensor.detach() for name, tensor in method.fresh(len(cameras)).items()}
    logits, truths, norms, distances = [], [], [], []
    for _ in range(steps):
        for camera in cameras:
            if camera.over:
                camera.begin()
        batch, truth, stream = draw(cameras, frames, preprocessing)
        forward = method.predict(batch, stream, state)
        logits.append(forward.answer.view(len(cameras), frames, -1))
        truths.append(truth.view(len(cameras), frames))
        update = method.update(forward)
        state = {name: tensor.detach() for name, tensor in update.state.items()}
        norms.append(update.signals["raw_gradient_norm"])
        distances.append(update.signals["source_distance"])
    # Windows of consecutive micro-batches of one stream: (streams x windows, frames in a window).
    joined = torch.stack(logits, 1).reshape(len(cameras) * steps // window, window * frames, -1)
    truth = torch.stack(truths, 1).reshape(joined.shape[:2])
    return _Observed(joined, joined.argmax(-1) == truth, truth, torch.cat(norms), torch.cat(distances))


def _temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature with the lowest negative log-likelihood (Guo et al., ICML 2017)."""
    candidates = torch.logspace(-1, 1, 81)
    losses = torch.stack([F.cross_entropy(logits / t, labels) for t in candidates])
    return float(candidates[int(losses.argmin())])
