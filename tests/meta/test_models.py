import pytest
import torch
from torch import nn

from meta.models import ARCHITECTURES, build_network
from meta.norms import AdaptableModel, norm_layers, run_order
from schemas.errors import BundleError


@pytest.mark.parametrize(("side", "channels"), [(28, 1), (32, 3)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_takes_both_kinds_of_frames_and_adapts(architecture: str, side: int, channels: int) -> None:
    arguments = {"channels": channels} | ({"side": side} if "vit" in architecture else {})
    model = AdaptableModel(build_network(architecture, arguments).to(memory_format=torch.channels_last))
    frames = torch.randn(3, channels, side, side).contiguous(memory_format=torch.channels_last)
    rows = model.source_affine.expand(3, -1).clone().requires_grad_()
    logits, features = model.forward_with_features(frames, rows)
    assert logits.shape == (3, 10)
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), [rows])
    # Every layer is reached. Shifts of a constant may cancel, scales do not.
    assert all(gradient[:, place.scale : place.shift].abs().sum() > 0 for place in model.places)
    assert features.shape[1] == sum(layer.scale.numel() for layer in model.layers)
    torch.testing.assert_close(logits[:1], model(frames[:1], rows[:1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_are_named_in_the_order_in_which_they_run(architecture: str) -> None:
    """What trains and measures them relies on it."""
    network = build_network(architecture, {}).eval()
    assert run_order(network, torch.randn(2, 1, 28, 28)) == list(norm_layers(network))


def test_which_norm_layers_they_have() -> None:
    kinds = {
        name: {type(m).__name__ for m in build_network(name, {}).modules() if "Norm" in type(m).__name__}
        for name in ARCHITECTURES
    }
    assert kinds == {
        "groupnorm-cnn": {"GroupNorm"},
        "batchnorm-cnn": {"BatchNorm2d"},
        "layernorm-vit": {"LayerNorm"},
    }
    assert AdaptableModel(build_network("batchnorm-cnn", {})).batch_channels > 0
    assert AdaptableModel(build_network("layernorm-vit", {})).batch_channels == 0


def test_unknown_architectures_and_arguments() -> None:
    with pytest.raises(BundleError, match="built in: batchnorm-cnn, groupnorm-cnn, layernorm-vit"):
        build_network("os:system", {})
    with pytest.raises(BundleError, match="does not take"):
        build_network("batchnorm-cnn", {"group": 4})
    assert isinstance(build_network("batchnorm-cnn", {"widths": [8, 16]}), nn.Module)
