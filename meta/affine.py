"""Scale, shift, ReLU and pooling of normalised activations, with the gradient in closed form.

With autograd each norm layer kept four tensors of the size of its input, and its backward pass read and wrote such
tensors a dozen times. Here it keeps two at most, and computes the gradients of normalisation, affine, ReLU and pooled
features together.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Affine(torch.autograd.Function):
    """x_hat * scale + shift, and the mean of its positive part over positions.

    x: the input with the graph: `x_hat` itself, or the input of the group normalisation that gave `x_hat`
    x_hat: normalised activations without a graph, (B, C, ...) or (B, ..., C)
    inverse (B, groups): inverse standard deviations of that group normalisation; None: x is `x_hat`
    scale, shift: broadcast against x_hat, with the same number of dimensions; shift may be None
    rectify: whether a ReLU after the layer is fused in
    positions: the dimensions over which the features (B, C) are pooled; None: no features are computed
    """

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        x_hat: Tensor,
        inverse: Tensor | None,
        scale: Tensor,
        shift: Tensor | None,
        rectify: bool,
        positions: tuple[int, ...] | None,
    ) -> tuple[Tensor, Tensor | None]:
        out = scaled(x_hat, scale, shift)
        if rectify:
            out.relu_()
        pooled = None if positions is None else rectified_mean(out, positions, rectify)
        # Without a fused ReLU, later layers may change `out` in place; `backward` computes it again if needed.
        context.save_for_backward(x_hat, inverse, scale, shift, out if rectify else None)
        context.rectify, context.positions = rectify, positions
        context.set_materialize_grads(False)
        return out, pooled

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(context: Any, of_out: Tensor | None, of_pooled: Tensor | None) -> tuple[Tensor | None, ...]:
        x_hat, inverse, scale, shift, out = context.saved_tensors
        if of_out is not None and of_out.stride() != x_hat.stride():
            # Mixed memory layouts would slow down every following operation.
            of_out = torch.empty_like(x_hat).copy_(of_out)
        if of_pooled is not None:
            if out is None:
                out = scaled(x_hat, scale, shift)
            gradient = _through_mean(of_out, of_pooled, out, context.positions, context.rectify)
        elif of_out is not None:
            gradient = torch.ops.aten.threshold_backward(of_out, out, 0) if context.rectify else of_out
        else:
            return (None,) * 7
        same = [dim for dim in range(1, scale.dim()) if scale.shape[dim] == 1]
        along = gradient * x_hat
        of_shift, of_scale = (t.sum(same, keepdim=True) if same else t for t in (gradient, along))
        of_x = None
        if context.needs_input_grad[0]:
            room = along if same else torch.empty_like(along)
            if inverse is None:
                of_x = torch.mul(gradient, scale, out=room)
            else:
                of_x = _through_groups(gradient, x_hat, inverse, scale, of_shift, of_scale, room)
        if scale.shape[0] == 1:  # shared by all frames
            of_shift, of_scale = of_shift.sum(0, keepdim=True), of_scale.sum(0, keepdim=True)
        return of_x, None, None, of_scale, of_shift if shift is not None else None, None, None


def scaled(x_hat: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """x_hat * scale + shift; without a shift, x_hat * scale."""
    return x_hat * scale if shift is None else torch.addcmul(shift, x_hat, scale)


def scaled_in_place(
    x_hat: Tensor, scale: Tensor, shift: Tensor | None, rectify: bool, positions: tuple[int, ...] | None
) -> tuple[Tensor, Tensor | None]:
    """The output of `Affine` for passes without a gradient: nothing is kept, and `x_hat` is overwritten."""
    out = x_hat.mul_(scale) if shift is None else torch.addcmul(shift, x_hat, scale, out=x_hat)
    if rectify:
        out.relu_()
    return out, None if positions is None else rectified_mean(out, positions, rectify)


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


def _through_groups(
    gradient: Tensor, x_hat: Tensor, inverse: Tensor, scale: Tensor, total: Tensor, along: Tensor, room: Tensor
) -> Tensor:
    """The gradient of group normalisation's input x (B, C, ...): with g = gradient * scale, and means over each group's
    channels and positions, inverse * (g - mean(g) - x_hat * mean(g * x_hat)).

    total, along (B, C, 1, ...): sums of gradient and of gradient * x_hat over positions. `room` is overwritten.
    """
    groups, channels = inverse.shape[1], x_hat.shape[1] // inverse.shape[1]
    factor = (scale.reshape(len(scale), groups, channels) * inverse.unsqueeze(2)).view_as(total)
    own = torch.stack([total, along]) * factor
    # One matrix product computes the means and spreads them over the channels; for few frames it takes half the time.
    spread = own.new_full((channels, channels), -groups / math.prod(x_hat.shape[1:]))
    constant, slope = torch.mm(own.view(-1, channels), spread).view_as(own).unbind()
    return torch.addcmul(constant, x_hat, slope, out=room).addcmul_(gradient, factor)
