"""The unsupervised objective: entropy plus feature discrepancy, for many streams in one pass.

L = mean_i H(softmax z_i) + weight * D, per stream, where D compares the stream's feature statistics with those of
clean source data (MGTTA, AAAI 2025, section 3). Two things differ from the paper. D is standardised per feature,
so that one weight serves nets of any width. And the statistics are running means over `window` frames, starting
at the source's: a batch of one then has sound statistics, and correlated labels average out. Its gradient passes
through the newest frames as if they were the whole window, so its size does not depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-5


@dataclass(frozen=True)
class SourceStatistics:
    """Pooled features of clean source frames: `mean` and standard deviation `std`, both (F,)."""

    mean: Tensor
    std: Tensor

    @property
    def square(self) -> Tensor:
        """Second moment (F,)."""
        return self.mean**2 + self.std**2


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


def discrepancy(mean: Tensor, square: Tensor, source: SourceStatistics) -> Tensor:
    """D (S,): mean over features of the squared differences of mean and deviation, in source deviations."""
    std = (square - mean**2).clamp_min(EPSILON).sqrt()
    scale = source.std.clamp_min(EPSILON**0.5)
    return (((mean - source.mean) / scale) ** 2 + ((std - source.std) / scale) ** 2).mean(1)


def feature_statistics(source_features: Tensor) -> SourceStatistics:
    """Statistics of pooled features (N, F) of clean source frames."""
    std, mean = torch.std_mean(source_features, 0, correction=0)
    return SourceStatistics(mean, std)
