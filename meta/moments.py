"""BatchNorm with separate statistics for each stream."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from meta.objective import per_stream_sum


class NormMoments:
    """The statistics with which BatchNorm layers normalise each stream in one pass.

    Mean and variance of stream s are (1 - share[s]) * given[s] + share[s] * batch[s], where `batch` are the moments of
    the stream's own frames in this pass, over frames and positions. The gradient passes through them, as in Tent.
    Values of `share`:

    - 0: source or running statistics
    - 1: BN-1 (Nado et al., 2020)
    - N / (N + 16) for N frames: a prior of 16 (Schneider et al., NeurIPS 2020)
    - a constant: the exponential mean of RobustBN (RoTTA, CVPR 2023)

    The statistics of a single frame are over its positions, so they are always defined.

    stream (B,) int64 in [0, S); share (S,); mean and variance (S, C) for the C channels of all BatchNorm layers. After
    the pass `mixed()` returns the mean and variance (S, C) that were used.
    """

    def __init__(self, stream: Tensor, share: Tensor, mean: Tensor, variance: Tensor) -> None:
        self.stream, self.share, self.mean, self.variance = stream, share.unsqueeze(1), mean, variance
        self.frames = torch.bincount(stream, minlength=len(share)).clamp_min(1).to(mean.dtype)
        self._used: dict[int, tuple[Tensor, Tensor]] = {}

    def normalise(self, x: Tensor, place: slice, epsilon: float) -> Tensor:
        """Normalise x (B, C, ...) of the layer with the channels `place` among all, without affine."""
        given = (self.mean[:, place], self.variance[:, place])
        out: Tensor
        out, mean, variance = _StreamNormalise.apply(x, self.stream, self.share, self.frames, *given, epsilon)
        self._used[place.start] = (mean, variance)
        return out

    def mixed(self) -> tuple[Tensor, Tensor]:
        """The mean and variance (S, C) that the pass used."""
        used = [self._used[start] for start in sorted(self._used)]
        return torch.cat([mean for mean, _ in used], 1), torch.cat([variance for _, variance in used], 1)


class _StreamNormalise(torch.autograd.Function):
    """`NormMoments` in one layer, with the gradient in closed form: it needs only the output, which is kept anyway.
    Autograd kept four more tensors of the size of the layer's input.

    x (B, C, ...), stream (B,), share (S, 1), frames (S,), given mean and variance (S, C). Returns the normalised x and
    the mean and variance (S, C) that were used.
    """

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        stream: Tensor,
        share: Tensor,
        frames: Tensor,
        given_mean: Tensor,
        given_variance: Tensor,
        epsilon: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dims, positions = tuple(range(2, x.dim())), frames.unsqueeze(1) * math.prod(x.shape[2:])
        # Moments about the given mean, so that a large mean does not cancel the variance's digits. (var_mean takes ten
        # times as long on channels-last input.)
        centred = x - _spread(given_mean, stream, x)
        total, squares = centred, centred * centred
        if dims:
            total, squares = total.sum(dims), squares.sum(dims)
        moved = per_stream_sum(total, stream, len(frames)) / positions
        batch_variance = (per_stream_sum(squares, stream, len(frames)) / positions - moved * moved).clamp_min(0)
        # `where`, so that values that are not finite do not spread where the share is 0.
        step = torch.where(share > 0, share * moved, 0)
        mean = given_mean + step
        variance = given_variance + torch.where(share > 0, share * (batch_variance - given_variance), 0)
        inverse = torch.rsqrt(variance + epsilon)
        out = torch.addcmul(_spread(-step * inverse, stream, x), centred, _spread(inverse, stream, x))
        context.save_for_backward(out, stream, share, frames, inverse, moved)
        context.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(context: Any, gradient: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        out, stream, share, frames, inverse, moved = context.saved_tensors
        dims = tuple(range(2, out.dim()))
        total, along = gradient, gradient * out
        if dims:
            total, along = total.sum(dims), along.sum(dims)
        # Gradients of the mean and variance used, for each position of the stream, all of which contribute equally.
        weight = share / (frames.unsqueeze(1) * math.prod(out.shape[2:]))
        of_mean = -inverse * per_stream_sum(total, stream, len(frames)) * weight
        of_variance = -inverse * inverse * per_stream_sum(along, stream, len(frames)) * weight
        # x minus the batch's own mean is out / inverse plus (share - 1) moved.
        constant = of_mean + of_variance * (share - 1) * moved
        passed = torch.addcmul(_spread(constant, stream, out), gradient, _spread(inverse, stream, out))
        return passed.addcmul_(out, _spread(of_variance / inverse, stream, out)), *[None] * 6


def _spread(rows: Tensor, stream: Tensor, x: Tensor) -> Tensor:
    """The row of each frame's stream, (S, C) to (B, C, 1, ...), for broadcasting with x (B, C, ...)."""
    return rows.index_select(0, stream).view(*x.shape[:2], *[1] * (x.dim() - 2))
