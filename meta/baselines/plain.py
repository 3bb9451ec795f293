"""Baselines without gradients: the source model, BatchNorm statistics, NEO and LAME."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from meta.baselines.base import (
    Baseline,
    NoOptimizer,
    Options,
    Setup,
    Statistics,
    classifier,
    longest_stream,
    position_in_stream,
    with_penultimate,
)
from meta.method import Forward, State, Update, where_seen


class Source(Baseline):
    """The source model as it is."""

    name = "source"
    published: ClassVar[Options] = {"statistics": "source"}

    def __init__(self, setup: Setup, statistics: Statistics = "source", amount: float = 64.0) -> None:
        super().__init__(setup, 0.0, statistics, amount, NoOptimizer())

    @classmethod
    def grid(cls, batch_norm: bool) -> list[Options]:
        return []

    def predict(self, frames: Tensor, stream: Tensor, state: State) -> Forward:
        moments = self.moments(stream, state)
        with torch.no_grad():
            logits = self.model(frames, None, moments)
        return self.forward_of(frames, None, stream, state, logits, moments)

    def update(self, forward: Forward) -> Update:
        return self.unmoved(forward, {})


class BatchStatistics(Source):
    """BatchNorm statistics from the test frames, with the source affine.

    Published: BN-1, the batch alone (Nado et al., "Evaluating Prediction-Time Batch Normalization for Robustness
    under Covariate Shift", 2020). Tuned chooses between that, the blend with a prior (Schneider et al., "Improving
    robustness against common corruptions by covariate shift adaptation", NeurIPS 2020, which has 16 for small
    batches), and running means. Without BatchNorm it is the source model.
    """

    name = "bn"
    published: ClassVar[Options] = {"statistics": "batch"}

    @classmethod
    def grid(cls, batch_norm: bool) -> list[Options]:
        if not batch_norm:
            return []
        prior = [{"statistics": "prior", "amount": float(frames)} for frames in (4, 16, 64, 256)]
        running = [{"statistics": "running", "amount": float(frames)} for frames in (16, 64, 256, 1024)]
        return [{"statistics": "batch"}, *prior, *running]


class Neo(Source):
    """Subtract the running mean of the classifier's input.

    Murphy et al., "NEO: No-Optimization Test-Time Adaptation through Latent Re-Centering", ICLR 2026,
    arXiv 2510.05635: it centres target features at the origin and has no hyperparameters. Tuned may instead move
    them to where the source's features had their mean, which plain ReLU features need, and may count the source's
    mean as `prior` frames. Without source frames only the published form exists.
    """

    name = "neo"
    published: ClassVar[Options] = {"centre": "origin"}

    def __init__(self, setup: Setup, centre: str = "origin", prior: float = 0.0) -> None:
        super().__init__(setup)
        if centre not in ("origin", "source"):
            raise ValueError(f"centre {centre!r} is neither origin nor source")
        self.head = classifier(setup)
        self.prior = prior
        self.target = self.start = torch.zeros(self.head.in_features, device=self.device)
        if centre == "source" and setup.source_frames is not None:
            with torch.no_grad():
                _, features = with_penultimate(self.head, lambda: setup.model(setup.source_frames))
            self.target = self.start = features.mean(0)

    @classmethod
    def grid(cls, batch_norm: bool) -> list[Options]:
        moved = [{"centre": "source", "prior": float(prior)} for prior in (0, 16, 64, 256)]
        return [{"centre": "origin"}, *moved]

    def memory(self, streams: int) -> State:
        return {
            "feature_mean": self.start.expand(streams, -1).clone(),
            "seen": torch.full((streams,), self.prior, device=self.device),
        }

    def predict(self, frames: Tensor, stream: Tensor, state: State) -> Forward:
        with torch.no_grad():
            _, features = with_penultimate(self.head, lambda: self.model(frames))
            seen = state["seen"] + torch.bincount(stream, minlength=len(state["seen"]))
            total = (state["feature_mean"] * state["seen"].unsqueeze(1)).index_add(0, stream, features)
            mean = total / seen.clamp_min(1).unsqueeze(1)
            centred = features - mean.index_select(0, stream) + self.target
            logits = F.linear(centred, self.head.weight, self.head.bias)
        return self.forward_of(frames, None, stream, state, logits, None, feature_mean=mean, seen=seen)

    def observe(self, forward: Forward) -> State:
        return forward.state | where_seen(forward, {name: forward.kept[name] for name in ("feature_mean", "seen")})

    def update(self, forward: Forward) -> Update:
        return self.unmoved(forward, self.observe(forward))


class Lame(Source):
    """Smooth the probabilities of a batch over its nearest neighbours; no parameter changes.

    Boudiaf et al., "Parameter-free Online Test-time Adaptation", CVPR 2022: Laplacian-adjusted maximum likelihood
    with an RBF affinity whose width is the mean distance to the fifth neighbour, lambda 1, up to 100 rounds. A frame is
    its own first neighbour, as in the published code: with `neighbours` of 1, which `tuned` may choose, the width is at
    its floor, no frame is near another, and labels are those of source. Frames see the frames of their own stream in
    the same batch only. Logits are the logarithms of the smoothed probabilities. The width has a floor: it is 0 for a
    batch of one, where the published code divides by it.
    """

    name = "lame"
    published: ClassVar[Options] = {"neighbours": 5}

    def __init__(self, setup: Setup, neighbours: int = 5) -> None:
        super().__init__(setup)
        self.head = classifier(setup)
        self.neighbours = neighbours

    @classmethod
    def grid(cls, batch_norm: bool) -> list[Options]:
        return [{"neighbours": count} for count in (1, 3, 5)]

    def predict(self, frames: Tensor, stream: Tensor, state: State) -> Forward:
        with torch.no_grad():
            logits, features = with_penultimate(self.head, lambda: self.model(frames))
            logits = self._smoothed(logits, F.normalize(features, dim=1), stream, len(state["affine"]))
        return self.forward_of(frames, None, stream, state, logits, None)

    def _smoothed(self, logits: Tensor, features: Tensor, stream: Tensor, streams: int) -> Tensor:
        """Solves the problem of each stream separately, as a padded batch (S, b, ...)."""
        place = position_in_stream(stream)
        longest = max(1, longest_stream(place))
        log_p = logits.new_zeros(streams, longest, logits.shape[1])
        padded = features.new_zeros(streams, longest, features.shape[1])
        real = torch.zeros(streams, longest, dtype=torch.bool, device=self.device)
        log_p[stream, place], padded[stream, place] = logits.log_softmax(1).clamp_min(-23.0), features
        real[stream, place] = True
        affinity = self._affinity(padded, real)
        smooth, moving = log_p.softmax(2), torch.ones(streams, 1, 1, dtype=torch.bool, device=self.device)
        for _ in range(100):  # Each stream stops when it has converged, however long others take.
            previous, smooth = smooth, torch.where(moving, (log_p + affinity @ smooth).softmax(2), smooth)
            moving = (smooth - previous).abs().amax((1, 2), keepdim=True) >= 1e-5
            if not bool(moving.any()):
                break
        return smooth[stream, place].clamp_min(1e-20).log()

    def _affinity(self, features: Tensor, real: Tensor) -> Tensor:
        # Exact distances: matrix products, which cdist uses for more than 25 frames, would depend on the padding.
        distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
        pairs = real.unsqueeze(1) & real.unsqueeze(2)
        nearest = distance.masked_fill(~pairs, torch.inf).sort(2).values
        counts = real.sum(1)
        last = (counts.clamp(1, self.neighbours) - 1).view(-1, 1, 1).expand(-1, real.shape[1], 1)
        widths = nearest.gather(2, last).squeeze(2).masked_fill(~real, 0.0)
        width = (widths.sum(1) / counts.clamp_min(1)).clamp_min(1e-4).view(-1, 1, 1)
        return torch.exp(-(distance**2) / (2 * width**2)) * pairs
