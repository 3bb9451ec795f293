"""Norm layers of a network's own classes, such as ConvNeXt's LayerNorm over the channels of pictures.

What they do is found out by trying, when a bundle is made, and stands in its manifest: a worker tries nothing.
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
UNSCALED = 0.05  # how far what is normalised may move, of about 1, when its input is three times as large


@dataclass(frozen=True)
class CustomNorms:
    """`layouts`: where the channels of those that can adapt lie, by name. `others`: how many of a class cannot."""

    layouts: dict[str, Layout]
    others: dict[str, int]


@torch.no_grad()
def find_custom_norms(network: nn.Module, frames: Tensor) -> CustomNorms:
    """What the network's norm layers of its own classes do with frames (B, ch, h, w); those that do not run are left
    out. Nothing is changed."""
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
        if is_norm(module):  # A class made from torch's has that one's layout, if no other is found.
            layout = layout if layout == "channels-first" else None
        elif layout is None and _called_norm(module):
            others[type(module).__name__] += 1
        if layout is not None:
            layouts[name] = layout
    return CustomNorms(layouts, dict(others))


def _candidates(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules without parts, of classes that are not torch's, that hold something."""
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
    """Where the channels lie that `weight` scales and `bias` shifts, if that is all that these do to what the module
    has normalised."""
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
    except Exception:  # noqa: BLE001 - somebody else's code, asked for what it may not expect
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
