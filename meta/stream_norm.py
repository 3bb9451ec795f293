"""A normalisation layer whose scale and shift may differ from frame to frame.

It normalises without affine, and then applies the scale and shift of each frame's stream. This also avoids a crash of
torch 2.13 in the backward pass of `group_norm` with affine weights on channels-last input.
"""

from __future__ import annotations

import copy
import math
import threading
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from meta.affine import Affine, Estimate, rectified_mean, scaled, scaled_in_place
from meta.moments import NormMoments
from schemas.bundle import Layout
from schemas.errors import BundleError

BATCH_NORM = nn.modules.batchnorm._BatchNorm
CHANNELS_FIRST = (nn.GroupNorm, BATCH_NORM, nn.modules.instancenorm._InstanceNorm)
CHANNELS_LAST = (nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class NormSlice:
    """The coordinates of a layer in the norm affine: scales in [scale, shift), shifts in [shift, end)."""

    layer: str
    scale: int
    shift: int
    end: int


class Start(NamedTuple):
    """Where the parts of a layer begin among those of all layers, concatenated.

    coordinate: in the norm affine; channel: among the channels of BatchNorm layers; feature: among the pooled features;
    row: in `PassContext.rows`, that of its scales, which that of its shifts follows.
    """

    coordinate: int = 0
    channel: int = 0
    feature: int = 0
    row: int = 0


class LayerCorrection(Protocol):
    """A change of normalised activations, channel by channel, before scale and shift (`meta.correction`)."""

    def of(self, channels: slice, mean: Tensor, square: Tensor) -> Estimate:
        """Gain and offset (B, C) for the layer with `channels` among the F of all layers.

        mean, square (B, C): first and second moment of each frame's normalised activations over positions.
        """
        ...


class PassContext(threading.local):
    """Arguments and results of the current pass, shared by all layers of a model. Each thread has its own.

    rows: scales and shifts of all layers in turn, (B, ...) each; None: the source affine
    moments: replaces the running statistics of BatchNorm layers; None: it does not
    correction: changes the normalised activations before scale and shift; None: it does not
    features: collects (first coordinate, rectified and pooled output (B, C)) of each layer; None: it does not
    first: whether `first_features` is wanted, the pooled output (B, F1) of the first layer under the source affine
    head: input of the last linear layer in the thread's last pass
    """

    def __init__(self) -> None:
        self.rows: tuple[Tensor, ...] | None = None
        self.moments: NormMoments | None = None
        self.correction: LayerCorrection | None = None
        self.features: list[tuple[int, Tensor]] | None = None
        self.first = False
        self.first_features: Tensor | None = None
        self.head: Tensor | None = None


class StreamNorm(nn.Module):
    """Replaces one normalisation layer: x_hat = normalise(x), then per-frame scale and shift.

    `layout` is that of the channels, for a layer of a custom class (`meta.custom_norms`). `after` is where the parts of
    the next layer begin.
    """

    def __init__(
        self, norm: nn.Module, name: str, start: Start, context: PassContext, layout: Layout | None = None
    ) -> None:
        super().__init__()
        scale = norm.weight
        if not isinstance(scale, Tensor):
            raise BundleError(f"norm layer {name!r} has no scale: nothing there can adapt")
        shift = getattr(norm, "bias", None)
        self.has_shift = isinstance(shift, Tensor)
        if layout is None:
            self.norm = with_affine(norm, None, None)
        else:  # The code of a custom class may need a weight.
            self.norm = with_affine(norm, torch.ones_like(scale), torch.zeros_like(scale) if self.has_shift else None)
        self.shape = tuple(scale.shape)
        self.channels_first = isinstance(norm, CHANNELS_FIRST) if layout is None else layout == "channels-first"
        size = scale.numel()
        self.place = NormSlice(
            name, start.coordinate, start.coordinate + size, start.coordinate + size * (1 + self.has_shift)
        )
        self.register_buffer("scale", scale.detach().clone().float())
        self.register_buffer("shift", shift.detach().clone().float() if isinstance(shift, Tensor) else None)
        self.context = context
        self.row = start.row
        # Its channels in the statistics of all BatchNorm layers; empty for other layers.
        self.channels = slice(start.channel, start.channel + (size if isinstance(norm, BATCH_NORM) else 0))
        self.features = slice(start.feature, start.feature + self.feature_count)
        self.after = Start(self.place.end, self.channels.stop, self.features.stop, start.row + 1 + self.has_shift)
        self.groups, self.epsilon = 0, 0.0
        if type(norm).forward is nn.GroupNorm.forward:
            self.groups, self.epsilon = norm.num_groups, norm.eps
        self.fixed = isinstance(norm, BATCH_NORM) and type(norm).forward is BATCH_NORM.forward
        if self.fixed:
            self._take_statistics(norm)
        self.rectify = False  # whether the ReLU after it is fused into it

    def forward(self, x: Tensor) -> Tensor:
        context, rows = self.context, self.context.rows
        if rows is None and context.correction is None and not (x.requires_grad and torch.is_grad_enabled()):
            return self._as_source(x)
        scale, shift = self._source_rows(x) if rows is None else self._frame_rows(x, rows)
        inverse = None
        if self.groups:
            x_hat, inverse = _group_normalised(x.detach(), self.groups, self.epsilon)
        elif self._has_fixed_statistics:
            inverse = self.inverse
            x_hat = scaled(x.detach(), self._broadcast(inverse, x), self._broadcast(self.centre, x))
        else:
            x = self._normalised(x)
            x_hat = x.detach()
        correct = None if context.correction is None else partial(context.correction.of, self.features)
        positions, pool = self._positions(x), context.features is not None
        if context.first and self.place.scale == 0 and rows is not None:
            as_source = scaled(x_hat, *self._source_rows(x_hat)).relu_()
            context.first_features = rectified_mean(as_source, positions, rectified=True)
        # Inference mode keeps nothing, also where gradients are enabled within it.
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            out, pooled = Affine.apply(x, x_hat, inverse, scale, shift, correct, self.rectify, positions, pool)
        else:
            out, pooled = scaled_in_place(x_hat, scale, shift, correct, self.rectify, positions, pool)
        self._collect(pooled)
        return cast(Tensor, out)

    def _collect(self, pooled: Tensor | None) -> None:
        context = self.context
        if context.features is not None and pooled is not None:
            context.features.append((self.place.scale, pooled))
            if context.first and self.place.scale == 0 and context.first_features is None:
                context.first_features = pooled

    def _as_source(self, x: Tensor) -> Tensor:
        """The output of the trained layer, at its speed."""
        if self.groups:
            out = nn.functional.group_norm(x, self.groups, self.scale, self.shift, self.epsilon)
        elif self._has_fixed_statistics:
            out = scaled(x, self._broadcast(self.source_factor, x), self._broadcast(self.source_constant, x))
        else:
            out = scaled(self._normalised(x), *self._source_rows(x))
        if self.rectify:
            out.relu_()
        if self.context.features is not None:
            self._collect(rectified_mean(out, self._positions(x), self.rectify))
        return out

    def _take_statistics(self, norm: nn.Module) -> None:
        """Keep what BatchNorm does with its running statistics as factors and constants (C,)."""
        inverse = torch.rsqrt(norm.running_var.detach().float() + norm.eps)
        centre = -norm.running_mean.detach().float() * inverse
        constant = self.scale * centre if self.shift is None else torch.addcmul(self.shift, self.scale, centre)
        kept = {
            "inverse": inverse,
            "centre": centre,
            "source_factor": self.scale * inverse,
            "source_constant": constant,
        }
        for name, tensor in kept.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def _has_fixed_statistics(self) -> bool:
        """Whether x_hat is x times a constant plus another: BatchNorm with the statistics of training."""
        return self.fixed and self.context.moments is None

    @staticmethod
    def _broadcast(each: Tensor, x: Tensor) -> Tensor:
        """One number per channel (C,), to broadcast with x (B, C, ...)."""
        return each.view(1, -1, *[1] * (x.dim() - 2))

    def _normalised(self, x: Tensor) -> Tensor:
        moments = self.context.moments
        if moments is None or self.channels.start == self.channels.stop:
            return cast(Tensor, self.norm(x))
        return moments.normalise(x, self.channels, self.norm.eps)

    @property
    def feature_count(self) -> int:
        """The number of pooled features of this layer: one per channel."""
        return int(self.scale.shape[0 if self.channels_first else -1])

    def _frame_rows(self, x: Tensor, rows: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        if x.shape[0] != rows[0].shape[0]:
            raise BundleError(
                f"norm layer {self.place.layer!r} sees {x.shape[0]} rows for {rows[0].shape[0]} frames: "
                "models that fold other dimensions into the batch cannot be adapted per stream"
            )
        shift = self._shaped(rows[self.row + 1], x) if self.has_shift else None
        return self._shaped(rows[self.row], x), shift

    def _source_rows(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        shift = self._shaped(self.shift[None], x) if self.shift is not None else None
        return self._shaped(self.scale[None], x), shift

    def _shaped(self, rows: Tensor, x: Tensor) -> Tensor:
        if self.channels_first:
            return rows.view(rows.shape + (1,) * (x.dim() - 2))
        lead = x.dim() - 1 - len(self.shape)
        return rows.view(rows.shape[0], *([1] * lead), *self.shape)

    def _positions(self, x: Tensor) -> tuple[int, ...]:
        """The dimensions of x other than frames and channels."""
        return tuple(range(2, x.dim()) if self.channels_first else range(1, x.dim() - 1))


def _group_normalised(x: Tensor, groups: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """x (B, C, ...) normalised over each group's channels and positions; inverse standard deviations (B, groups)."""
    frames, channels = x.shape[:2]
    size = math.prod(x.shape[2:])
    # The kernel takes no part of a larger tensor, and on CUDA no other layout than this.
    last = x.is_cpu and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    x_hat, _, inverse = torch.native_group_norm(x, None, None, frames, channels, size, groups, epsilon)
    return x_hat, inverse


def with_affine(norm: nn.Module, weight: Tensor | None, bias: Tensor | None) -> nn.Module:
    """A copy of a norm layer with another weight and bias. A parameter that the layer does not have stays absent."""
    bare, given = copy.copy(norm), {"weight": weight, "bias": bias}
    held = {name: given.get(name) if tensor is not None else None for name, tensor in norm._parameters.items()}
    bare._parameters = {
        name: None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
        for name, tensor in held.items()
    }
    return bare.eval()


def is_norm(module: nn.Module) -> bool:
    """Whether a `StreamNorm` can replace the module."""
    return isinstance(module, CHANNELS_FIRST + CHANNELS_LAST)
