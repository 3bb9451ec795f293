"""Baselines on the objective of `mgg`: SGD and Adam. Also the oracle, which uses labels.

Committed results are identified by the digest of `meta.baselines.filtered`, which imports `OwnSgd` from this module:
keep both names.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from meta.baselines.base import Adam, Baseline, Options, Setup, Sgd, choose
from meta.method import Forward, State, Update
from meta.objective import discrepancy, entropy, per_stream_mean, running


class OwnObjective(Baseline):
    """Entropy plus feature discrepancy (`meta.objective`), with an optional pull towards the source after each step."""

    discrepancy_weight, window = 10.0, 32

    def __init__(self, setup: Setup, pull: float = 0.0, statistics: Any = "source", **options: Any) -> None:
        super().__init__(setup, statistics=statistics, **options)
        self.pull = pull

    @classmethod
    def grid(cls, batch_norm: bool) -> list[Options]:
        """Step sizes, with and without a pull of 1%; for BatchNorm also running statistics, without a pull."""
        tries: list[Options] = [{"step_size": size, "pull": pull} for size in cls.steps for pull in (0.0, 0.01)]
        if batch_norm:
            tries += [{"step_size": size, "statistics": "running", "amount": 64.0} for size in cls.steps]
        return tries

    def memory(self, streams: int) -> State:
        source = self.setup.source
        return {
            "feature_mean": source.mean.expand(streams, -1).clone(),
            "feature_square": source.square.expand(streams, -1).clone(),
        }

    def predict(self, frames: Tensor, stream: Tensor, state: State) -> Forward:
        rows = state["affine"].detach().index_select(0, stream).requires_grad_()
        moments = self.moments(stream, state)
        with torch.enable_grad():
            logits, features = self.model.forward_with_features(frames, rows, moments)
        return self.forward_of(frames, rows, stream, state, logits, moments, features=features)

    def loss(self, forward: Forward) -> tuple[Tensor, Tensor, State]:
        stream, state, counts = forward.stream, forward.state, forward.counts.clamp_min(1)
        features = forward.kept["features"]
        mean = running(state["feature_mean"], per_stream_mean(features, stream, counts), counts, self.window)
        square = running(state["feature_square"], per_stream_mean(features**2, stream, counts), counts, self.window)
        distance = discrepancy(mean, square, self.setup.source)
        loss = per_stream_mean(entropy(forward.logits), stream, counts) + self.discrepancy_weight * distance
        memory = {"feature_mean": mean.detach(), "feature_square": square.detach()}
        return loss, forward.counts > 0, memory

    def step(self, forward: Forward, loss: Tensor, gradient: Tensor, active: Tensor, memory: State) -> Update:
        update = super().step(forward, loss, gradient, active, memory)
        pulled = {"affine": torch.lerp(update.state["affine"], self.model.source_affine, self.pull)}
        return Update(update.state | choose(active, pulled, update.state), update.signals)


class OwnSgd(OwnObjective):
    """Plain SGD without momentum. There is no published setting; `published` is 3e-3, tried first."""

    name = "sgd"
    published: ClassVar[Options] = {"step_size": 3e-3}
    steps = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)

    def __init__(self, setup: Setup, **options: Any) -> None:
        super().__init__(setup, optimizer=Sgd(0.0), **options)


class OwnAdam(OwnObjective):
    """Adam. There is no published setting; `published` is Adam's usual 1e-3."""

    name = "adam"
    published: ClassVar[Options] = {"step_size": 1e-3}

    def __init__(self, setup: Setup, **options: Any) -> None:
        super().__init__(setup, optimizer=Adam(), **options)


class Oracle(Baseline):
    """Cross-entropy on the true labels, one Adam step per batch: an upper bound for adapting these parameters.

    The benchmark sets `labels` (B,) to those of the next update's frames.
    """

    name = "oracle"
    published: ClassVar[Options] = {"step_size": 1e-2}
    steps = (1e-3, 3e-3, 1e-2, 3e-2)
    labels: Tensor | None = None

    def __init__(self, setup: Setup, statistics: Any = "source", **options: Any) -> None:
        super().__init__(setup, statistics=statistics, **options)

    def loss(self, forward: Forward) -> tuple[Tensor, Tensor, State]:
        if self.labels is None or len(self.labels) != len(forward.logits):
            raise ValueError("the oracle needs the labels of these frames")
        loss = F.cross_entropy(forward.logits, self.labels, reduction="none")
        return per_stream_mean(loss, forward.stream, forward.counts.clamp_min(1)), forward.counts > 0, {}
