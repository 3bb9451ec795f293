"""ROID: certainty and diversity weights, consistency, and weight ensembling with the source."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from meta.baselines.augment import augmented
from meta.baselines.base import Baseline, Options, choose, frame_keys, next_age
from meta.method import Forward, State, Update
from meta.objective import entropy, per_stream_mean


class Roid(Baseline):
    """Doebler et al., "Universal Test-Time Adaptation through Weight Ensembling, Diversity Weighting, and Prior
    Correction", WACV 2024.

    Soft likelihood ratio (probabilities clipped at 0.99), weighted by certainty and diversity (temperature 1/3,
    running mean of the softmax with momentum 0.9); symmetric cross-entropy against an augmented view; after each step
    1% back to the source; logits times the smoothed prior of the batch; Adam 1e-3. The weights are scaled to the range
    seen in the batch: where that range is empty, as in a batch of one, they are 1 here (0/0 in the published code).
    """

    name = "roid"
    published: ClassVar[Options] = {"step_size": 1e-3}
    temperature, momentum, source_momentum = 1 / 3, 0.9, 0.99

    def memory(self, streams: int) -> State:
        return {
            "mean_probability": torch.full((streams, self.classes), 1 / self.classes, device=self.device),
            "age": torch.zeros(streams, device=self.device),
        }

    def predict(self, frames: Tensor, stream: Tensor, state: State) -> Forward:
        forward = super().predict(frames, stream, state)
        with torch.no_grad():
            counts = forward.counts.clamp_min(1).unsqueeze(1)
            prior = per_stream_mean(forward.logits.softmax(1), stream, forward.counts.clamp_min(1))
            smooth = (1 / counts).clamp_min(1 / self.classes) / prior.amax(1, keepdim=True)
            smoothed = (prior + smooth) / (1 + smooth * self.classes)
            corrected = forward.logits * smoothed.index_select(0, stream)
        kept = forward.kept | {"uncorrected": forward.logits}
        return Forward(corrected, forward.features, forward.rows, stream, forward.counts, state, frames, kept)

    def loss(self, forward: Forward) -> tuple[Tensor, Tensor, State]:
        logits, stream, state = forward.kept["uncorrected"], forward.stream, forward.state
        streams, counts = len(forward.counts), forward.counts.clamp_min(1)
        certain = logits.detach()
        probability = certain.softmax(1)
        usual = state["mean_probability"].index_select(0, stream)
        diversity = _to_range(1 - torch.cosine_similarity(usual, probability, dim=1), stream, streams)
        mean = per_stream_mean(diversity, stream, counts).index_select(0, stream)
        chosen = diversity >= mean - 1e-6
        certainty = _to_range(-entropy(certain), stream, streams)
        weights = torch.exp(diversity * certainty / self.temperature) * chosen
        total = soft_likelihood_ratio(logits) * weights
        if bool(chosen.any()):
            keys = frame_keys(state, stream)
            seen = augmented(forward.frames[chosen], self.setup.mean, self.setup.std, keys[chosen])
            second = self.logits_under_graph(forward, seen, chosen)
            agree = symmetric_cross_entropy(second, logits[chosen]) * weights[chosen]
            total = total.index_add(0, torch.nonzero(chosen).flatten(), agree)
        mean_probability = torch.lerp(
            per_stream_mean(probability, stream, counts), state["mean_probability"], self.momentum
        )
        memory = {"mean_probability": mean_probability, "age": next_age(state)}
        return per_stream_mean(total, stream, counts), forward.counts > 0, memory

    def logits_under_graph(self, forward: Forward, frames: Tensor, chosen: Tensor) -> Tensor:
        """Logits of augmented views of the chosen frames, with a graph to the same rows."""
        stream = forward.stream[chosen]
        return self.model(frames, forward.rows[chosen], self.moments(stream, forward.state))

    def step(self, forward: Forward, loss: Tensor, gradient: Tensor, active: Tensor, memory: State) -> Update:
        update = super().step(forward, loss, gradient, active, memory)
        pulled = {"affine": torch.lerp(self.model.source_affine, update.state["affine"], self.source_momentum)}
        return Update(update.state | choose(active, pulled, update.state), update.signals)


def soft_likelihood_ratio(logits: Tensor, clip: float = 0.99) -> Tensor:
    """-sum_c p_c log(p_c / (1 - p_c)), (B,)."""
    p = logits.softmax(1).clamp(0.0, clip)
    return -(p * torch.log(p / (1 - p) + 1e-5)).sum(1)


def symmetric_cross_entropy(first: Tensor, second: Tensor) -> Tensor:
    """Half of the cross-entropy in either direction, (B,)."""
    forward = -(second.softmax(1) * first.log_softmax(1)).sum(1)
    return (forward - (first.softmax(1) * second.log_softmax(1)).sum(1)) / 2


def _to_range(values: Tensor, stream: Tensor, streams: int) -> Tensor:
    """Values (B,) scaled to [0, 1] within each stream; all 1 if they are the same."""
    low = values.new_full((streams,), torch.inf).scatter_reduce(0, stream, values, "amin").index_select(0, stream)
    high = values.new_full((streams,), -torch.inf).scatter_reduce(0, stream, values, "amax").index_select(0, stream)
    span = high - low
    return torch.where(span > 1e-9, (values - low) / span.clamp_min(1e-9), 1.0)
