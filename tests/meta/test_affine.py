"""The gradients that are written out, against differences and against autograd."""

import math
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from meta.affine import Affine, rectified_mean, scaled_in_place
from meta.norms import AdaptableModel
from meta.stream_norm import _group_normalised
from tests.meta.test_correction import random_correction

SHAPES = {  # x, scale and shift, positions
    "picture": ((3, 4, 5, 2), (3, 4, 1, 1), (2, 3)),
    "shared": ((3, 4, 5, 2), (1, 4, 1, 1), (2, 3)),
    "tokens": ((3, 5, 4), (3, 1, 4), (1,)),
    "flat": ((3, 4), (3, 4), ()),
    "whole picture": ((3, 2, 3, 4), (3, 2, 3, 4), (1, 2)),
}


def channels_of(name: str) -> int:
    shape, _, positions = SHAPES[name]
    return math.prod(size for dim, size in enumerate(shape) if dim and dim not in positions)


def doubles(shape: tuple[int, ...], layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()


def wanted(out: Tensor, pooled: Tensor | None, wants: str) -> tuple[Tensor, ...]:
    assert pooled is not None
    return {"out": (out,), "pooled": (pooled,), "both": (out, pooled)}[wants]


@pytest.mark.parametrize("wants", ["out", "pooled", "both"])
@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_gradient_of_the_affine(name: str, rectify: bool, wants: str) -> None:
    torch.manual_seed(0)
    shape, rows, positions = SHAPES[name]

    def made(x: Tensor, scale: Tensor, shift: Tensor | None) -> tuple[Tensor, ...]:
        return wanted(*Affine.apply(x, x.detach(), None, scale, shift, None, rectify, positions, True), wants)

    assert torch.autograd.gradcheck(made, (doubles(shape), doubles(rows), doubles(rows)))
    assert torch.autograd.gradcheck(lambda x, scale: made(x, scale, None), (doubles(shape), doubles(rows)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("wants", ["out", "pooled", "both"])
@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("name", ["picture", "shared"])
def test_gradient_through_group_normalisation(
    name: str, rectify: bool, wants: str, layout: torch.memory_format
) -> None:
    torch.manual_seed(1)
    shape, rows, positions = SHAPES[name]

    def made(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        x_hat, inverse = _group_normalised(x.detach(), 2, 1e-5)
        return wanted(*Affine.apply(x, x_hat, inverse, scale, shift, None, rectify, positions, True), wants)

    assert torch.autograd.gradcheck(made, (doubles(shape, layout), doubles(rows), doubles(rows)))


@pytest.mark.parametrize("wants", ["out", "pooled", "both"])
@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize(
    ("name", "norm"), [*((name, "none") for name in SHAPES), *product(["picture", "shared"], ["fixed", "groups"])]
)
def test_gradient_through_a_correction(name: str, norm: str, rectify: bool, wants: str) -> None:
    """It passes through the estimate, which depends on the moments of the normalised activations."""
    torch.manual_seed(5)
    shape, rows, positions = SHAPES[name]
    channels = channels_of(name)
    correct = partial(random_correction(channels).under(torch.rand(shape[0])).of, slice(0, channels))
    inverse = torch.rand(channels, dtype=torch.float64) + 0.5

    def made(x: Tensor, scale: Tensor, shift: Tensor | None) -> tuple[Tensor, ...]:
        x_hat, given = x.detach(), None
        if norm == "fixed":
            x_hat, given = x_hat * inverse.view(1, -1, *[1] * (len(shape) - 2)) + 0.3, inverse
        if norm == "groups":
            x_hat, given = _group_normalised(x_hat, 2, 1e-5)
        return wanted(*Affine.apply(x, x_hat, given, scale, shift, correct, rectify, positions, True), wants)

    assert torch.autograd.gradcheck(made, (doubles(shape), doubles(rows), doubles(rows)))
    assert torch.autograd.gradcheck(lambda x, scale: made(x, scale, None), (doubles(shape), doubles(rows)))


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_without_a_graph_the_output_is_the_same(name: str, rectify: bool) -> None:
    torch.manual_seed(5)
    shape, rows, positions = SHAPES[name]
    x, scale, shift = (doubles(size).detach() for size in (shape, rows, rows))
    channels = channels_of(name)
    for correct in (None, partial(random_correction(channels).under(torch.rand(shape[0])).of, slice(0, channels))):
        expected = Affine.apply(x, x, None, scale, shift, correct, rectify, positions, True)
        found = scaled_in_place(x.clone(), scale, shift, correct, rectify, positions, True)
        for part, known in zip(found, expected, strict=True):
            torch.testing.assert_close(part, known)


def test_layout_of_the_gradient_is_that_of_the_input() -> None:
    x = torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    x_hat, inverse = _group_normalised(x.detach(), 2, 1e-5)
    out, pooled = Affine.apply(
        x, x_hat, inverse, torch.ones(2, 4, 1, 1), torch.zeros(2, 4, 1, 1), None, True, (2, 3), True
    )
    (found,) = torch.autograd.grad(out.contiguous().square().sum() + pooled.sum(), x)
    assert found.stride() == x.stride()


def test_what_is_not_rectified_may_be_changed_in_place() -> None:
    x = torch.randn(2, 4, 3, 5)
    scale = torch.ones(2, 4, 1, 1, requires_grad=True)
    out, pooled = Affine.apply(x, x, None, scale, None, None, False, (2, 3), True)
    (found,) = torch.autograd.grad(out.mul_(0).sum() + pooled.sum(), scale)
    torch.testing.assert_close(found, rectified_mean(x, (2, 3)).view(2, 4, 1, 1))


class Skipping(nn.Module):
    """Takes what lies between norm and ReLU of a Sequential, too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        before = self.body[:2](x)
        return (self.body[2](before) + before).mean((2, 3))


def plain() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True)),
        *(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


@pytest.mark.parametrize(("network", "taken"), [(plain, [True, True]), (Skipping, [False])])
def test_a_rectifier_is_taken_where_the_answers_stay(network: type[nn.Module], taken: list[bool]) -> None:
    torch.manual_seed(2)
    original = network().eval()
    frames = torch.randn(3, 1, 9, 9)
    expected = original(frames).detach()
    model = AdaptableModel(original)
    rows = (model.source_affine + 0.3 * torch.randn(3, model.coordinates)).requires_grad_()

    def passed() -> tuple[Tensor, ...]:
        logits, features, first = model.forward_with_inputs(frames, rows)
        (gradient,) = torch.autograd.grad(logits.square().sum() + features.sum(), rows)
        return logits, features, first, gradient

    before = passed()
    model.fit_layout(frames)
    assert [layer.rectify for layer in model.layers] == taken
    for found, known in zip(passed(), before, strict=True):
        torch.testing.assert_close(found, known)
    torch.testing.assert_close(model(frames), expected)
    assert any(isinstance(module, nn.ReLU) for module in model.modules()) != any(taken)
