import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from meta.models import groupnorm_cnn
from meta.moments import NormMoments
from meta.norms import AdaptableModel, run_order
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


class Encoded(nn.Module):
    """Tokens through torch's own encoder, which in eval mode prefers a shortcut past its norm layers."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 7, stride=7)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


def convnet(norm: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), norm, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


class Divided(nn.Module):
    """Normalises one half of the channels, as networks that shuffle them do: a part of a larger tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, changed = self.first(x).chunk(2, 1)
        return self.head(torch.cat([kept, self.norm(changed)], 1).relu().mean((2, 3)))


class Backwards(nn.Module):
    """Runs the children of a Sequential in turn, by the same names, but declares the last one first."""

    def __init__(self, network: nn.Sequential) -> None:
        super().__init__()
        for name, child in reversed(list(network.named_children())):
            self.add_module(name, child)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in reversed(list(self.children())):
            x = child(x)
        return x


NETWORKS = {
    "half of the channels": Divided,
    "group": lambda: convnet(nn.GroupNorm(2, 8)),
    "batch": lambda: convnet(nn.BatchNorm2d(8)),
    "instance": lambda: convnet(nn.InstanceNorm2d(8, affine=True)),
    "layer over chw": lambda: convnet(nn.LayerNorm([8, 26, 26])),
    "layer": lambda: Attention(nn.LayerNorm),
    "rms": lambda: Attention(nn.RMSNorm),
    "encoder": lambda: Encoded(norm_first=False),
    "encoder, norm first": lambda: Encoded(norm_first=True),
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
        for place in model.places:
            norm = alone.get_submodule(place.layer)
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


def test_layers_lie_in_the_order_in_which_they_run() -> None:
    """However they are declared: the same affine means the same, and the first layer is that which sees the frame."""
    torch.manual_seed(3)
    frames, network = torch.randn(4, 1, 28, 28), groupnorm_cnn(classes=3, widths=(8, 16), group=4)
    backwards = Backwards(copy.deepcopy(network))
    order = run_order(backwards, frames)
    assert order == ["1", "4", "7", "10"]
    expected, model = AdaptableModel(network), AdaptableModel(backwards, order)
    assert (expected.order, model.order) == ([], order)
    rows = expected.source_affine + 0.3 * torch.randn(4, expected.coordinates)
    torch.testing.assert_close(model.forward_with_inputs(frames, rows), expected.forward_with_inputs(frames, rows))
    first = model.forward_with_inputs(frames, 1.3 * rows)[2]
    torch.testing.assert_close(first, model.forward_with_inputs(frames, rows)[2])


def test_without_an_order_layers_lie_as_the_network_names_them() -> None:
    """As in bundles that were made before there was one."""
    network = Backwards(groupnorm_cnn(classes=3, widths=(8, 16), group=4))
    assert [place.layer for place in AdaptableModel(network).places] == ["10", "7", "4", "1"]


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_order_is_seen_in_layers_with_a_shortcut(norm_first: bool) -> None:
    network = Encoded(norm_first).eval()
    layers = [f"encoder.layers.{number}.norm{place}" for number in (0, 1) for place in (1, 2)]
    assert run_order(network, torch.randn(2, 1, 28, 28)) == layers


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (["1", "7"], "'7' 1 times, the network has it 0 times"),
        (["1"], "'4' 0 times, the network has it 1 times"),
        (["4", "1", "4"], "'4' 2 times, the network has it 1 times"),
    ],
)
def test_the_order_of_another_network_is_refused(order: list[str], message: str) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.ReLU(), nn.GroupNorm(2, 4))
    with pytest.raises(BundleError, match=rf"order of norm layers has {message}; .* make the bundle anew"):
        AdaptableModel(network, order)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), "no normalisation layer"),
        (nn.Sequential(nn.GroupNorm(1, 4, affine=False)), "no normalisation layer"),
        (nn.GroupNorm(1, 4), "not a classifier"),
        (nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)), "keeps no running statistics"),
        (nn.Sequential(nn.BatchNorm2d(4, affine=False, track_running_stats=False)), "keeps no running statistics"),
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


def test_a_batch_norm_with_a_forward_of_its_own_runs_it() -> None:
    class Counting(nn.BatchNorm2d):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Counting.calls += 1
            return super().forward(x)

    network = convnet(Counting(8)).eval()
    frames = torch.randn(2, 1, 28, 28)
    expected = network(frames)
    model = AdaptableModel(network)
    before = Counting.calls
    torch.testing.assert_close(model(frames), expected)
    torch.testing.assert_close(model(frames, model.source_affine.expand(2, -1)), expected)
    assert Counting.calls == before + 2


def test_half_precision_weights_become_float32() -> None:
    network = NETWORKS["group"]().half()
    assert AdaptableModel(network)(torch.randn(2, 1, 28, 28)).dtype == torch.float32


def test_dropout_stays_off() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(1, 4), nn.Dropout(0.9), nn.Flatten()).train()
    model = AdaptableModel(network)
    frames = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(frames), model(frames))


def test_a_model_put_into_train_mode_stays_the_source_model() -> None:
    """As loops of training and Tent's own set-up do, and back."""
    _, model = batch_normalised()
    frames = torch.randn(8, 1, 10, 10)
    before = model(frames)
    assert model.train() is model
    model(torch.full_like(frames, -3.0))
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model.eval()(frames), before)


def batch_normalised() -> tuple[nn.Module, AdaptableModel]:
    torch.manual_seed(2)
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
    )
    network.append(nn.Sequential(nn.Linear(4 * 6 * 6, 5), nn.BatchNorm1d(5)))
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor) + 0.1
    network.eval()
    return network, AdaptableModel(copy.deepcopy(network))


def moments_of(model: AdaptableModel, stream: torch.Tensor, share: torch.Tensor) -> NormMoments:
    """Every stream of its own given moments."""
    streams = len(share)
    mean = model.source_mean + 0.1 * torch.arange(streams).unsqueeze(1)
    variance = model.source_variance * (1 + 0.1 * torch.arange(streams).unsqueeze(1))
    return NormMoments(stream, share, mean, variance)


def test_moments_of_the_source_alone_are_source_inference() -> None:
    network, model = batch_normalised()
    assert model.batch_channels == 15
    frames, stream = torch.randn(4, 1, 10, 10), torch.tensor([0, 0, 1, 1])
    given = [model.source_mean.expand(2, -1), model.source_variance.expand(2, -1)]
    moments = NormMoments(stream, torch.zeros(2), *given)
    torch.testing.assert_close(model(frames, None, moments), network(frames), rtol=1e-4, atol=1e-4)
    for used, source in zip(moments.mixed(), given, strict=True):
        torch.testing.assert_close(used, source)


def test_a_share_of_one_is_the_training_mode_of_batch_norm() -> None:
    network, model = batch_normalised()
    frames = torch.randn(7, 1, 10, 10)
    moments = moments_of(model, torch.zeros(7, dtype=torch.long), torch.ones(1))
    torch.testing.assert_close(model(frames, None, moments), network.train()(frames), rtol=1e-3, atol=1e-3)


def test_a_share_between_mixes_given_and_batch_moments() -> None:
    layer = nn.BatchNorm2d(3)
    model = AdaptableModel(nn.Sequential(layer))
    x = torch.randn(5, 3, 4, 4) * 2 + 1
    out = model(x, None, NormMoments(torch.zeros(5, dtype=torch.long), torch.tensor([0.3]), *given_of(model)))
    mean = 0.3 * x.mean((0, 2, 3))
    variance = 0.7 + 0.3 * x.var((0, 2, 3), correction=0)
    expected = (x - mean.view(1, 3, 1, 1)) / (variance + layer.eps).sqrt().view(1, 3, 1, 1)
    torch.testing.assert_close(out, expected)


def given_of(model: AdaptableModel) -> tuple[torch.Tensor, torch.Tensor]:
    return model.source_mean.expand(1, -1), model.source_variance.expand(1, -1)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 100))
def test_who_shares_the_pass_does_not_matter_to_batch_norm(sizes: list[int], seed: int) -> None:
    """Logits, moments and gradients of a stream are the same alone and in company, whatever the order of frames."""
    _, model = batch_normalised()
    random = torch.Generator().manual_seed(seed)
    frames = torch.randn(sum(sizes), 1, 10, 10, generator=random)
    stream = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    stream = stream[torch.randperm(len(stream), generator=random)]
    share = torch.rand(len(sizes), generator=random)
    rows = (model.source_affine + 0.2 * torch.randn(len(sizes), model.coordinates, generator=random))[stream]
    rows = rows.requires_grad_()
    together = moments_of(model, stream, share)
    logits = model(frames, rows, together)
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), [rows])
    assert logits.isfinite().all()
    for s, size in enumerate(sizes):
        mine = stream == s
        alone = NormMoments(
            torch.zeros(size, dtype=torch.long),
            share[s : s + 1],
            together.mean[s : s + 1],
            together.variance[s : s + 1],
        )
        own = rows[mine].detach().requires_grad_()
        expected = model(frames[mine], own, alone)
        torch.testing.assert_close(logits[mine], expected, rtol=1e-3, atol=1e-3)
        (own_gradient,) = torch.autograd.grad(expected.logsumexp(1).sum(), [own])
        torch.testing.assert_close(gradient[mine], own_gradient, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(together.mixed()[0][s : s + 1], alone.mixed()[0], rtol=1e-4, atol=1e-4)


def test_the_gradient_passes_through_the_batch_moments() -> None:
    """As in Tent: it is that of the network in training mode."""
    network, model = batch_normalised()
    frames = torch.randn(4, 1, 10, 10, requires_grad=True)
    moments = moments_of(model, torch.zeros(4, dtype=torch.long), torch.ones(1))
    (ours,) = torch.autograd.grad(model(frames, None, moments).logsumexp(1).sum(), [frames])
    (theirs,) = torch.autograd.grad(network.train()(frames).logsumexp(1).sum(), [frames])
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 4, 5)])
def test_the_gradient_of_stream_normalisation_is_that_of_its_definition(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    stream, share = torch.tensor([0, 2, 1, 0, 0, 2, 2]), torch.tensor([0.3, 1.0, 0.0], dtype=torch.float64)
    moments = NormMoments(stream, share, torch.randn(3, 3).double(), torch.rand(3, 3).double() + 0.5)
    assert torch.autograd.gradcheck(lambda x: moments.normalise(x, slice(0, 3), 1e-5), [x])
