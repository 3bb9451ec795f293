"""A trained classifier that takes the affine of its norm layers as an argument, frame by frame.

Every norm layer is replaced once, at load time, by a `StreamNorm`. One forward pass can then serve many streams, and
its backward pass gives the gradient of the affine per frame.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from meta.moments import NormMoments
from meta.stream_norm import BATCH_NORM, LayerCorrection, PassContext, Start, StreamNorm, is_norm
from schemas.bundle import Layout
from schemas.errors import BundleError


class Corrector(Protocol):
    """A bundle's correction of single frames (`meta.correction`)."""

    def under(self, strength: Tensor) -> LayerCorrection:
        """The correction for one pass, with a strength (B,) in [0, 1] for each of its frames."""
        ...


class AdaptableModel(nn.Module):
    """A frozen classifier in eval mode that takes its norm affine as an argument. `network` is changed in place.
    Scales, shifts and BatchNorm statistics are read once, here.

    `source_affine` (P,) holds scale and shift of all layers, and `places` says which coordinates belong to which layer.
    Layers without an affine are left alone. A layer object that occurs at several places of the network is replaced
    everywhere and has one set of coordinates. `correction` is the bundle's correction of single frames, if it has one;
    a pass uses it only if it is given as an argument.

    order: names of the layers in the order of execution (`run_order`). Affine, features and statistics are concatenated
        in this order; by default in that of `norm_layers`. The attribute is empty if both orders are the same.
    layouts: norm layers of the network's own classes that adapt too, and the layout of their channels.

    Raises BundleError if no layer has an affine, if a weight is not finite, if a BatchNorm layer keeps no running
    statistics (it would mix the streams of a pass), or if `order` or `layouts` do not name the network's layers.
    """

    source_affine: Tensor

    def __init__(
        self, network: nn.Module, order: Sequence[str] = (), layouts: Mapping[str, Layout] = MappingProxyType({})
    ) -> None:
        super().__init__()
        self.memory_format = torch.channels_last
        self.context = PassContext()
        self.correction: Corrector | None = None
        self.layers: list[StreamNorm] = []
        self.layouts = dict(layouts)
        found = norm_layers(network, layouts)
        ordered = _in_order(found, order)
        self.order = [] if ordered == list(found) else ordered
        start = Start()
        for name in ordered:
            layer = StreamNorm(found[name], name, start, self.context, layouts.get(name))
            start = layer.after
            self.layers.append(layer)
        _swap(network, {id(found[layer.place.layer]): layer for layer in self.layers})
        _without_shortcuts(network)
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
        """F, the number of pooled features of all norm layers."""
        return sum(layer.feature_count for layer in self.layers)

    @property
    def batch_channels(self) -> int:
        """C, the number of channels of all BatchNorm layers; 0 without one. Their running statistics are `source_mean`
        and `source_variance`, (C,)."""
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
        """The device of the model, and of all tensors that a pass takes and returns."""
        return self.source_affine.device

    def train(self, mode: bool = True) -> AdaptableModel:
        """Stays in eval mode for any `mode`: in train mode a pass would change BatchNorm's running statistics, and
        dropout would make it random."""
        del mode
        return super().train(False)

    def move_to(self, device: torch.device) -> None:
        """Move to the device; on a GPU in the contiguous layout, the only one of its group normalisation."""
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
        self.context.head = inputs[0].detach() if inputs[0].dim() == 2 else None

    def forward(
        self,
        frames: Tensor,
        rows: Tensor | None = None,
        moments: NormMoments | None = None,
        correction: LayerCorrection | None = None,
    ) -> Tensor:
        """Logits (B, classes), float32, of frames (B, ch, h, w) under affine `rows` (B, P); None: the source affine.

        BatchNorm layers normalise with `moments`; None: with the source's running statistics.
        """
        self.context.rows = None if rows is None else rows.split(self._sizes, 1)
        self.context.moments, self.context.correction = moments, correction
        try:
            logits: Tensor = self.network(frames.contiguous(memory_format=self.memory_format))
            return logits.float()
        finally:
            self.context.rows = self.context.moments = self.context.correction = None

    def forward_with_features(
        self,
        frames: Tensor,
        rows: Tensor | None = None,
        moments: NormMoments | None = None,
        correction: LayerCorrection | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, classes), and the pooled outputs of all norm layers, concatenated: (B, F)."""
        context = self.context
        context.features = []
        try:
            logits = self(frames, rows, moments, correction)
            # Sorted by place in the affine: in bundles without `norm_order` that is not the order of execution.
            features = dict(context.features)
            if len(features) != len(self.layers) or len(context.features) != len(features):
                raise BundleError(self._misuse([place for place, _ in context.features]))
            return logits, torch.cat([features[place] for place in sorted(features)], 1)
        finally:
            context.features = None

    def forward_with_inputs(
        self,
        frames: Tensor,
        rows: Tensor | None = None,
        moments: NormMoments | None = None,
        correction: LayerCorrection | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward_with_features`, and the first norm layer's pooled output (B, F1) under the source affine.

        The latter shows how unusual the frames are, independently of adaptation.
        """
        context = self.context
        context.first = True
        try:
            logits, features = self.forward_with_features(frames, rows, moments, correction)
            return logits, features, cast(Tensor, context.first_features)
        finally:
            context.first, context.first_features = False, None

    def _misuse(self, used: list[int]) -> str:
        """The error message for a pass that does not use every layer exactly once; `used`: starts of their scales."""
        for layer in self.layers:
            if (times := used.count(layer.place.scale)) != 1:
                return (
                    f"the forward pass uses norm layer {layer.place.layer!r} {times} times, not once; "
                    "remove layers without use, and give each place a layer of its own"
                )
        return "the forward pass used none of the model's norm layers"

    def fit_layout(self, frames: Tensor) -> None:
        """Choose the memory layout: channels-last, which is fastest, or contiguous if the network does not run with
        that, as where it reshapes images with `view`.

        frames (B, ch, h, w): to try it with. Raises RuntimeError if the network runs with neither.
        """
        for self.memory_format in (torch.channels_last, torch.contiguous_format):
            try:
                self.network.to(memory_format=self.memory_format)  # fails for weights of Conv3d
                with torch.no_grad():
                    self(frames)
                break
            except RuntimeError:
                if self.memory_format is torch.contiguous_format:
                    raise
        self._take_rectifiers(frames.shape)

    @torch.no_grad()
    def _take_rectifiers(self, shape: torch.Size) -> None:
        """Fuse each norm layer with the ReLU after it in a Sequential; the backward pass then runs over both at once.

        If the logits change, something else uses the tensor between the two, and all of it is undone.
        """
        frames = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        before = self(frames)
        taken: list[tuple[nn.Sequential, int, nn.ReLU]] = []
        for module in self.network.modules():
            if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
                for index, (layer, behind) in enumerate(pairwise(module)):
                    if isinstance(layer, StreamNorm) and type(behind) is nn.ReLU:
                        taken.append((module, index, behind))
        for sequence, index, _ in taken:
            sequence[index].rectify, sequence[index + 1] = True, nn.Identity()
        if not torch.equal(before, self(frames)):
            for sequence, index, rectifier in taken:
                sequence[index].rectify, sequence[index + 1] = False, rectifier


def norm_layers(network: nn.Module, custom: Collection[str] = ()) -> dict[str, nn.Module]:
    """The norm layers that can adapt, by name, in the order of `named_modules`, which need not be that of execution.

    A shared layer occurs once, under its first name. `custom` names layers of the network's own classes
    (`meta.custom_norms`). Raises BundleError if there is no layer, if one would mix streams, or if one of `custom` does
    not exist.
    """
    found: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        if isinstance(module, BATCH_NORM) and module.running_mean is None:
            raise BundleError(
                f"norm layer {name!r} keeps no running statistics, so frames of different streams would mix; "
                "train the model with track_running_stats=True"
            )
        if name in custom or (is_norm(module) and module.weight is not None):
            if is_parametrized(module) or "weight" not in module._parameters:
                raise BundleError(
                    f"norm layer {name!r} works its weights out from others, as a parametrization or weight_norm does; "
                    "bake them in with torch.nn.utils.parametrize.remove_parametrizations or "
                    "torch.nn.utils.remove_weight_norm, save the weights anew, and build it without"
                )
            found[name] = module
    if "" in found:
        raise BundleError("the model itself is a normalisation layer, not a classifier")
    if not found:
        raise BundleError(
            "the model has no normalisation layer with a scale: nothing can adapt; run it as it is, or train one with "
            "torch's GroupNorm, LayerNorm, RMSNorm, InstanceNorm or BatchNorm (or a class of your own that holds a "
            "weight, and no more than a bias besides, of one value per channel)"
        )
    if missing := sorted(set(custom) - found.keys()):
        raise BundleError(
            f"the bundle adapts norm layer {missing[0]!r}, which the network does not have; where the network's code "
            "has changed, make the bundle anew"
        )
    return found


@torch.no_grad()
def run_order(network: nn.Module, frames: Tensor, custom: Collection[str] = ()) -> list[str]:
    """The names of `norm_layers` in the order in which a pass over frames (B, ch, h, w) runs them, with repetitions.

    To be called before the layers are replaced.
    """
    _without_shortcuts(network)
    ran: list[str] = []
    hooks = [
        layer.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, layer in norm_layers(network, custom).items()
    ]
    try:
        network(frames.contiguous())
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def _in_order(named: Iterable[str], order: Sequence[str]) -> list[str]:
    """`order`, or `named` if it is empty. Raises BundleError if it is no permutation of `named`."""
    names = list(named)
    given = list(order) or names
    times, wanted = Counter(given), Counter(names)
    odd = next((name for name in given + names if times[name] != wanted[name]), None)
    if odd is not None:
        raise BundleError(
            f"the bundle's order of norm layers has {odd!r} {times[odd]} times, the network has it {wanted[odd]} "
            "times; where the network's code has changed, make the bundle anew"
        )
    return given


def _swap(network: nn.Module, layers: dict[int, StreamNorm]) -> None:
    """Replace modules of the network, at all their places, by `layers`, whose keys are ids of the modules."""
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if id(module) in layers:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, layers[id(module)])


def _without_shortcuts(network: nn.Module) -> None:
    """Turn off the fast path of torch's transformer layers, which in eval mode reads the weights of the norm layers and
    does not call them. The layers take it for known activations only."""
    for module in network.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0


def _joined(statistics: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().float() for tensor in statistics]) if statistics else torch.zeros(0)
