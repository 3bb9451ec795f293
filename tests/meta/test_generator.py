"""The generator against an independent implementation: loops, autograd, float64."""

import pytest
import torch

from meta.generator import LAYER_NORM_EPSILON, GradientMemory, MetaGradientGenerator


def loop_step(memory: GradientMemory, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor):
    """One coordinate: x (d,), W (h, h), b (h,). Inner gradient by autograd instead of closed form."""
    h = memory.hidden

    def layer_norm(v: torch.Tensor) -> torch.Tensor:
        normal = (v - v.mean()) / torch.sqrt(((v - v.mean()) ** 2).mean() + LAYER_NORM_EPSILON)
        return memory.norm_scale * normal + memory.norm_shift

    q, k, v = memory.query @ x, memory.key @ x, memory.value @ x
    w, b = weight.clone().detach().requires_grad_(), bias.clone().detach().requires_grad_()
    inner = 0.5 * ((layer_norm(k @ w + b) - (v - k)) ** 2).sum()
    slope_w, slope_b = torch.autograd.grad(inner, [w, b])
    eta = torch.sigmoid(memory.rate_weight @ x + memory.rate_bias) / h * torch.clamp(1 + memory.token_scale, min=0)
    weight, bias = weight - eta * slope_w, bias - eta * slope_b
    return q + layer_norm(q @ weight + bias), weight, bias


def scrambled(inputs: int, hidden: int) -> MetaGradientGenerator:
    torch.manual_seed(3)
    generator = MetaGradientGenerator(inputs, hidden).double()
    for parameter in generator.parameters():
        parameter.data = torch.randn_like(parameter) * 0.5
    return generator


@torch.no_grad()
def test_hundred_steps_match_the_loop() -> None:
    generator = scrambled(2, 8)
    memory = generator.memory
    streams, coordinates = 2, 3
    random = torch.Generator().manual_seed(0)
    weight, bias = memory.fresh(streams, coordinates)
    loops = {(s, p): (weight[s, :, :, p].clone(), bias[s, :, p].clone()) for s in range(2) for p in range(3)}
    for _ in range(100):
        x = torch.randn(streams, 2, coordinates, generator=random, dtype=torch.float64)
        direction, weight, bias = generator(x, weight, bias)
        for (s, p), (w, b) in loops.items():
            with torch.enable_grad():
                out, w, b = loop_step(memory, x[s, :, p], w, b)
            loops[s, p] = w.detach(), b.detach()
            normal = (out - out.mean()) / torch.sqrt(((out - out.mean()) ** 2).mean() + LAYER_NORM_EPSILON)
            expected = torch.tanh(generator.output @ (generator.post_scale * normal + generator.post_shift))
            torch.testing.assert_close(direction[s, p], expected[0], rtol=0, atol=1e-10)
            torch.testing.assert_close(weight[s, :, :, p], loops[s, p][0], rtol=0, atol=1e-10)


def test_the_paper_generator_has_its_164_parameters() -> None:
    generator = MetaGradientGenerator(inputs=2, hidden=8)
    assert sum(p.numel() for p in generator.parameters()) == 164


def test_gradients_reach_every_learned_parameter() -> None:
    generator = scrambled(4, 4)
    weight, bias = generator.memory.fresh(2, 5)
    total = torch.zeros((), dtype=torch.float64)
    for step in range(3):
        x = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        direction, weight, bias = generator(x, weight, bias)
        total = total + (direction**2).sum()
    total.backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_updates_stay_bounded_and_finite(scale: float) -> None:
    torch.manual_seed(0)
    generator = MetaGradientGenerator(2, 8)
    weight, bias = generator.memory.fresh(1, 7)
    x = torch.full((1, 2, 7), scale)
    with torch.no_grad():
        direction, _, _ = generator(x.clamp(-10, 10), weight, bias)
    assert torch.isfinite(direction).all()
    assert direction.abs().max() <= 1
