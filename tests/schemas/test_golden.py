"""What earlier versions wrote means today what it meant then. The files in `golden` have every field that their writer
knew, none at its default, but for `config.yaml` and `stream.json` (a stream as it lay in the store), which are just as
0.1.0 wrote them. They are never written anew: a format that cannot be read so any more needs a number of its
own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel

from schemas.bundle import Manifest
from schemas.command import Command
from schemas.config_file import effective_yaml, load_config
from schemas.prediction import Prediction
from schemas.state import Snapshot, StreamHeader, decode_header, read_snapshot
from schemas.state_tensors import decode_file, decode_state
from schemas.update import UpdateEvent, digest
from schemas.verdict import Verdict

GOLDEN = Path(__file__).parent / "golden"
TENSORS = {
    "affine": torch.tensor([-0.25, -0.125, 0.0, 0.125, 0.25, 0.375]),
    "memory": torch.tensor([[0.0, 0.25, 0.5], [0.75, 1.0, 1.25]], dtype=torch.float16),
    "age": torch.tensor(9.0),
}


def golden(name: str) -> bytes:
    return (GOLDEN / name).read_bytes().rstrip(b"\n")


def lost(was: Any, now: Any, place: str = "") -> list[str]:
    """Where `now` does not say what `was` says; it may say more."""
    if isinstance(was, dict) and isinstance(now, dict):
        return [one for key in was for one in lost(was[key], now.get(key, "nothing"), f"{place}.{key}")]
    return [] if was == now else [f"{place[1:]}: {was} is {now}"]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("header", StreamHeader),
        ("snapshot", Snapshot),
        ("event", UpdateEvent),
        ("prediction", Prediction),
        ("command", Command),
        ("manifest", Manifest),
        ("verdict", Verdict),
    ],
)
def test_every_field_has_its_name_and_its_value(name: str, model: type[BaseModel]) -> None:
    """Fields that nobody knows are passed over in most of them: one that was renamed would be lost without a word."""
    content = golden(f"{name}.json")
    assert lost(json.loads(content), json.loads(model.model_validate_json(content).model_dump_json())) == []


def test_a_stored_state_is_read_and_so_is_one_in_a_file() -> None:
    state = decode_state(golden("header.json"), golden("tensors.safetensors"), TENSORS, 1 << 20)
    carried = decode_file(golden("state.safetensors"), TENSORS, 1 << 20)
    assert state.header == carried.header == decode_header(golden("header.json"))
    assert read_snapshot(golden("snapshot.json")).header == state.header
    for name, tensor in TENSORS.items():
        assert torch.equal(state.tensors[name], tensor)
        assert torch.equal(carried.tensors[name], tensor)


def test_the_chain_is_one_of_the_bytes_that_were_published() -> None:
    assert digest(golden("event.json")) == "06499e5dee10347b39d94cda6a1a688481ccccaf0c619f68c876bcfa1e6c290f"


def test_a_bundle_keeps_its_hashes() -> None:
    """Of a new one, and of one from before the order and the layouts of norm layers were said."""
    manifest = Manifest.model_validate_json(golden("manifest.json"))
    assert manifest.content_hash == "282b6f8a7d077791"
    assert manifest.model_hash == "9ab0fbeddbf94c94"
    assert manifest.generator_hash == "d6ef445a3fc4b659"
    content = json.loads(golden("manifest.json"))
    del content["model"]["norm_order"], content["model"]["norm_layouts"]
    older = Manifest.model_validate(content)
    assert (older.content_hash, older.model_hash) == ("8edb4851c7e816f7", "a16fdca4e6339079")


def test_a_configuration_with_every_key_of_0_1_0_is_taken_as_it_is() -> None:
    path = GOLDEN / "config.yaml"
    assert lost(yaml.safe_load(path.read_bytes()), yaml.safe_load(effective_yaml(load_config(path)))) == []
