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
from itertools import pairwise
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from meta.affine import Affine, rectified_mean, scaled, scaled_in_place
from meta.moments import NormMoments
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


class Corrector(Protocol):
    """What a source model knows of shifts (`meta.correction`)."""

    def under(self, strength: Tensor) -> LayerCorrection:
        """The correction of one pass with the strength (B,) for each of its frames, in [0, 1]."""
        ...


class LayerCorrection(Protocol):
    """What changes normalised activations, channel by channel, before scale and shift (`meta.correction`)."""

    def of(self, channels: slice, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """Gain and offset (B, C) of a layer that has `channels` of those of all layers joined, from each frame's first
        and second moments (B, C) over its positions."""
        ...


class FrameAffine(threading.local):
    """What the pass under way asks of every layer, shared by all layers of one model; each thread has its own pass.

    `rows` are scales and shifts of every layer in turn, (B, ...) each, one row a frame, or None for the source affine;
    `moments` replaces the running statistics of BatchNorm layers where it is set; `correction` changes what is
    normalised before scale and shift; `features` collects each layer's
    rectified and pooled output (B, C), with the layer's place in the affine, where it is a list; `first_features` is
    that of the first layer as the source affine would make it, where `first` asks for it. `head` is what went into the
    last linear layer in the thread's last pass.
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
    """One swapped normalisation layer: x_hat = normalise(x), then per-frame scale and shift.

    `part`: which of the pass's `rows` are its scales; its shifts, if it has any, come next.
    """

    def __init__(
        self, norm: nn.Module, name: str, offset: int, frame_affine: FrameAffine, channel: int = 0, part: int = 0
    ) -> None:
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
        self.part = part
        # Where this layer's running statistics lie in those of all BatchNorm layers; empty where it has none.
        self.channels = slice(channel, channel + (size if isinstance(norm, BATCH_NORM) else 0))
        self.own_features = slice(0, 0)  # of those of all layers joined
        self.groups = norm.num_groups if type(norm).forward is nn.GroupNorm.forward else 0
        self.rectify = False  # whether it does the work of the ReLU behind it

    def forward(self, x: Tensor) -> Tensor:
        at, rows = self.frame_affine, self.frame_affine.rows
        if rows is None and at.correction is None and not (x.requires_grad and torch.is_grad_enabled()):
            return self._as_source(x)
        scale, shift = self._source_rows(x) if rows is None else self._frame_rows(x, rows)
        inverse = None
        if self.groups and at.correction is None:
            with torch.no_grad():
                x_hat, inverse = _group_normalised(x, self.groups, self.norm.eps)
        else:
            x = self._normalised(x)
            x_hat = x.detach()
        if at.correction is not None:
            scale, shift = self._corrected(x, scale, shift, at.correction)
        positions = self._positions(x) if at.features is not None else None
        if at.first and self.place.scale == 0 and rows is not None:
            with torch.no_grad():
                as_source = scaled(x_hat, *self._source_rows(x_hat)).relu_()
                at.first_features = rectified_mean(as_source, self._positions(x), rectified=True)
        if torch.is_grad_enabled():
            out, pooled = Affine.apply(x, x_hat, inverse, scale, shift, self.rectify, positions)
        else:
            out, pooled = scaled_in_place(x_hat, scale, shift, self.rectify, positions)
        self._collect(pooled)
        return cast(Tensor, out)

    def _collect(self, pooled: Tensor | None) -> None:
        at = self.frame_affine
        if at.features is not None and pooled is not None:
            at.features.append((self.place.scale, pooled))
            if at.first and self.place.scale == 0 and at.first_features is None:
                at.first_features = pooled

    def _corrected(
        self, x: Tensor, scale: Tensor, shift: Tensor | None, correction: LayerCorrection
    ) -> tuple[Tensor, Tensor]:
        """Scale and shift that also do what the correction does to x, which is normalised: going over it once will do.

        The gradient passes through what is estimated: a change of scale or shift in a layer before is partly taken back
        here, and whoever adapts has to know.
        """
        positions = self._positions(x)
        mean, square = (t.mean(positions) if positions else t for t in (x, x * x))
        gain, offset = correction.of(self.own_features, mean, square)
        ones = [1] * len(positions)
        shape = (len(x), -1, *ones) if self.channels_first else (len(x), *ones, -1)
        gain, offset = gain.view(shape), offset.view(shape)
        moved = scale * offset
        return scale * gain, moved if shift is None else shift + moved

    def _as_source(self, x: Tensor) -> Tensor:
        """What the trained layer puts out, as fast as that."""
        if self.groups:
            out = nn.functional.group_norm(x, self.groups, self.scale, self.shift, self.norm.eps)
        else:
            out = scaled(self._normalised(x), *self._source_rows(x))
        if self.rectify:
            out.relu_()
        if self.frame_affine.features is not None:
            self._collect(rectified_mean(out, self._positions(x), self.rectify))
        return out

    def _normalised(self, x: Tensor) -> Tensor:
        moments = self.frame_affine.moments
        if moments is None or self.channels.start == self.channels.stop:
            return cast(Tensor, self.norm(x))
        return moments.normalise(x, self.channels, self.norm.eps)

    @property
    def feature_count(self) -> int:
        """How many pooled features this layer has: one a channel."""
        return int(self.scale.shape[0 if self.channels_first else -1])

    def _frame_rows(self, x: Tensor, rows: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        if x.shape[0] != rows[0].shape[0]:
            raise BundleError(
                f"norm layer {self.place.layer!r} sees {x.shape[0]} rows for {rows[0].shape[0]} frames: "
                "models that fold other dimensions into the batch cannot be adapted per stream"
            )
        shift = self._shaped(rows[self.part + 1], x) if self.has_shift else None
        return self._shaped(rows[self.part], x), shift

    def _source_rows(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        shift = self._shaped(self.shift[None], x) if self.shift is not None else None
        return self._shaped(self.scale[None], x), shift

    def _shaped(self, rows: Tensor, x: Tensor) -> Tensor:
        if self.channels_first:
            return rows.view(*rows.shape, *([1] * (x.dim() - 2)))
        lead = x.dim() - 1 - len(self.shape)
        return rows.view(rows.shape[0], *([1] * lead), *self.shape)

    def _positions(self, x: Tensor) -> tuple[int, ...]:
        """The dimensions of x that are neither frames nor channels."""
        return tuple(range(2, x.dim()) if self.channels_first else range(1, x.dim() - 1))


def _group_normalised(x: Tensor, groups: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """x (B, C, ...) normalised over each group's channels and positions, and the inverse deviations (B, groups)."""
    frames, channels = x.shape[:2]
    size = math.prod(x.shape[2:])
    if not x.is_cpu:
        x = x.contiguous()  # CUDA's refuses anything else
    x_hat, _, inverse = torch.native_group_norm(x, None, None, frames, channels, size, groups, epsilon)
    return x_hat, inverse


def _without_affine(norm: nn.Module) -> nn.Module:
    bare = copy.copy(norm)
    bare._parameters = dict.fromkeys(norm._parameters)
    return bare.eval()


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, CHANNELS_FIRST + CHANNELS_LAST)


class AdaptableModel(nn.Module):
    """A frozen classifier in eval mode whose norm affine is an argument.

    `correction` is what the model's bundle knows of shifts, if anything; a pass uses it only where it is given to it.
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
        self.correction: Corrector | None = None
        self.layers: list[StreamNorm] = []
        swapped: dict[int, StreamNorm] = {}
        offset = channel = part = 0
        for name, module in list(network.named_modules(remove_duplicate=False)):
            if isinstance(module, BATCH_NORM) and module.running_mean is None:
                raise BundleError(
                    f"norm layer {name!r} keeps no running statistics, so frames of different streams would mix; "
                    "train the model with track_running_stats=True"
                )
            if not _is_norm(module) or module.weight is None:
                continue
            if id(module) not in swapped:
                layer = StreamNorm(module, name, offset, self.frame_affine, channel, part)
                offset, channel, part = layer.place.end, layer.channels.stop, part + 1 + layer.has_shift
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
        first = 0
        for layer in self.layers:
            layer.own_features = slice(first, first + layer.feature_count)
            first = layer.own_features.stop
        ends = [end for place in self.places for end in (place.scale, place.shift, place.end)]
        self._sizes = [end - start for start, end in pairwise(ends) if end > start]
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
        flags = torch.zeros(self.coordinates, device=self.device)
        for place in self.places:
            flags[place.scale : place.shift] = 1.0
        return flags

    @property
    def device(self) -> torch.device:
        """Where the model is, and so everything that a pass puts in and gets out."""
        return self.source_affine.device

    def place(self, device: torch.device) -> None:
        """Move to the device. On a GPU nothing is laid out channels-last, which its group normalisation refuses."""
        if device.type != "cpu":
            self.memory_format = torch.contiguous_format
        self.to(device, memory_format=self.memory_format)

    def _source_affine(self) -> Tensor:
        parts = []
        for layer in self.layers:
            parts.append(layer.scale.flatten())
            if layer.shift is not None:
                parts.append(layer.shift.flatten())
        return torch.cat(parts)

    def _remember_head(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.frame_affine.head = inputs[0].detach() if inputs[0].dim() == 2 else None

    def forward(
        self,
        frames: Tensor,
        rows: Tensor | None = None,
        moments: NormMoments | None = None,
        correction: LayerCorrection | None = None,
    ) -> Tensor:
        """Logits (B, classes) of frames (B, ch, h, w) under affine rows (B, P), or the source affine.

        BatchNorm layers use their running statistics, or what `moments` says.
        """
        self.frame_affine.rows = None if rows is None else rows.split(self._sizes, 1)
        self.frame_affine.moments, self.frame_affine.correction = moments, correction
        try:
            return self.network(frames.contiguous(memory_format=self.memory_format))
        finally:
            self.frame_affine.rows = self.frame_affine.moments = self.frame_affine.correction = None

    def forward_with_features(
        self,
        frames: Tensor,
        rows: Tensor | None = None,
        moments: NormMoments | None = None,
        correction: LayerCorrection | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) and the pooled outputs of all norm layers, joined: (B, F)."""
        at = self.frame_affine
        at.features = []
        try:
            logits = self(frames, rows, moments, correction)
            # By place, not by when they ran: a model may run its layers in another order than it names them.
            features = dict(at.features)
            if len(features) != len(self.layers) or len(at.features) != len(features):
                raise BundleError(self._misuse([place for place, _ in at.features]))
            return logits, torch.cat([features[place] for place in sorted(features)], 1)
        finally:
            at.features = None

    def forward_with_inputs(
        self,
        frames: Tensor,
        rows: Tensor | None = None,
        moments: NormMoments | None = None,
        correction: LayerCorrection | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward_with_features`, and what the first norm layer would put out under the source affine, pooled:
        (B, F1). The latter tells how unusual the frames are, whatever has been adapted."""
        at = self.frame_affine
        at.first = True
        try:
            logits, features = self.forward_with_features(frames, rows, moments, correction)
            return logits, features, cast(Tensor, at.first_features)
        finally:
            at.first, at.first_features = False, None

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
                break
            except RuntimeError:
                if self.memory_format is torch.contiguous_format:
                    raise
        self._take_rectifiers(frames.shape)

    @torch.no_grad()
    def _take_rectifiers(self, shape: torch.Size) -> None:
        """Let norm layers do the work of a ReLU behind them, where a Sequential says that there is one: the gradient
        then passes both at once. Whoever else uses what lies between shows in the answers; then nothing changes."""
        frames = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        before = self(frames)
        taken: list[tuple[nn.Sequential, int, nn.ReLU]] = []
        for module in self.network.modules():
            if type(module).forward is nn.Sequential.forward:
                for index, (layer, behind) in enumerate(pairwise(module)):
                    if isinstance(layer, StreamNorm) and type(behind) is nn.ReLU:
                        taken.append((module, index, behind))
        for sequence, index, _ in taken:
            sequence[index].rectify, sequence[index + 1] = True, nn.Identity()
        if not torch.equal(before, self(frames)):
            for sequence, index, rectifier in taken:
                sequence[index].rectify, sequence[index + 1] = False, rectifier


def _joined(statistics: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().float() for tensor in statistics]) if statistics else torch.zeros(0)
