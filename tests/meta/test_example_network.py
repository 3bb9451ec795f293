"""The network of examples/, whose weights nobody has to have for this."""

import importlib.util
from pathlib import Path

import torch
from torch import nn

from meta.create.network import adaptable

PATH = Path(__file__).parents[2] / "examples" / "efficientnet_lite0.py"


def build(classes: int) -> nn.Module:
    spec = importlib.util.spec_from_file_location("efficientnet_lite0", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: nn.Module = module.build(classes)
    return network


def test_it_is_the_network_that_the_weights_are_of() -> None:
    network = build(1_000)
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_652_008
    names = network.state_dict()
    assert len(names) == 296
    assert names["_blocks.15._depthwise_conv.weight"].shape == (1_152, 1, 3, 3)
    with torch.no_grad():
        assert network.eval()._blocks(torch.zeros(1, 32, 32, 32)).shape == (1, 320, 2, 2)


def test_it_can_be_adapted() -> None:
    torch.manual_seed(0)
    said: list[str] = []
    model = adaptable(build(10), torch.randn(3, 3, 64, 64), 10, said.append)
    assert model.coordinates == 42_016
    assert "49 BatchNorm2d" in said[0]
