"""The unsupervised objective: entropy plus feature discrepancy, for many streams in one pass.

For each stream L = mean_i H(softmax z_i) + weight * D, where D compares the stream's feature statistics with those of
clean source data (MGTTA, AAAI 2025, section 3). There are three differences from the paper:

- D is standardised per feature, so that one weight serves networks of any width.
- The statistics are running means over `window` frames that start at the source's, so that they are defined for a
  batch of one. The gradient is that of the newest frames as if they were the whole window; its size then does not
  depend on the batch.
- The source statistics are those of the classes that the stream shows. A camera that sees only shoes has other
  features than the source data without any shift, and must not be pulled towards shirts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from meta.method import Forward, State

EPSILON = 1e-5


@dataclass(frozen=True)
class SourceStatistics:
    """Pooled features of clean source frames: `mean` and standard deviation `std`, both (F,).

    `class_mean` and `class_square` (K, F) are first and second moments per class, where they are known.
    """

    mean: Tensor
    std: Tensor
    class_mean: Tensor | None = None
    class_square: Tensor | None = None

    def as_tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without those that are None, as they are stored in a file."""
        known = {name: getattr(self, name) for name in ("mean", "std", "class_mean", "class_square")}
        return {name: tensor for name, tensor in known.items() if tensor is not None}

    def to(self, device: torch.device) -> SourceStatistics:
        """The statistics on a device."""
        return SourceStatistics(**{name: tensor.to(device) for name, tensor in self.as_tensors().items()})

    @property
    def square(self) -> Tensor:
        """Second moment (F,)."""
        return self.mean**2 + self.std**2

    @property
    def scale(self) -> Tensor:
        """Standard deviation (F,), never zero."""
        return self.std.clamp_min(EPSILON**0.5)

    def expected(self, mix: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (S, F) that clean frames with the class mix (S, K) would have."""
        if self.class_mean is None or self.class_square is None:
            return self.mean.expand(len(mix), -1), self.scale.expand(len(mix), -1)
        mean = mix @ self.class_mean
        return mean, deviation(mean, mix @ self.class_square)


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy in nats of softmax(logits), (B, classes) to (B,)."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def per_stream_sum(values: Tensor, stream: Tensor, streams: int) -> Tensor:
    """Sum over each stream's frames: values (B,) or (B, F), stream (B,) in [0, S)."""
    return values.new_zeros(streams, *values.shape[1:]).index_add(0, stream, values)


def per_stream_mean(values: Tensor, stream: Tensor, counts: Tensor) -> Tensor:
    """Mean over each stream's frames: values (B,) or (B, F), stream (B,) in [0, S), counts (S,) float."""
    return per_stream_sum(values, stream, len(counts)) / counts.view(-1, *[1] * (values.dim() - 1))


def running(old: Tensor, new: Tensor, counts: Tensor, window: int) -> Tensor:
    """Exponential mean over about `window` frames after `counts` (S,) more frames with mean `new` (S, F).

    The value is the running mean, but the gradient that of `new` (a straight-through estimator).
    """
    value = torch.lerp(new.detach(), old, _kept(counts, window))
    return value + (new - new.detach())


def _kept(counts: Tensor, window: int) -> Tensor:
    """The weight (S, 1) of the old value in a running mean over about `window` frames after `counts` (S,) more."""
    return (1 - 1 / window) ** counts.unsqueeze(1)


def deviation(mean: Tensor, square: Tensor) -> Tensor:
    """Standard deviation from first and second moment, never zero."""
    return (square - mean**2).clamp_min(EPSILON).sqrt()


def discrepancy(mean: Tensor, square: Tensor, source: SourceStatistics) -> Tensor:
    """D (S,): mean over features of the squared differences of mean and deviation, in source deviations."""
    std = deviation(mean, square)
    return (((mean - source.mean) / source.scale) ** 2 + ((std - source.std) / source.scale) ** 2).mean(1)


def feature_statistics(source_features: Tensor, probability: Tensor | None = None) -> SourceStatistics:
    """Statistics of pooled features (N, F) of clean source frames.

    With the source model's class probabilities (N, K), also statistics per class, weighted by them. They are soft
    because a stream's class mix is measured with soft predictions, too.
    """
    std, mean = torch.std_mean(source_features, 0, correction=0)
    if probability is None:
        return SourceStatistics(mean, std)
    weight = (probability / probability.sum(0).clamp_min(EPSILON)).T
    return SourceStatistics(mean, std, weight @ source_features, weight @ source_features**2)


@dataclass(frozen=True)
class Objective:
    """The loss, with its gradient in closed form: autograd took a tenth of the time of a small pass.

    source: statistics of F + F1 features: the F of all norm layers, then the F1 of the first layer under the source
        affine. D is over the former; the latter give `novelty`
    features: F
    window: frames over which feature statistics are averaged
    class_share: weight of the stream's class mix in the expected statistics; the rest is an even mix
    """

    source: SourceStatistics
    features: int
    entropy_weight: float
    discrepancy_weight: float
    window: int
    class_share: float

    @cached_property
    def _scale(self) -> Tensor:
        return self.source.scale

    @cached_property
    def _gap_weight(self) -> Tensor:
        """The factor (F + F1,) of a feature's gap in the gradient of D; 0 for the first layer's, which are not in D."""
        weight = 2 * self.discrepancy_weight / self.features / self._scale
        weight[self.features :] = 0
        return weight

    @torch.no_grad()
    def __call__(self, forward: Forward, whole: Forward | None = None) -> tuple[tuple[Tensor, Tensor], State, State]:
        """Returns three things.

        - The gradient of the sum of the streams' losses with respect to logits (B, K) and features (B, F + F1).
        - The next statistics: feature_mean and feature_square (S, F + F1), feature_classes (S, K).
        - The signals: loss, entropy (nats), discrepancy and novelty (S,); gap_mean and gap_std (S, F + F1).

        `whole`: the forward of all frames, if `forward` has only those that give the gradient; the statistics and the
        loss are then of all.
        """
        source, state, stream = self.source, forward.state, forward.stream
        frames, features = forward.counts.clamp_min(1), forward.features.detach()
        weighted, p, frame_entropy = _uncertainty(forward.logits)
        if whole is None:
            counted, means = frames, _means(forward, frames, p, frame_entropy)
        else:
            counted = whole.counts.clamp_min(1)
            means = _means(whole, counted, *_uncertainty(whole.logits)[1:])
        mean_entropy = means.pop().squeeze(1)

        names = ("feature_mean", "feature_square", "feature_classes")
        # A large micro-batch must not replace the whole window either: see `MGG.observe`.
        kept = _kept(counted.clamp(max=self.window / 2), self.window)
        old = [state[name] for name in names]
        mean, square, classes = (torch.lerp(new, before, kept) for new, before in zip(means, old, strict=True))
        even = (1 - self.class_share) / classes.shape[1]
        expected, expected_std = source.expected(self.class_share * classes + even)
        variance = square - mean.square()
        std = variance.clamp_min(EPSILON).sqrt()
        mean_gap, std_gap = (mean - expected) / self._scale, (std - expected_std) / self._scale
        squared = mean_gap.square() + std_gap.square()
        distance, novelty = squared[:, : self.features].mean(1), squared[:, self.features :].mean(1)
        signals = {
            "loss": self.entropy_weight * mean_entropy + self.discrepancy_weight * distance,
            "entropy": mean_entropy,
            "discrepancy": distance,
            "novelty": novelty,
            "gap_mean": mean_gap.clamp(-5, 5),
            "gap_std": (std / expected_std).log().clamp(-3, 3),
        }

        each = frames.unsqueeze(1)
        of_logits = torch.addcmul(weighted, p, frame_entropy) * (-self.entropy_weight / each).index_select(0, stream)
        # d D / d feature = a + b * (feature - mean), with the newest frames as the whole window.
        weight = self._gap_weight / each
        slope = torch.where(variance > EPSILON, weight * std_gap / std, 0)  # 0 where the deviation is clamped
        constant = weight * mean_gap - slope * mean
        of_features = torch.addcmul(constant.index_select(0, stream), slope.index_select(0, stream), features)
        return (of_logits, of_features), dict(zip(names, (mean, square, classes), strict=True)), signals


def _uncertainty(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p log p (B, K), the probabilities p (B, K) and the entropies (B, 1) in nats, without a graph."""
    log_p = logits.detach().log_softmax(1)
    p = log_p.exp()
    weighted = p * log_p
    return weighted, p, weighted.sum(1, keepdim=True).neg()


def _means(forward: Forward, counts: Tensor, p: Tensor, frame_entropy: Tensor) -> list[Tensor]:
    """Means over each stream's frames, `counts` (S,) of them: features and their squares (S, F or F + F1), class
    probabilities (S, K), entropy (S, 1)."""
    features, probability = forward.features.detach(), forward.kept.get("probability", p)
    joined = torch.cat([features, features.square(), probability, frame_entropy], 1)
    width = features.shape[1]
    means = per_stream_mean(joined, forward.stream, counts)
    return list(means.split([width, width, p.shape[1], 1], 1))
