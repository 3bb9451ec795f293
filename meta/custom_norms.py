"""Norm layers of classes outside of torch, such as ConvNeXt's LayerNorm over the channels of images.

`driftkeel bundle create` finds out what they do by experiment, and writes it into the manifest for the workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meta.stream_norm import CHANNELS_LAST, is_norm, with_affine
from schemas.bundle import Layout

TOLERANCE = 1e-4
UNSCALED = 0.05  # tolerance for normalised values, of about 1, when the input is multiplied by 3


@dataclass(frozen=True)
class CustomNorms:
    """layouts: name and layout of each layer that can adapt. others: class name and number of those that cannot."""

    layouts: dict[str, Layout]
    others: dict[str, int]


@torch.no_grad()
def find_custom_norms(network: nn.Module, frames: Tensor) -> CustomNorms:
    """Examine the network's custom norm layers in a pass over frames (B, ch, h, w); those that do not run are ignored.
    The network is not changed."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(name, []).extend(given[:1]))
        for name, module in _candidates(network)
    ]
    try:
        network(frames.contiguous())
    finally:
        for hook in hooks:
            hook.remove()
    layouts: dict[str, Layout] = {}
    others: Counter[str] = Counter()
    for name, inputs in seen.items():
        module = network.get_submodule(name)
        once = len(inputs) == 1 and isinstance(inputs[0], Tensor) and len(inputs[0]) == len(frames)
        layout = _layout(module, inputs[0]) if once else None
        if is_norm(module):  # A subclass of torch's has the layout of its base, unless found otherwise.
            layout = layout if layout == "channels-first" else None
        elif layout is None and _called_norm(module):
            others[type(module).__name__] += 1
        if layout is not None:
            layouts[name] = layout
    return CustomNorms(layouts, dict(others))


def _candidates(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Leaf modules with parameters or buffers, of classes outside of torch, that may be norm layers."""
    for name, module in network.named_modules():
        held = [*module.parameters(), *module.buffers()]
        whole = bool(name) and bool(held) and next(module.children(), None) is None
        known = type(module).__module__.startswith("torch.") or (
            is_norm(module) and not isinstance(module, CHANNELS_LAST)
        )
        if whole and not known and (_called_norm(module) or "weight" in module._parameters):
            yield name, module


def _called_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _layout(module: nn.Module, x: Tensor) -> Layout | None:
    """The layout of the channels if weight and bias only scale and shift the normalised input x, else None."""
    held = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    weight = held.get("weight")
    if weight is None or weight.dim() != 1 or held.keys() - {"weight", "bias"} or module._buffers or x.dim() < 2:
        return None
    random = torch.Generator().manual_seed(0)
    scale, shift = (0.5 + torch.rand(len(weight), generator=random) for _ in range(2))
    bare = with_affine(module, torch.ones_like(scale), torch.zeros_like(shift))
    try:
        x_hat, larger = bare.forward(x), bare.forward(3 * x)
        out = with_affine(module, scale, shift).forward(x)
        if not x_hat.shape == out.shape == x.shape:
            return None
    except Exception:  # noqa: BLE001 - foreign code with unexpected arguments
        return None
    if not (_called_norm(module) or torch.allclose(x_hat, larger, rtol=UNSCALED, atol=UNSCALED)):
        return None
    shift = shift if "bias" in held else torch.zeros_like(shift)
    shapes: dict[Layout, tuple[int, ...]] = {"channels-last": (-1,), "channels-first": (-1, *[1] * (x.dim() - 2))}
    for layout, shape in shapes.items():
        if x.shape[-1 if layout == "channels-last" else 1] == len(scale):
            expected = x_hat * scale.view(shape) + shift.view(shape)
            if torch.allclose(out, expected, rtol=TOLERANCE, atol=TOLERANCE):
                return layout
    return None
