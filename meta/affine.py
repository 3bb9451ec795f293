"""Correction, scale, shift, ReLU and pooling of normalised activations, with the gradient in closed form.

With autograd each norm layer kept four tensors of the size of its input, and its backward pass read and wrote such
tensors a dozen times. Here it keeps two at most, and computes the gradients of normalisation, correction, affine, ReLU
and pooled features together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Estimate(NamedTuple):
    """A correction of normalised activations, x_hat * gain + offset, (B, C) each.

    gradient: from the gradients (B, C) of gain and offset to those of the moments that they were estimated from. The
        estimate partly cancels a change of scale or shift in an earlier layer, and the adaptation has to account for
        that.
    """

    gain: Tensor
    offset: Tensor
    gradient: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    @staticmethod
    def fixed(gain: Tensor, offset: Tensor) -> Estimate:
        """A correction that does not depend on the moments."""
        return Estimate(gain, offset, lambda *given: (torch.zeros_like(given[0]), torch.zeros_like(given[1])))


Correct = Callable[[Tensor, Tensor], Estimate]  # from the first and second moment (B, C) of x_hat over positions


class Affine(torch.autograd.Function):
    """x_hat * scale + shift, and the mean of its positive part over positions.

    x: the input with the graph: `x_hat` itself, or the input of the normalisation that gave `x_hat`
    x_hat: normalised activations without a graph, (B, C, ...) or (B, ..., C)
    inverse: the inverse standard deviations of that normalisation: (B, groups) those of a group normalisation, (C,)
        constants; None: x is `x_hat`
    scale, shift: broadcast against x_hat, with the same number of dimensions; shift may be None
    correct: estimates a correction of x_hat before scale and shift; None: there is none
    rectify: whether a ReLU after the layer is fused in
    positions: the dimensions of x_hat other than frames and channels
    pool: whether the features (B, C) are wanted, the mean of the positive part over positions
    """

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        x_hat: Tensor,
        inverse: Tensor | None,
        scale: Tensor,
        shift: Tensor | None,
        correct: Correct | None,
        rectify: bool,
        positions: tuple[int, ...],
        pool: bool,
    ) -> tuple[Tensor, Tensor | None]:
        corrected = None if correct is None else _Corrected(x_hat, positions, correct)
        factor, constant = (scale, shift) if corrected is None else corrected.folded(scale, shift)
        out = scaled(x_hat, factor, constant)
        if rectify:
            out.relu_()
        pooled = rectified_mean(out, positions, rectify) if pool else None
        # Without a fused ReLU, later layers may change `out` in place; `backward` computes it again if needed.
        context.save_for_backward(x_hat, inverse, scale, factor, constant, out if rectify else None)
        context.corrected, context.rectify, context.positions = corrected, rectify, positions
        context.set_materialize_grads(False)
        return out, pooled

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(context: Any, of_out: Tensor | None, of_pooled: Tensor | None) -> tuple[Tensor | None, ...]:
        x_hat, inverse, scale, factor, constant, out = context.saved_tensors
        if of_out is not None and of_out.stride() != x_hat.stride():
            # Mixed memory layouts would slow down every following operation.
            of_out = torch.empty_like(x_hat).copy_(of_out)
        if of_pooled is not None:
            if out is None:
                out = scaled(x_hat, factor, constant)
            gradient = _through_mean(of_out, of_pooled, out, context.positions, context.rectify)
        elif of_out is not None:
            gradient = torch.ops.aten.threshold_backward(of_out, out, 0) if context.rectify else of_out
        else:
            return (None,) * 9
        same = [dim for dim in range(1, scale.dim()) if scale.shape[dim] == 1]
        along = gradient * x_hat
        of_shift, of_factor = (t.sum(same, keepdim=True) if same else t for t in (gradient, along))
        of_scale, line = of_factor, None
        if context.corrected is not None:
            of_scale, line = context.corrected.backward(scale, of_shift, of_factor)
        of_x = None
        if context.needs_input_grad[0]:
            room = along if same else torch.empty_like(along)
            of_x = _through_norm(gradient, x_hat, inverse, factor, (of_shift, of_factor), line, room)
        if scale.shape[0] == 1:  # shared by all frames
            of_shift, of_scale = of_shift.sum(0, keepdim=True), of_scale.sum(0, keepdim=True)
        return of_x, None, None, of_scale, of_shift if context.needs_input_grad[4] else None, None, None, None, None


class _Corrected:
    """The correction of one layer in one pass. Its tensors are (B, C, 1, ...), to broadcast with x_hat."""

    def __init__(self, x_hat: Tensor, positions: tuple[int, ...], correct: Correct) -> None:
        self.positions = positions
        self.shape = [1 if dim in positions else size for dim, size in enumerate(x_hat.shape)]
        self.size = math.prod([x_hat.shape[dim] for dim in positions])
        moments = _moments(x_hat, positions, self.size)
        self.estimate = correct(*moments)
        self.mean, self.square = (moment.view(self.shape) for moment in moments)
        self.gain, self.offset = (change.view(self.shape) for change in self.estimate[:2])

    def folded(self, scale: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """The scale and shift of x_hat that do the same as the correction followed by `scale` and `shift`."""
        constant = scale * self.offset if shift is None else torch.addcmul(shift, scale, self.offset)
        return scale * self.gain, constant

    def backward(self, scale: Tensor, of_shift: Tensor, of_factor: Tensor) -> tuple[Tensor, _Line]:
        """The gradient of the scale, and the part of that of x_hat which comes through the estimate."""
        of_mean, of_square = self.estimate.gradient(*[self._per_channel(scale * t) for t in (of_factor, of_shift)])
        constant, slope = (of_mean / self.size).view(self.shape), (of_square * (2 / self.size)).view(self.shape)
        of_scale = torch.addcmul(self.gain * of_factor, self.offset, of_shift)
        return of_scale, _Line(constant, slope, self.mean, self.square)

    def _per_channel(self, values: Tensor) -> Tensor:
        """Values that broadcast with x_hat, summed over positions: (B, C)."""
        summed = values if list(values.shape) == self.shape else values.sum(self.positions)
        return summed.view_as(self.estimate.gain)


class _Line(NamedTuple):
    """A gradient of x_hat that is constant + slope * x_hat, and the moments of x_hat; (B, C, 1, ...) each."""

    constant: Tensor
    slope: Tensor
    mean: Tensor
    square: Tensor


def _moments(x_hat: Tensor, positions: tuple[int, ...], size: int) -> tuple[Tensor, Tensor]:
    """First and second moment (B, C) over positions."""
    if not positions:
        return x_hat.clone(), x_hat * x_hat  # Without a graph, x_hat is overwritten.
    return x_hat.sum(positions).div_(size), (x_hat * x_hat).sum(positions).div_(size)


def scaled(x_hat: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """x_hat * scale + shift; without a shift, x_hat * scale."""
    return x_hat * scale if shift is None else torch.addcmul(shift, x_hat, scale)


def scaled_in_place(
    x_hat: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    correct: Correct | None,
    rectify: bool,
    positions: tuple[int, ...],
    pool: bool,
) -> tuple[Tensor, Tensor | None]:
    """The output of `Affine` for passes without a gradient: nothing is kept, and `x_hat` is overwritten."""
    if correct is not None:
        scale, shift = _Corrected(x_hat, positions, correct).folded(scale, shift)
    out = x_hat.mul_(scale) if shift is None else torch.addcmul(shift, x_hat, scale, out=x_hat)
    if rectify:
        out.relu_()
    return out, rectified_mean(out, positions, rectify) if pool else None


def rectified_mean(x: Tensor, positions: tuple[int, ...], rectified: bool = False) -> Tensor:
    """relu(x).mean(positions); `rectified`: x has passed a ReLU already.

    A ReLU follows most norm layers. The mean of what the next layer sees separates shifts better than the plain mean.
    """
    if not positions:
        return torch.relu(x)
    # A sum, because `mean` over the positions of a channels-last tensor takes half as long again.
    total = (x if rectified else torch.relu(x)).sum(positions)
    return total.div_(math.prod([x.shape[dim] for dim in positions]))


def _through_mean(
    of_out: Tensor | None, of_pooled: Tensor, out: Tensor, positions: tuple[int, ...], rectify: bool
) -> Tensor:
    """The gradient of scale * x_hat + shift, from those of the output and of the pooled features.

    That of the features always passes a ReLU, that of the output only with `rectify`.
    """
    spread = of_pooled.view([1 if dim in positions else size for dim, size in enumerate(out.shape)])
    share = 1 / math.prod([out.shape[dim] for dim in positions])
    if of_out is not None and rectify:
        total = torch.add(of_out, spread, alpha=share)
        return torch.ops.aten.threshold_backward.grad_input(total, out, 0, grad_input=total)
    passed: Tensor = torch.ops.aten.threshold_backward((spread * share).expand_as(out), out, 0)
    return passed if of_out is None else passed.add_(of_out)


def _through_norm(
    gradient: Tensor,
    x_hat: Tensor,
    inverse: Tensor | None,
    factor: Tensor,
    sums: tuple[Tensor, Tensor],
    line: _Line | None,
    room: Tensor,
) -> Tensor:
    """The gradient of the normalisation's input, where that of x_hat is factor * gradient + line.

    sums: of gradient and of gradient * x_hat over positions. `room` is overwritten.
    """
    if inverse is not None:
        factor = _divided(factor, inverse)
        if line is not None:
            line = line._replace(constant=_divided(line.constant, inverse), slope=_divided(line.slope, inverse))
    added = None if line is None else line[:2]
    if inverse is not None and inverse.dim() == 2:
        added = _through_groups(x_hat, inverse.shape[1], factor, sums, line)
    if added is None:
        return torch.mul(gradient, factor, out=room)
    constant, slope = added
    return torch.addcmul(constant, x_hat, slope, out=room).addcmul_(gradient, factor)


def _divided(values: Tensor, inverse: Tensor) -> Tensor:
    """Values (B, C, 1, ...) times the inverse deviation of their group (B, groups), or channel (C,)."""
    groups = inverse.shape[-1]
    divided = values.reshape(len(values), groups, values.shape[1] // groups) * inverse.unsqueeze(-1)
    return divided.view(len(divided), *values.shape[1:])


def _through_groups(
    x_hat: Tensor, groups: int, factor: Tensor, sums: tuple[Tensor, Tensor], line: _Line | None
) -> tuple[Tensor, Tensor]:
    """The part of the gradient of group normalisation's input that is constant + slope * x_hat.

    With the gradient g of x_hat (B, C, ...), in units of the inverse deviation, the whole is
    g - mean(g) - x_hat * mean(g * x_hat), where the means are over each group's channels and positions.
    """
    channels = x_hat.shape[1] // groups
    own = torch.stack(sums) * factor
    if line is not None:
        through = [line.constant + line.slope * line.mean, line.constant * line.mean + line.slope * line.square]
        own += torch.stack(through) * math.prod(x_hat.shape[2:])
    # One matrix product computes the means and spreads them over the channels; for few frames it takes half the time.
    spread = own.new_full((channels, channels), -groups / math.prod(x_hat.shape[1:]))
    constant, slope = torch.mm(own.view(-1, channels), spread).view_as(own).unbind()
    return (constant, slope) if line is None else (line.constant + constant, line.slope + slope)
