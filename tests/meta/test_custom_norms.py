"""Norm layers of a network's own classes: which adapt, that they do as their own code would, and who is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meta.bundle import load_bundle
from meta.create.network import adaptable
from meta.create.run import create_bundle
from meta.create.subject import CreateSettings
from meta.custom_norms import find_custom_norms
from meta.norms import AdaptableModel
from schemas.config import Frames
from schemas.errors import BundleError
from tests.foreign import SIDE, OwnNormNet, own_norm_net, trained, write_folder
from worker.decode.image import decode_image

LAYOUTS = {"first_norm": "channels-first", "second_norm": "channels-first", "token_norm": "channels-last"}
PLACES = ["first_norm", "second_norm", "token_norm", "last_norm"]


def scrambled() -> OwnNormNet:
    torch.manual_seed(0)
    network = OwnNormNet().eval()
    for name, tensor in network.state_dict().items():
        if "norm" in name:
            tensor += 0.5 * torch.rand_like(tensor)
    return network


def test_each_kind_is_told_by_what_it_does() -> None:
    found = find_custom_norms(scrambled(), torch.randn(6, 1, SIDE, SIDE))
    assert found.layouts == LAYOUTS
    assert found.others == {"FrozenBatchNorm2d": 1}


def test_every_frame_has_its_own_scales_and_shifts() -> None:
    frames, said = torch.randn(6, 1, SIDE, SIDE), []
    model = adaptable(scrambled(), frames, 3, said.append)
    assert [place.layer for place in model.places] == PLACES
    assert any(line.startswith("network: 1 FrozenBatchNorm2d will not adapt") for line in said)
    rows = (model.source_affine + 0.3 * torch.randn(6, model.coordinates)).requires_grad_()
    logits = model(frames, rows)
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), [rows])
    for frame in range(6):
        network = scrambled()
        held = [
            getattr(network.get_submodule(place.layer), name)
            for place in model.places
            for name in ("weight", "bias")[: 1 + (place.end > place.shift)]
        ]
        for tensor, row in zip(held, rows[frame].detach().split([t.numel() for t in held]), strict=True):
            tensor.data.copy_(row)
        expected = network(frames[frame : frame + 1])
        torch.testing.assert_close(logits[frame : frame + 1], expected, rtol=1e-4, atol=1e-4)
        wanted = torch.cat(torch.autograd.grad(expected.logsumexp(1).sum(), held))
        torch.testing.assert_close(gradient[frame], wanted, rtol=1e-3, atol=1e-4)


def test_a_bundle_adapts_them_and_one_of_before_does_as_it_did(tmp_path: Path) -> None:
    torch.save(trained(own_norm_net).state_dict(), tmp_path / "net.pt")
    given: dict[str, Any] = {"architecture": "tests.foreign:own_norm_net", "weights": tmp_path / "net.pt"}
    given |= {"data": write_folder(tmp_path / "images"), "mean": [0.3], "std": [0.2]}
    given |= {"steps": 1, "calibration_windows": 2, "frames": 48, "repeats": 1}
    manifest = create_bundle(
        CreateSettings.model_validate(given),
        *("mine", tmp_path / "bundle", "test", lambda content, preprocess: decode_image(content, Frames(), preprocess)),
        say=lambda text: None,
    )
    assert manifest.model.norm_layouts == LAYOUTS
    model = load_bundle(tmp_path / "bundle", ["tests.foreign:own_norm_net"]).model
    assert [place.layer for place in model.places] == PLACES
    assert [place.layer for place in AdaptableModel(nn.Sequential(nn.LayerNorm(12), own_norm())).places] == ["0"]


def own_norm() -> nn.Module:
    return scrambled().first_norm


def test_a_network_that_has_lost_such_a_layer_is_refused() -> None:
    with pytest.raises(BundleError, match="adapts norm layer 'gone', which the network does not have"):
        AdaptableModel(scrambled(), layouts={"gone": "channels-last"})


class Scale(nn.Module):
    """Has a weight for each channel, and normalises nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[:, None, None] * x


class ResponseNorm(Scale):
    """Does more with its weight than to scale what it has normalised."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[:, None, None] * x * x.square().mean((2, 3), keepdim=True).sqrt()


@pytest.mark.parametrize(("layer", "others"), [(Scale(), {}), (ResponseNorm(), {"ResponseNorm": 1})])
def test_what_does_less_or_more_than_normalise_is_left(layer: nn.Module, others: dict[str, int]) -> None:
    network = nn.Sequential(nn.Conv2d(1, 8, 3), layer, nn.GroupNorm(2, 8)).eval()
    found = find_custom_norms(network, torch.randn(4, 1, SIDE, SIDE))
    assert (found.layouts, found.others) == ({}, others)


def test_one_that_runs_twice_stays_as_it_is() -> None:
    """It would have no place of its own; the network's other layers adapt as ever."""
    norm = own_norm()
    network = nn.Sequential(nn.Conv2d(1, 8, 3), norm, nn.ReLU(), norm, nn.GroupNorm(2, 8)).eval()
    found = find_custom_norms(network, torch.randn(4, 1, SIDE, SIDE))
    assert (found.layouts, found.others) == ({}, {"ChannelNorm": 1})
