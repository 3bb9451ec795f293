"""Normalisation layers whose scale and shift may differ from frame to frame.

Every normalisation layer of a trained classifier is swapped once, at load time, for a `StreamNorm` that
normalises without affine and then applies the scale and shift of the stream that each frame belongs to.
One forward pass can so serve many streams, and the gradient of the affine comes out per frame.
Normalising without affine also avoids a crash of torch 2.13 in the backward of `group_norm` with affine
weights on channels-last input.
"""

from __future__ import annotations

import copy
import math
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from schemas.errors import BundleError

BATCH_NORM = nn.modules.batchnorm._BatchNorm
CHANNELS_FIRST = (nn.GroupNorm, BATCH_NORM, nn.modules.instancenorm._InstanceNorm)
CHANNELS_LAST = (nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class NormSlice:
    """Where one layer's affine lies in the flat vector: [scale, shift) then [shift, end)."""

    layer: str
    scale: int
    shift: int
    end: int


class NormMoments:
    """With which statistics the BatchNorm layers normalise each stream of one pass.

    A layer normalises stream s with (1 - share[s]) * given[s] + share[s] * batch[s], means and variances alike, where
    `batch` are the moments of the stream's own frames in this pass, over frames and positions. The gradient passes
    through them, as in Tent. `share` 0 is source inference or a running mean; 1 is BN-1 (Nado et al., 2020); N
    frames with a prior of 16 have N / (N + 16) (Schneider et al., NeurIPS 2020); a constant is the exponential mean
    of RobustBN (RoTTA, CVPR 2023). A single frame has its positions to count, so nothing is ever undefined.

    stream (B,) int64 in [0, S); share (S,); mean and variance (S, C), C the channels of all BatchNorm layers joined.
    After the pass, `mixed()` gives the mean and variance (S, C) that were used, for who wants to keep them.
    """

    def __init__(self, stream: Tensor, share: Tensor, mean: Tensor, variance: Tensor) -> None:
        self.stream, self.share, self.mean, self.variance = stream, share.unsqueeze(1), mean, variance
        self.frames = torch.bincount(stream, minlength=len(share)).clamp_min(1).to(mean.dtype)
        self._used: dict[int, tuple[Tensor, Tensor]] = {}

    def normalise(self, x: Tensor, place: slice, epsilon: float) -> Tensor:
        """x (B, C, ...) of the layer that has the channels `place`, normalised without affine."""
        given = (self.mean[:, place], self.variance[:, place])
        out: Tensor
        out, mean, variance = _StreamNormalise.apply(x, self.stream, self.share, self.frames, *given, epsilon)
        self._used[place.start] = (mean, variance)
        return out

    def mixed(self) -> tuple[Tensor, Tensor]:
        """The mean and variance (S, C) of the last pass."""
        used = [self._used[start] for start in sorted(self._used)]
        return torch.cat([mean for mean, _ in used], 1), torch.cat([variance for _, variance in used], 1)


class _StreamNormalise(torch.autograd.Function):
    """What `NormMoments` does in one layer. Written out, its gradient needs the output alone, which is kept anyway;
    left to autograd, every large net kept four more tensors of the size of each layer's input.

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
        # Around the given mean, so that a large mean does not cost the variance its digits. (var_mean would do, at ten
        # times the cost on channels-last input.)
        centred = x - _spread(given_mean, stream, x)
        total, squares = centred, centred * centred
        if dims:
            total, squares = total.sum(dims), squares.sum(dims)
        moved = _stream_sum(total, stream, frames) / positions
        batch_variance = (_stream_sum(squares, stream, frames) / positions - moved * moved).clamp_min(0)
        step = share * moved
        mean, variance = given_mean + step, given_variance + share * (batch_variance - given_variance)
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
        # Of the mean and the variance used, which all frames of a stream moved, by their share of its positions.
        weight = share / (frames.unsqueeze(1) * math.prod(out.shape[2:]))
        of_mean = -inverse * _stream_sum(total, stream, frames) * weight
        of_variance = -inverse * inverse * _stream_sum(along, stream, frames) * weight
        # x minus the batch's own mean is out / inverse plus (share - 1) moved.
        constant = of_mean + of_variance * (share - 1) * moved
        passed = torch.addcmul(_spread(constant, stream, out), gradient, _spread(inverse, stream, out))
        return passed.addcmul_(out, _spread(of_variance / inverse, stream, out)), *[None] * 6


def _stream_sum(rows: Tensor, stream: Tensor, frames: Tensor) -> Tensor:
    """Sums (S, C) over each stream's frames of rows (B, C)."""
    return rows.new_zeros(len(frames), rows.shape[1]).index_add(0, stream, rows)


def _spread(rows: Tensor, stream: Tensor, x: Tensor) -> Tensor:
    """Rows (S, C) of each frame's stream, to be combined with x (B, C, ...)."""
    return rows.index_select(0, stream).view(*x.shape[:2], *[1] * (x.dim() - 2))


class FrameAffine(threading.local):
    """What the pass under way asks of every layer, shared by all layers of one model; each thread has its own pass.

    `rows` is (B, P), one row a frame, or None for the source affine; `moments` replaces the running statistics of
    BatchNorm layers where it is set; `features` collects each layer's rectified and pooled output (B, C), with the
    layer's place in the affine, where it is a list; `first_features` is that of the first layer as the source affine
    would make it. `head` is what went into the last linear layer in the thread's last pass.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.moments: NormMoments | None = None
        self.features: list[tuple[int, Tensor]] | None = None
        self.first_features: Tensor | None = None
        self.head: Tensor | None = None


class StreamNorm(nn.Module):
    """One swapped normalisation layer: x_hat = normalise(x), then per-frame scale and shift."""

    def __init__(self, norm: nn.Module, name: str, offset: int, frame_affine: FrameAffine, channel: int = 0) -> None:
        super().__init__()
        scale = norm.weight
        if not isinstance(scale, Tensor):
            raise BundleError(f"norm layer {name!r} has no scale: nothing there can adapt")
        shift = getattr(norm, "bias", None)
        self.norm = _without_affine(norm)
        self.shape = tuple(scale.shape)
        self.channels_first = isinstance(norm, CHANNELS_FIRST)
        self.has_shift = isinstance(shift, Tensor)
        size = scale.numel()
        self.place = NormSlice(name, offset, offset + size, offset + size * (2 if self.has_shift else 1))
        self.register_buffer("scale", scale.detach().clone().float())
        self.register_buffer("shift", shift.detach().clone().float() if isinstance(shift, Tensor) else None)
        self.frame_affine = frame_affine
        # Where this layer's running statistics lie in those of all BatchNorm layers; empty where it has none.
        self.channels = slice(channel, channel + (size if isinstance(norm, BATCH_NORM) else 0))

    def forward(self, x: Tensor) -> Tensor:
        moments = self.frame_affine.moments
        if moments is None or self.channels.start == self.channels.stop:
            x_hat = self.norm(x)
        else:
            x_hat = moments.normalise(x, self.channels, self.norm.eps)
        rows = self.frame_affine.rows
        if rows is None:
            scale, shift = self._shaped(self.scale[None], x), None
            if self.shift is not None:
                shift = self._shaped(self.shift[None], x)
        else:
            if x.shape[0] != rows.shape[0]:
                raise BundleError(
                    f"norm layer {self.place.layer!r} sees {x.shape[0]} rows for {rows.shape[0]} frames: "
                    "models that fold other dimensions into the batch cannot be adapted per stream"
                )
            place = self.place
            scale, shift = self._shaped(rows[:, place.scale : place.shift], x), None
            if self.has_shift:
                shift = self._shaped(rows[:, place.shift : place.end], x)
        out = x_hat * scale if shift is None else torch.addcmul(shift, x_hat, scale)
        if self.frame_affine.features is not None:
            pooled = self._pooled(out)
            if self.place.scale == 0:
                self.frame_affine.first_features = pooled if rows is None else self._under_source(x_hat.detach())
            self.frame_affine.features.append((self.place.scale, pooled))
        return out

    @torch.no_grad()
    def _under_source(self, x_hat: Tensor) -> Tensor:
        scale = self._shaped(self.scale[None], x_hat)
        if self.shift is None:
            return self._pooled(x_hat * scale)
        return self._pooled(torch.addcmul(self._shaped(self.shift[None], x_hat), x_hat, scale))

    @property
    def feature_count(self) -> int:
        """How many pooled features this layer has: one a channel."""
        return int(self.scale.shape[0 if self.channels_first else -1])

    def _shaped(self, rows: Tensor, x: Tensor) -> Tensor:
        if self.channels_first:
            return rows.view(*rows.shape, *([1] * (x.dim() - 2)))
        lead = x.dim() - 1 - len(self.shape)
        return rows.view(rows.shape[0], *([1] * lead), *self.shape)

    def _pooled(self, out: Tensor) -> Tensor:
        """Rectified, as the next layer mostly sees it: that tells shifts apart better than the plain mean."""
        if out.dim() == 2:
            return torch.relu(out)
        pooled: Tensor = _RectifiedMean.apply(
            out, tuple(range(2, out.dim()) if self.channels_first else range(1, out.dim() - 1))
        )
        return pooled


class _RectifiedMean(torch.autograd.Function):
    """relu(x).mean(dims). Its gradient has the layout of x: the built-in one is contiguous, and on channels-last
    input every operation behind it then mixes two layouts, which took a third of an engine pass.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        active = torch.relu(x)
        context.save_for_backward(active)
        context.dims = dims
        return active.mean(dims)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (active,) = context.saved_tensors
        share = gradient / math.prod(active.shape[dim] for dim in context.dims)
        for dim in context.dims:
            share = share.unsqueeze(dim)
        return torch.ops.aten.threshold_backward(share.expand_as(active), active, 0), None


def _without_affine(norm: nn.Module) -> nn.Module:
    bare = copy.copy(norm)
    bare._parameters = dict.fromkeys(norm._parameters)
    return bare.eval()


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, CHANNELS_FIRST + CHANNELS_LAST)


class AdaptableModel(nn.Module):
    """A frozen classifier in eval mode whose norm affine is an argument.

    `source_affine` is (P,); `places` says which coordinates belong to which layer. Layers without affine stay
    as they are; a layer object used at several places is swapped once and keeps one set of coordinates.
    The network given is changed in place.

    Raises BundleError where no layer has an affine, where a weight is not finite, or where a BatchNorm layer keeps no
    running statistics and would so mix the streams of a pass.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.memory_format = torch.channels_last
        self.frame_affine = FrameAffine()
        self.layers: list[StreamNorm] = []
        swapped: dict[int, StreamNorm] = {}
        offset = channel = 0
        for name, module in list(network.named_modules(remove_duplicate=False)):
            if isinstance(module, BATCH_NORM) and module.running_mean is None:
                raise BundleError(
                    f"norm layer {name!r} keeps no running statistics, so frames of different streams would mix; "
                    "train the model with track_running_stats=True"
                )
            if not _is_norm(module) or module.weight is None:
                continue
            if id(module) not in swapped:
                layer = StreamNorm(module, name, offset, self.frame_affine, channel)
                offset, channel = layer.place.end, layer.channels.stop
                swapped[id(module)] = layer
                self.layers.append(layer)
            parent, _, child = name.rpartition(".")
            if not name:
                raise BundleError("the model itself is a normalisation layer, not a classifier")
            setattr(network.get_submodule(parent), child, swapped[id(module)])
        if not self.layers:
            raise BundleError(
                "the model has no normalisation layer with a scale: nothing can adapt; "
                "run it as it is, or train one with GroupNorm, LayerNorm or BatchNorm"
            )
        self.network = network.float().eval()
        linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
        self.head = linear[-1] if linear else None
        if self.head is not None:
            self.head.register_forward_pre_hook(self._remember_head)
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        for name, tensor in self.network.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise BundleError(f"weight {name!r} of the source model is not finite")
        self.places = [layer.place for layer in self.layers]
        self.register_buffer("source_affine", self._source_affine())
        running = [layer.norm for layer in self.layers if layer.channels.start < layer.channels.stop]
        self.register_buffer("source_mean", _joined([norm.running_mean for norm in running]))
        self.register_buffer("source_variance", _joined([norm.running_var for norm in running]))

    @property
    def coordinates(self) -> int:
        """P, the length of the norm affine."""
        return int(self.source_affine.numel())

    @property
    def feature_count(self) -> int:
        """F, the pooled features of all norm layers."""
        return sum(layer.feature_count for layer in self.layers)

    @property
    def batch_channels(self) -> int:
        """C, the channels of all BatchNorm layers; 0 where there is none. Their source statistics are
        `source_mean` and `source_variance`, (C,)."""
        return int(self.source_mean.numel())

    @property
    def is_scale(self) -> Tensor:
        """(P,) float: 1 for scales, 0 for shifts."""
        flags = torch.zeros(self.coordinates)
        for place in self.places:
            flags[place.scale : place.shift] = 1.0
        return flags

    def _source_affine(self) -> Tensor:
        parts = []
        for layer in self.layers:
            parts.append(layer.scale.flatten())
            if layer.shift is not None:
                parts.append(layer.shift.flatten())
        return torch.cat(parts)

    def _remember_head(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.frame_affine.head = inputs[0].detach() if inputs[0].dim() == 2 else None

    def forward(self, frames: Tensor, rows: Tensor | None = None, moments: NormMoments | None = None) -> Tensor:
        """Logits (B, classes) of frames (B, ch, h, w) under affine rows (B, P), or the source affine.

        BatchNorm layers use their running statistics, or what `moments` says.
        """
        self.frame_affine.rows, self.frame_affine.moments = rows, moments
        try:
            return self.network(frames.contiguous(memory_format=self.memory_format))
        finally:
            self.frame_affine.rows = self.frame_affine.moments = None

    def forward_with_features(
        self, frames: Tensor, rows: Tensor | None = None, moments: NormMoments | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) and the pooled outputs of all norm layers, joined: (B, F)."""
        logits, features, _ = self.forward_with_inputs(frames, rows, moments)
        return logits, features

    def forward_with_inputs(
        self, frames: Tensor, rows: Tensor | None = None, moments: NormMoments | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward_with_features`, and what the first norm layer would put out under the source affine, pooled:
        (B, F1). The latter tells how unusual the frames are, whatever has been adapted."""
        self.frame_affine.features = []
        try:
            logits = self(frames, rows, moments)
            # By place, not by when they ran: a model may run its layers in another order than it names them.
            features = dict(self.frame_affine.features)
            first = self.frame_affine.first_features
            if first is None or len(features) != len(self.layers) or len(self.frame_affine.features) != len(features):
                raise BundleError(self._misuse([place for place, _ in self.frame_affine.features]))
            return logits, torch.cat([features[place] for place in sorted(features)], 1), first
        finally:
            self.frame_affine.features = self.frame_affine.first_features = None

    def _misuse(self, used: list[int]) -> str:
        for layer in self.layers:
            if (times := used.count(layer.place.scale)) != 1:
                return (
                    f"the forward pass uses norm layer {layer.place.layer!r} {times} times, not once; "
                    "remove layers without use, and give each place a layer of its own"
                )
        return "the forward pass used none of the model's norm layers"

    def fit_layout(self, frames: Tensor) -> None:
        """Lay weights and frames out channels-last, which is fastest, unless the network takes pictures apart with
        `view` and cannot run so; (B, ch, h, w) frames to try it with. Raises RuntimeError where neither runs."""
        for self.memory_format in (torch.channels_last, torch.contiguous_format):
            self.network.to(memory_format=self.memory_format)
            try:
                with torch.no_grad():
                    self(frames)
                return
            except RuntimeError:
                if self.memory_format is torch.contiguous_format:
                    raise


def _joined(statistics: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().float() for tensor in statistics]) if statistics else torch.zeros(0)
