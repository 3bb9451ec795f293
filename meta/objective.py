"""The unsupervised objective: entropy plus feature discrepancy, for many streams in one pass.

L = mean_i H(softmax z_i) + weight * D, per stream, where D compares the stream's feature statistics with those of
clean source data (MGTTA, AAAI 2025, section 3). Three things differ from the paper. D is standardised per feature,
so that one weight serves nets of any width. The statistics are running means over `window` frames, starting
at the source's: a batch of one then has sound statistics. Its gradient passes through the newest frames as if they
were the whole window, so its size does not depend on the batch. And the source statistics may be those of the
classes that the stream shows: a camera that sees nothing but shoes has other features than the source data, with
nothing wrong, and should not be pulled towards shirts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
        """By name, for a file."""
        known = {name: getattr(self, name) for name in ("mean", "std", "class_mean", "class_square")}
        return {name: tensor for name, tensor in known.items() if tensor is not None}

    def to(self, device: torch.device) -> SourceStatistics:
        """The same on a device."""
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
            return self.mean.expand(len(mix), -1), self.std.expand(len(mix), -1)
        mean = mix @ self.class_mean
        return mean, deviation(mean, mix @ self.class_square)


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy in nats of softmax(logits), (B, classes) to (B,)."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def per_stream_mean(values: Tensor, stream: Tensor, counts: Tensor) -> Tensor:
    """Mean over each stream's frames: values (B,) or (B, F), stream (B,) in [0, S), counts (S,) float."""
    total = values.new_zeros(counts.shape[0], *values.shape[1:]).index_add(0, stream, values)
    return total / counts.view(-1, *[1] * (values.dim() - 1))


def running(old: Tensor, new: Tensor, counts: Tensor, window: int) -> Tensor:
    """Exponential mean over about `window` frames after `counts` (S,) more frames with mean `new` (S, F).

    The value is the running mean; the gradient is that of `new`, undamped.
    """
    keep = (1 - 1 / window) ** counts.unsqueeze(1)
    value = keep * old + (1 - keep) * new.detach()
    return value + (new - new.detach())


def deviation(mean: Tensor, square: Tensor) -> Tensor:
    """Standard deviation from first and second moment, never zero."""
    return (square - mean**2).clamp_min(EPSILON).sqrt()


def discrepancy(mean: Tensor, square: Tensor, source: SourceStatistics) -> Tensor:
    """D (S,): mean over features of the squared differences of mean and deviation, in source deviations."""
    std = deviation(mean, square)
    return (((mean - source.mean) / source.scale) ** 2 + ((std - source.std) / source.scale) ** 2).mean(1)


def feature_statistics(source_features: Tensor, probability: Tensor | None = None) -> SourceStatistics:
    """Statistics of pooled features (N, F) of clean source frames.

    With the source model's own class probabilities (N, K) also those per class, weighted by them: a stream's class mix
    is measured with the same soft predictions.
    """
    std, mean = torch.std_mean(source_features, 0, correction=0)
    if probability is None:
        return SourceStatistics(mean, std)
    weight = (probability / probability.sum(0).clamp_min(EPSILON)).T
    return SourceStatistics(mean, std, weight @ source_features, weight @ source_features**2)
