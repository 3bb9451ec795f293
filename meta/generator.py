"""The Meta Gradient Generator (MGG) and its gradient memory layer.

Source: Deng et al., "Learning to Generate Gradients for Test-Time Adaptation via Test-Time Training Layers",
AAAI 2025, arXiv 2412.16901. Every coordinate of the norm affine has its own fast weights; the slow (meta-learned)
weights are shared. Coordinates are the last dimension, so that the small matrix products become wide arithmetic over
S x P contiguous numbers.

For one stream the time goes into launching operations, not into arithmetic. Hence precomputed weights
(`MemoryWeights`), fused operations such as `addcmul`, and sums instead of `mean`, which takes twice as long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPSILON = 1e-6


@lru_cache
def _epsilon(device: torch.device) -> Tensor:
    """LAYER_NORM_EPSILON as a tensor: torch would convert the number at every call."""
    return torch.tensor(LAYER_NORM_EPSILON, device=device)


def _centred(x: Tensor) -> Tensor:
    """x minus its mean over dimension 1."""
    return torch.add(x, x.sum(1, keepdim=True), alpha=-1 / x.shape[1])


def _standardised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Layer normalisation of x over dimension 1, without affine; also the inverse standard deviations."""
    centred = _centred(x)
    squares = (centred * centred).sum(1, keepdim=True)
    inverse = torch.rsqrt(torch.add(_epsilon(x.device), squares, alpha=1 / x.shape[1]))
    return centred * inverse, inverse


def _linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """rows (S, h, P) times one (h, h) matrix per coordinate, weight (S, h, h, P), plus bias: (S, h, P)."""
    return (rows.unsqueeze(2) * weight).sum(1) + bias


def _column(parameter: Tensor) -> Tensor:
    """A vector (h,) as (1, h, 1)."""
    return parameter.view(1, -1, 1)


class MemoryWeights(NamedTuple):
    """The learned weights of a gradient memory in the form in which a step uses them.

    projections (3h + 1 + n, d): query, key, target v - k, learning rate, and n more rows that a caller needs. One
        product computes all of them, since most of its cost is reading the inputs
    scale, shift (1, h, 1): of the layer norm
    rate_bias, rate_scale (): of the inner learning rate
    """

    projections: Tensor
    scale: Tensor
    shift: Tensor
    rate_bias: Tensor
    rate_scale: Tensor


class RuleWeights(NamedTuple):
    """The learned weights of an `UpdateRule` likewise: `output` (1, 3, h) and `bias` (1, 3, 1) map the memory's output
    to gate, push and pull."""

    memory: MemoryWeights
    output: Tensor
    bias: Tensor


class GradientMemory(nn.Module):
    """A test-time-training layer (TTT-Linear, mini-batch 1, one head) over the gradients of each coordinate.

    `inputs` (d) and `hidden` (h) are the sizes of its input and output for each coordinate. The fast weights are
    weight (S, h, h, P) and bias (S, h, P).
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden, self.sizes = hidden, [hidden, hidden, hidden, 1]
        self.query = nn.Parameter(torch.randn(hidden, inputs) * 0.5 / inputs**0.5)
        self.key = nn.Parameter(torch.randn(hidden, inputs) * 0.5 / inputs**0.5)
        self.value = nn.Parameter(torch.randn(hidden, inputs) * 0.5 / inputs**0.5)
        self.initial_weight = nn.Parameter(torch.randn(hidden, hidden) * 0.02)
        self.initial_bias = nn.Parameter(torch.zeros(hidden))
        self.norm_scale = nn.Parameter(torch.ones(hidden))
        self.norm_shift = nn.Parameter(torch.zeros(hidden))
        self.rate_weight = nn.Parameter(torch.zeros(inputs))
        self.rate_bias = nn.Parameter(torch.zeros(()))
        self.token_scale = nn.Parameter(torch.zeros(()))

    def fresh(self, streams: int, coordinates: int) -> tuple[Tensor, Tensor]:
        """The initial fast weights, as expanded views: differentiable, and not to be written to."""
        weight = self.initial_weight[None, :, :, None].expand(streams, -1, -1, coordinates)
        return weight, self.initial_bias[None, :, None].expand(streams, -1, coordinates)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Memorise x (S, d, P), then read with it: output (S, h, P) and the new fast weights.

        One step of gradient descent on the inner loss l = 1/2 ||LN(k W + b) - (v - k)||^2, whose gradient D with
        respect to z = k W + b has a closed form: W <- W - eta k^T D, b <- b - eta D.
        """
        weights = self.weights()
        return self.step(weights, (weights.projections @ x).split(self.sizes, 1), weight, bias)

    def weights(self, *beside: Tensor) -> MemoryWeights:
        """The weights for `step`, with the projections (n, d) `beside` after its own, whose row counts are `sizes`."""
        return MemoryWeights(
            torch.cat([self.query, self.key, self.value - self.key, self.rate_weight.unsqueeze(0), *beside]),
            _column(self.norm_scale),
            _column(self.norm_shift),
            self.rate_bias,
            (1 + self.token_scale).clamp_min(0) / self.hidden,
        )

    def step(
        self, weights: MemoryWeights, projected: Sequence[Tensor], weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward`, from the projected inputs: query, key, target (S, h, P) and rate (S, 1, P)."""
        query, key, target, rate = projected
        _, scale, shift, rate_bias, rate_scale = weights
        z_hat, inverse = _standardised(_linear(key, weight, bias))
        pulled = scale * torch.addcmul(shift - target, scale, z_hat)
        along = (pulled * z_hat).sum(1, keepdim=True)
        slope = inverse * torch.addcmul(_centred(pulled), z_hat, along, value=-1 / self.hidden)
        rate = torch.sigmoid(rate + rate_bias) * rate_scale
        weight = torch.addcmul(weight, (rate * key).unsqueeze(2), slope.unsqueeze(1), value=-1)
        bias = torch.addcmul(bias, rate, slope, value=-1)
        read, _ = _standardised(_linear(query, weight, bias))
        return torch.addcmul(query + shift, scale, read), weight, bias


class MetaGradientGenerator(nn.Module):
    """The paper's generator: gradient features in, one bounded update direction per coordinate out."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.memory = GradientMemory(inputs, hidden)
        self.post_scale = nn.Parameter(torch.ones(hidden))
        self.post_shift = nn.Parameter(torch.zeros(hidden))
        self.output = nn.Parameter(torch.randn(1, hidden) * 0.5 / hidden**0.5)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps x (S, d, P) and fast weights to the update direction (S, P), in (-1, 1), and new fast weights."""
        out, weight, bias = self.memory(x, weight, bias)
        post, _ = _standardised(out)
        direction = (self.output * self.post_scale) @ post + _column(self.output @ self.post_shift)
        return torch.tanh(direction.squeeze(1)), weight, bias


class UpdateRule(nn.Module):
    """Our generator: it decides for each coordinate what to do with its gradient.

    Its three outputs are sums of a read-out of the gradient memory and a learned linear map of the inputs: `gate` in
    (1/e^2, e^2) multiplies the raw gradient, `push` in (-1, 1) is added to the step, and `pull` in (0, 1) is the
    relaxation rate towards the anchor. At initialisation the rule is nearly gradient descent with a weak pull of 1%, so
    that training starts from a method that works. The raw gradient is kept because normalised inputs, as the paper has
    them, do not tell a large gradient from a small one.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.memory = GradientMemory(inputs, hidden)
        self.post_scale = nn.Parameter(torch.ones(hidden))
        self.post_shift = nn.Parameter(torch.zeros(hidden))
        self.output = nn.Parameter(torch.randn(3, hidden) * 0.01)
        self.shortcut = nn.Parameter(torch.zeros(3, inputs))
        self.sizes = [*self.memory.sizes, len(self.shortcut)]
        self.bias = nn.Parameter(torch.zeros(3))
        self.pull_logit = nn.Parameter(torch.tensor(math.log(0.01 / 0.99)))

    def weights(self) -> RuleWeights:
        """The weights for `forward`, which a site computes only once."""
        output, bias = self.output * self.post_scale, self.output @ self.post_shift + self.bias
        return RuleWeights(self.memory.weights(self.shortcut), output.unsqueeze(0), _column(bias))

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor, weights: RuleWeights | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Maps x (S, d, P) and fast weights to gate, push and pull (S, P) and new fast weights."""
        streams, known = len(x), self.weights() if weights is None else weights
        projections = known.memory.projections.expand(streams, -1, -1)
        *projected, shortcut = torch.bmm(projections, x).split(self.sizes, 1)
        out, weight, bias = self.memory.step(known.memory, projected, weight, bias)
        post, _ = _standardised(out)
        read = torch.baddbmm(shortcut + known.bias, known.output.expand(streams, -1, -1), post)
        gate, push, pull = torch.tanh(read).unbind(1)
        gate = torch.exp(gate + gate)
        pull = torch.sigmoid(torch.add(self.pull_logit, pull, alpha=3))
        return gate, push, pull, weight, bias


class Anchor(nn.Module):
    """Predicts where a stream's norm affine should rest, from the gaps between its feature statistics and the source's.

    A low-rank map with tanh from the gaps of all features (S, 2F) to offsets from the source affine (S, P); it is 0 at
    no gap. It is specific to one source model, since it sees all channels together. It responds within a few frames;
    the update rule then continues from there, coordinate by coordinate.
    """

    def __init__(self, features: int, coordinates: int, rank: int) -> None:
        super().__init__()
        self.reduce = nn.Parameter(torch.randn(rank, 2 * features) / (2 * features) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(rank))
        self.expand = nn.Parameter(torch.zeros(coordinates, rank))

    def forward(self, gaps: Tensor) -> Tensor:
        """Maps gaps (S, 2F) to offsets (S, P)."""
        reduced = torch.tanh(F.linear(gaps, self.reduce, self.bias)) - torch.tanh(self.bias)
        return F.linear(reduced, self.expand)
