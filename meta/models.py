"""Source model architectures that a bundle may name.

A bundle names its architecture; it never carries code. Names outside of this table need `bundle.factories` in the
worker's own config, so that bytes from outside cannot choose what is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from schemas.errors import BundleError


def groupnorm_cnn(
    classes: int = 10, channels: int = 1, widths: tuple[int, ...] = (16, 32, 64), group: int = 8
) -> nn.Module:
    """A plain convolutional net: per width two 3x3 convolutions with GroupNorm and ReLU, halving in between.

    Frames (B, channels, h, w) to logits (B, classes). `group` is the number of channels a group normalises over.
    """
    layers: list[nn.Module] = []
    before = channels
    for stage, width in enumerate(widths):
        for stride in (1 if stage == 0 else 2, 1):
            layers += [
                nn.Conv2d(before, width, 3, padding=1, stride=stride, bias=False),
                nn.GroupNorm(max(1, width // group), width),
                nn.ReLU(inplace=True),
            ]
            before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"groupnorm-cnn": groupnorm_cnn}


def build_network(architecture: str, arguments: dict[str, Any], factories: Iterable[str] = ()) -> nn.Module:
    """The untrained network of a bundle. `factories` are the `module:function` names that the config trusts."""
    if architecture in ARCHITECTURES:
        factory = ARCHITECTURES[architecture]
    elif architecture in set(factories):
        module, _, function = architecture.partition(":")
        factory = getattr(importlib.import_module(module), function)
    else:
        known = ", ".join(sorted(ARCHITECTURES))
        raise BundleError(
            f"the bundle asks for architecture {architecture!r}; built in: {known}. "
            "If you trust it, list it under bundle.factories in the worker's config as 'module:function'"
        )
    try:
        network = factory(**arguments)
    except TypeError as error:
        raise BundleError(f"architecture {architecture!r} does not take the bundle's arguments: {error}") from error
    if not isinstance(network, nn.Module):
        raise BundleError(f"architecture {architecture!r} returned {type(network).__name__}, not a torch module")
    return network
