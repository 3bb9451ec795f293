"""The architectures of source models that a bundle can name.

A bundle names its architecture and contains no code. Names that are not built in must be listed under
`bundle.factories` in the worker's configuration, so that a bundle cannot choose what is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta.imports import imported
from schemas.errors import BundleError

MOST_STAGES = 200  # of a built-in network: a manifest could name 100,000, which would take minutes to build


def groupnorm_cnn(
    classes: int = 10, channels: int = 1, widths: tuple[int, ...] = (16, 32, 64), group: int = 8
) -> nn.Module:
    """A plain convolutional net: per width two 3x3 convolutions with GroupNorm and ReLU, halving in between.

    Frames (B, channels, h, w) to logits (B, classes). `group` is the number of channels a group normalises over.
    """
    _require_few(len(widths))
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


class _Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm beside a shortcut (He et al., CVPR 2016)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, width, 3, padding=1, stride=stride, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(before, width, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(out)) + self.shortcut(x))


def batchnorm_cnn(classes: int = 10, channels: int = 1, widths: tuple[int, ...] = (16, 32, 64)) -> nn.Module:
    """A small residual net with BatchNorm: a 3x3 stem, then one residual block per width, each halving.

    Frames (B, channels, h, w) to logits (B, classes).
    """
    _require_few(len(widths))
    stem = widths[0]
    layers: list[nn.Module] = [
        nn.Conv2d(channels, stem, 3, padding=1, bias=False),
        nn.BatchNorm2d(stem),
        nn.ReLU(inplace=True),
    ]
    layers += [_Residual(before, width, 2) for before, width in zip((stem, *widths), widths, strict=False)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projection = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        split = self.projection(tokens).view(batch, count, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.output(mixed.transpose(1, 2).reshape(batch, count, width))


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.attention_norm(tokens))
        return tokens + self.feed(self.feed_norm(tokens))


class _SmallViT(nn.Module):
    def __init__(self, classes: int, channels: int, side: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        # Two strided convolutions instead of flat patches: small nets learn from far fewer images that way
        # (Xiao et al., NeurIPS 2021). They have no norm layer, so LayerNorm is all that adapts.
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width // 2, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
        )
        self.place = nn.Parameter(0.02 * torch.randn(1, (side // 4) ** 2, width))
        self.blocks = nn.Sequential(*[_TransformerBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, frames: Tensor) -> Tensor:
        tokens = self.stem(frames).flatten(2).transpose(1, 2).contiguous()
        return self.head(self.norm(self.blocks(tokens + self.place)).mean(1))


def layernorm_vit(
    classes: int = 10, channels: int = 1, side: int = 28, width: int = 48, depth: int = 3, heads: int = 2
) -> nn.Module:
    """A small vision transformer (Dosovitskiy et al., ICLR 2021) with LayerNorm and mean pooling.

    Frames (B, channels, side, side) to logits (B, classes); side must be a multiple of 4.
    """
    _require_few(depth)
    return _SmallViT(classes, channels, side, width, depth, heads)


def _require_few(stages: int) -> None:
    if stages > MOST_STAGES:
        raise ValueError(f"{stages} stages are more than {MOST_STAGES}")


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "groupnorm-cnn": groupnorm_cnn,
    "batchnorm-cnn": batchnorm_cnn,
    "layernorm-vit": layernorm_vit,
}
COLLECTIONS = {"timm": "timm:create_model", "torchvision": "torchvision.models:get_model"}
FOLDER = "name the folder it lies in (bundle.code in a worker's config, --code of 'driftkeel bundle create')"


def _factory(architecture: str) -> Callable[..., nn.Module]:
    """The factory named by `module:function`, `timm:NAME` or `torchvision:NAME`. Raises BundleError."""
    collection, _, name = architecture.partition(":")
    try:
        if collection in COLLECTIONS:
            return partial(imported(COLLECTIONS[collection], FOLDER), name)
        found: Callable[..., nn.Module] = imported(architecture, FOLDER)
        return found
    except ImportError as error:
        known = "" if ":" in architecture else f"; built in: {', '.join(sorted(ARCHITECTURES))}"
        raise BundleError(f"architecture {architecture!r}: {error}{known}") from error


def build_network(architecture: str, arguments: dict[str, Any], factories: Iterable[str] = ()) -> nn.Module:
    """The untrained network of a bundle. `factories`: the names that the configuration trusts. Raises BundleError."""
    if architecture in ARCHITECTURES:
        factory = ARCHITECTURES[architecture]
    elif architecture in set(factories):
        factory = _factory(architecture)
    else:
        known = ", ".join(sorted(ARCHITECTURES))
        raise BundleError(
            f"the bundle asks for architecture {architecture!r}; built in: {known}. "
            "If you trust it, list it under bundle.factories in the worker's config as 'module:function'; "
            "'driftkeel bundle show' takes it as --factory, the plan of 'driftkeel benchmark accuracy' under factories"
        )
    try:
        network = factory(**arguments)
    except Exception as error:  # Foreign code can raise anything; the message says what was asked of it.
        raise BundleError(
            f"architecture {architecture!r} does not take the bundle's arguments {str(arguments)[:300]}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(network, nn.Module):
        raise BundleError(f"architecture {architecture!r} returned {type(network).__name__}, not a torch module")
    return network
