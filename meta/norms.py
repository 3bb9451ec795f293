"""Normalisation layers whose scale and shift may differ from frame to frame.

Every normalisation layer of a trained classifier is swapped once, at load time, for a `StreamNorm` that
normalises without affine and then applies the scale and shift of the stream that each frame belongs to.
One forward pass can so serve many streams, and the gradient of the affine comes out per frame.
Normalising without affine also avoids a crash of torch 2.13 in the backward of `group_norm` with affine
weights on channels-last input.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from schemas.errors import BundleError

CHANNELS_FIRST = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
CHANNELS_LAST = (nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class NormSlice:
    """Where one layer's affine lies in the flat vector: [scale, shift) then [shift, end)."""

    layer: str
    scale: int
    shift: int
    end: int


class FrameAffine:
    """The affine rows of the pass under way, shared by all layers of one model.

    `rows` is (B, P), one row a frame, or None for the source affine; `features` collects each layer's
    rectified and pooled output (B, C) where it is a list.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.features: list[Tensor] | None = None


class StreamNorm(nn.Module):
    """One swapped normalisation layer: x_hat = normalise(x), then per-frame scale and shift."""

    def __init__(self, norm: nn.Module, name: str, offset: int, frame_affine: FrameAffine) -> None:
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

    def forward(self, x: Tensor) -> Tensor:
        x_hat = self.norm(x)
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
            self.frame_affine.features.append(self._pooled(out))
        return out

    def _shaped(self, rows: Tensor, x: Tensor) -> Tensor:
        if self.channels_first:
            return rows.view(rows.shape[0], -1, *([1] * (x.dim() - 2)))
        lead = x.dim() - 1 - len(self.shape)
        return rows.view(rows.shape[0], *([1] * lead), *self.shape)

    def _pooled(self, out: Tensor) -> Tensor:
        """Rectified, as the next layer mostly sees it: that tells shifts apart better than the plain mean."""
        active = torch.relu(out)
        if out.dim() == 2:
            return active
        return active.flatten(2).mean(2) if self.channels_first else active.flatten(1, -2).mean(1)


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

    Raises BundleError where no layer has an affine, or where a weight is not finite.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.frame_affine = FrameAffine()
        self.layers: list[StreamNorm] = []
        swapped: dict[int, StreamNorm] = {}
        offset = 0
        for name, module in list(network.named_modules(remove_duplicate=False)):
            if not _is_norm(module) or module.weight is None:
                continue
            if id(module) not in swapped:
                layer = StreamNorm(module, name, offset, self.frame_affine)
                offset = layer.place.end
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
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        for name, tensor in self.network.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise BundleError(f"weight {name!r} of the source model is not finite")
        self.places = [layer.place for layer in self.layers]
        self.register_buffer("source_affine", self._source_affine())

    @property
    def coordinates(self) -> int:
        """P, the length of the norm affine."""
        return int(self.source_affine.numel())

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

    def forward(self, frames: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits (B, classes) of frames (B, ch, h, w) under affine rows (B, P), or the source affine."""
        self.frame_affine.rows = rows
        try:
            return self.network(frames)
        finally:
            self.frame_affine.rows = None

    def forward_with_features(self, frames: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) and the pooled outputs of all norm layers, joined: (B, F)."""
        self.frame_affine.features = []
        try:
            logits = self(frames, rows)
            return logits, torch.cat(self.frame_affine.features, 1)
        finally:
            self.frame_affine.features = None
