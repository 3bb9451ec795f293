"""The Meta Gradient Generator (MGG) and its gradient memory layer.

Source: Deng et al., "Learning to Generate Gradients for Test-Time Adaptation via Test-Time Training Layers",
AAAI 2025, arXiv 2412.16901. Every coordinate of the norm affine has its own fast weights; all share the learned
ones. Coordinates lie in the last dimension, so that the small matrix products become wide arithmetic over S x P
contiguous numbers.
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
    """As a tensor, which torch else makes of the number each time. For a stream of its own the time goes into starting
    operations, not into numbers; hence also the sums below, as `mean` takes twice as long."""
    return torch.tensor(LAYER_NORM_EPSILON, device=device)


def _centred(x: Tensor) -> Tensor:
    """x less its mean over dimension 1."""
    return torch.add(x, x.sum(1, keepdim=True), alpha=-1 / x.shape[1])


def _standardised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Zero mean and unit variance over dimension 1; also 1 / deviation."""
    centred = _centred(x)
    squares = (centred * centred).sum(1, keepdim=True)
    inverse = torch.rsqrt(torch.add(_epsilon(x.device), squares, alpha=1 / x.shape[1]))
    return centred * inverse, inverse


def _linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """rows (S, h, P) times one (h, h) matrix per coordinate, weight (S, h, h, P), plus bias: (S, h, P)."""
    return (rows.unsqueeze(2) * weight).sum(1) + bias


def _column(parameter: Tensor) -> Tensor:
    return parameter.view(1, -1, 1)


class MemoryWeights(NamedTuple):
    """What a step of the gradient memory needs of its learned numbers: `projections` (r, d) make query, key, target
    and rate of the inputs, and whatever else is wanted of them, in one product, as most of its cost is to go over the
    inputs; `scale` and `shift` (1, h, 1)."""

    projections: Tensor
    scale: Tensor
    shift: Tensor
    rate_bias: Tensor
    rate_scale: Tensor


class RuleWeights(NamedTuple):
    """The same of an update rule: `output` (1, 3, h) and `bias` (1, 3, 1) of what is read from the memory."""

    memory: MemoryWeights
    output: Tensor
    bias: Tensor


class GradientMemory(nn.Module):
    """A test-time-training layer (TTT-Linear, mini-batch 1, one head) over the gradients of each coordinate.

    `inputs` numbers a coordinate in, `hidden` numbers out. Fast weights: weight (S, h, h, P) and bias (S, h, P).
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
        """Fast weights of streams that have seen nothing yet."""
        weight = self.initial_weight[None, :, :, None].expand(streams, -1, -1, coordinates)
        return weight, self.initial_bias[None, :, None].expand(streams, -1, coordinates)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Memorise x (S, d, P), then read with it: output (S, h, P) and the new fast weights.

        The inner loss is l = 1/2 ||LN(k W + b) - (v - k)||^2; its gradient D with respect to z = k W + b is in
        closed form, and W <- W - eta k^T D, b <- b - eta D.
        """
        weights = self.weights()
        return self.step(weights, (weights.projections @ x).split(self.sizes, 1), weight, bias)

    def weights(self, *beside: Tensor) -> MemoryWeights:
        """With projections (n, d) that are wanted `beside` its own. The numbers of rows of these are `sizes`."""
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
        """`forward`, from what the projections make of x, (S, h, P) three times and (S, 1, P)."""
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
        """x (S, d, P) and fast weights to u (S, P) in (-1, 1) and new fast weights."""
        out, weight, bias = self.memory(x, weight, bias)
        post, _ = _standardised(out)
        direction = (self.output * self.post_scale) @ post + _column(self.output @ self.post_shift)
        return torch.tanh(direction.squeeze(1)), weight, bias


class UpdateRule(nn.Module):
    """Our generator: from gradient features to what each coordinate does with its gradient.

    Three numbers a coordinate, read from the gradient memory and, by a learned linear path, from the inputs: a `gate`
    in (1/e^2, e^2) that multiplies the raw gradient, a `push` in (-1, 1) beside it, and a `pull` in (0, 1) back to the
    anchor. Before training it is plain gradient descent with a weak pull, so that training only has to find what is
    better. Normalised inputs alone, as in the paper, cannot tell a large gradient from a small one.
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
        """What `forward` needs of the learned numbers, which a site works out but once."""
        output, bias = self.output * self.post_scale, self.output @ self.post_shift + self.bias
        return RuleWeights(self.memory.weights(self.shortcut), output.unsqueeze(0), _column(bias))

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor, weights: RuleWeights | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x (S, d, P) and fast weights to gate, push and pull (S, P) and new fast weights."""
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
    """Where the norm affine of a stream should rest, from how its feature statistics differ from the source's.

    A low-rank map from the gaps of all features (S, 2F) to offsets from the source affine (S, P), zero where there is
    no gap. It belongs to one source model, knows all of its channels, and answers after a few frames; the update rule
    then works from there, coordinate by coordinate.
    """

    def __init__(self, features: int, coordinates: int, rank: int) -> None:
        super().__init__()
        self.reduce = nn.Parameter(torch.randn(rank, 2 * features) / (2 * features) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(rank))
        self.expand = nn.Parameter(torch.zeros(coordinates, rank))

    def forward(self, gaps: Tensor) -> Tensor:
        """(S, 2F) to (S, P)."""
        reduced = torch.tanh(F.linear(gaps, self.reduce, self.bias)) - torch.tanh(self.bias)
        return F.linear(reduced, self.expand)
