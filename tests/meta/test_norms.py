import copy

import pytest
import torch
from torch import nn

from meta.norms import AdaptableModel
from schemas.errors import BundleError


class Attention(nn.Module):
    """Tokens, as in a vision transformer: LayerNorm over the last dimension."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 7, stride=7)
        self.norm = norm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


def convnet(norm: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), norm, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


NETWORKS = {
    "group": lambda: convnet(nn.GroupNorm(2, 8)),
    "batch": lambda: convnet(nn.BatchNorm2d(8)),
    "instance": lambda: convnet(nn.InstanceNorm2d(8, affine=True)),
    "layer over chw": lambda: convnet(nn.LayerNorm([8, 26, 26])),
    "layer": lambda: Attention(nn.LayerNorm),
    "rms": lambda: Attention(nn.RMSNorm),
}


def scrambled(name: str) -> nn.Module:
    torch.manual_seed(1)
    network = NETWORKS[name]()
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor) + 0.1
    return network.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_source_predictions_are_those_of_the_original(name: str) -> None:
    network = scrambled(name)
    frames = torch.randn(5, 1, 28, 28)
    expected = network(frames).detach()
    model = AdaptableModel(copy.deepcopy(network))
    torch.testing.assert_close(model(frames), expected)
    rows = model.source_affine.expand(5, -1)
    torch.testing.assert_close(model(frames, rows), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_frame_gets_its_own_affine(name: str) -> None:
    network = scrambled(name)
    model = AdaptableModel(copy.deepcopy(network))
    frames = torch.randn(3, 1, 28, 28)
    rows = model.source_affine + 0.3 * torch.randn(3, model.coordinates)
    together = model(frames, rows)
    for i in range(3):
        alone = copy.deepcopy(network)
        norm = next(m for m in alone.modules() if getattr(m, "weight", None) is not None and "Norm" in type(m).__name__)
        place = model.places[0]
        norm.weight.data = rows[i, place.scale : place.shift].view_as(norm.weight).clone()
        if getattr(norm, "bias", None) is not None:
            norm.bias.data = rows[i, place.shift : place.end].view_as(norm.bias).clone()
        torch.testing.assert_close(together[i : i + 1], alone(frames[i : i + 1]))


def test_gradient_of_affine_in_channels_last_layout() -> None:
    """The layout and gradient pattern that crash torch's own affine group norm."""
    model = AdaptableModel(scrambled("group").to(memory_format=torch.channels_last))
    frames = torch.randn(4, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    rows = model.source_affine.expand(4, -1).clone().requires_grad_()
    model(frames, rows).logsumexp(1).sum().backward()
    assert rows.grad is not None
    assert rows.grad.abs().sum() > 0


def test_a_shared_layer_is_swapped_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.GroupNorm(1, 4)
            self.second = self.first
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(self.conv(x)).relu()).mean((2, 3))

    network = Shared()
    expected = network(torch.ones(2, 1, 8, 8)).detach()
    model = AdaptableModel(network)
    assert model.coordinates == 8
    torch.testing.assert_close(model(torch.ones(2, 1, 8, 8)), expected)


def test_layers_without_affine_stay() -> None:
    network = nn.Sequential(nn.GroupNorm(1, 1, affine=False), nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4))
    model = AdaptableModel(network)
    assert [place.layer for place in model.places] == ["2"]
    assert isinstance(model.network[0], nn.GroupNorm)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), "no normalisation layer"),
        (nn.Sequential(nn.GroupNorm(1, 4, affine=False)), "no normalisation layer"),
        (nn.GroupNorm(1, 4), "not a classifier"),
    ],
)
def test_models_with_nothing_to_adapt(network: nn.Module, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        AdaptableModel(network)


def test_broken_weights_are_refused() -> None:
    network = scrambled("group")
    network[0].weight.data[0] = torch.nan
    with pytest.raises(BundleError, match=r"'0.weight' of the source model is not finite"):
        AdaptableModel(network)


def test_half_precision_weights_become_float32() -> None:
    network = NETWORKS["group"]().half()
    assert AdaptableModel(network)(torch.randn(2, 1, 28, 28)).dtype == torch.float32


def test_dropout_stays_off() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(1, 4), nn.Dropout(0.9), nn.Flatten()).train()
    model = AdaptableModel(network)
    frames = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(frames), model(frames))
