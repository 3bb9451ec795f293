import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from meta.bundle import load_bundle, model_weights, portable_rule, write_bundle
from meta.bundle_folder import read_manifest, read_verdict, rewrite_manifest
from meta.correction import Correction
from meta.models import groupnorm_cnn
from schemas.errors import BundleError
from tests.conftest import SHIPPED_BUNDLE


@pytest.fixture
def copy_of(tiny_bundle_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle_path, tmp_path / "bundle"))


def edit(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_two_loads_predict_the_same(tiny_bundle_path: Path) -> None:
    frames = torch.randn(3, 1, 28, 28)
    first, second = load_bundle(tiny_bundle_path), load_bundle(tiny_bundle_path)
    assert first.hash == second.hash
    assert torch.equal(first.model(frames), second.model(frames))


def test_shipped_bundle_is_sound_and_small() -> None:
    bundle = load_bundle(SHIPPED_BUNDLE)
    assert bundle.manifest.model.clean_accuracy >= 0.88
    assert sum(path.stat().st_size for path in SHIPPED_BUNDLE.iterdir()) < 3_000_000


def test_layers_lie_as_the_network_names_them_unless_the_bundle_has_their_order(copy_of: Path) -> None:
    """Bundles of before say nothing of it; nor do those of today whose order is the same."""
    bundle, named = load_bundle(copy_of), ["1", "4", "7", "10"]
    assert "norm_order" not in json.loads((copy_of / "manifest.json").read_text())["model"]
    assert [place.layer for place in bundle.model.places] == named
    model = bundle.manifest.model.model_copy(update={"norm_order": named[::-1]})
    rewrite_manifest(copy_of, bundle.manifest.model_copy(update={"model": model}))
    assert [place.layer for place in load_bundle(copy_of).model.places] == named[::-1]
    rewrite_manifest(copy_of, bundle.manifest)
    assert load_bundle(copy_of).hash == bundle.hash


def test_altered_file(copy_of: Path) -> None:
    path = copy_of / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"model.safetensors was altered"):
        load_bundle(copy_of)


def test_a_missing_bundle_is_named_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another folder than that of the site the configuration's relative path leads elsewhere."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match=f"no bundle at {tmp_path}/bundles/mine: "):
        load_bundle(Path("bundles/mine"))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "labels.txt").unlink(), "cannot read .*labels.txt"),
        (lambda f: (f / "labels.txt").write_bytes(b"x"), "does not have the"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing; name a bundle's folder"),
        (lambda f: (f / "manifest.json").write_text("{"), "no valid manifest"),
        (lambda f: (f / "manifest.json").write_text(" " * (2 << 20)), "larger than"),
        (lambda f: edit(f, schema_version=2), "no valid manifest: schema_version"),
        (lambda f: edit(f, surprise=1), "no valid manifest: surprise"),
        (lambda f: edit(f, model={"architecture": "os:system", "clean_accuracy": 1}), "list it under bundle.factories"),
        (
            lambda f: edit(
                f, model={"architecture": "groupnorm-cnn", "arguments": {"classes": 9}, "clean_accuracy": 1}
            ),
            "does not fit its architecture",
        ),
        (
            lambda f: edit(f, model={"architecture": "groupnorm-cnn", "arguments": {"depth": 9}, "clean_accuracy": 1}),
            "does not take the bundle's arguments",
        ),
        (
            lambda f: edit(f, model=json.loads((f / "manifest.json").read_text())["model"] | {"norm_order": ["1"]}),
            "order of norm layers has '4' 0 times, the network has it 1 times; .* make the bundle anew",
        ),
    ],
)
def test_unsound_bundles(copy_of: Path, break_it, message: str) -> None:
    break_it(copy_of)
    with pytest.raises(BundleError, match=message):
        load_bundle(copy_of)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": [8, 3_000]}, "it has 1,900 numbers, and groupnorm-cnn with the manifest's arguments 81,"),
        ({"widths": [8] * 201}, "201 stages are more than 200"),
    ],
)
def test_arguments_take_no_more_memory_than_the_weights(copy_of: Path, arguments: dict, message: str) -> None:
    model = json.loads((copy_of / "manifest.json").read_text())["model"]
    edit(copy_of, model=model | {"arguments": model["arguments"] | arguments})
    with pytest.raises(BundleError, match=message):
        load_bundle(copy_of)


def settings_of(folder: Path, name: str, **settings: object) -> None:
    edit(folder, method={"name": name, "settings": settings})


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda f: edit(f, preprocess={"mode": "L", "width": 28, "height": 28, "mean": [0.0], "std": [0.0]}),
            "manifest.json is no valid manifest: preprocess: std must be positive",
        ),
        (
            lambda f: settings_of(f, "mgg", hidden=1),
            "method settings: hidden: Input should be greater than or equal to 2",
        ),
        (
            lambda f: settings_of(f, "mgg", inputs=[]),
            "method settings: inputs: Tuple should have at least 1 item after validation, not 0",
        ),
        (
            lambda f: settings_of(f, "mgg-paper", hiden=4),
            "method settings: hiden: Extra inputs are not permitted",
        ),
    ],
)
def test_what_a_bundle_says_wrongly_is_named_with_its_place(copy_of: Path, break_it, message: str) -> None:
    break_it(copy_of)
    with pytest.raises(BundleError, match=rf"{message}$"):
        load_bundle(copy_of)


def test_settings_of_a_rule_to_take_over_are_named_too(copy_of: Path) -> None:
    settings_of(copy_of, "mgg", step_limit=0)
    with pytest.raises(BundleError, match=r"method settings: step_limit: Input should be greater than 0$"):
        portable_rule(copy_of)


def test_a_verdict_of_another_make_is_named_with_its_place(copy_of: Path) -> None:
    content = b'{"schema_version": 2}'
    (copy_of / "verdict.json").write_bytes(content)
    files = json.loads((copy_of / "manifest.json").read_text())["files"]
    files["verdict.json"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    edit(copy_of, files=files)
    with pytest.raises(BundleError, match=r"verdict.json is no valid verdict: schema_version: Input should be 1$"):
        read_verdict(copy_of)


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
def test_a_link_to_what_has_no_end_is_not_read(copy_of: Path, name: str) -> None:
    (copy_of / name).unlink()
    os.mkfifo(copy_of / "pipe")
    (copy_of / name).symlink_to("pipe")
    with pytest.raises(BundleError, match=rf"{name} is no plain file"):
        load_bundle(copy_of)


def test_trusted_factories_are_imported(copy_of: Path) -> None:
    manifest = json.loads((copy_of / "manifest.json").read_text())
    edit(copy_of, model={**manifest["model"], "architecture": "meta.models:groupnorm_cnn"})
    with pytest.raises(BundleError, match="list it under"):
        load_bundle(copy_of)
    assert load_bundle(copy_of, ["meta.models:groupnorm_cnn"]).labels[0] == "nut"


class Joined(nn.Sequential):
    """Joins frames and channels with `view`, which one frame alone allows in any layout."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x.view(-1, *x.shape[2:]).view(x.shape) if x.dim() == 4 else x)
        return x


def joined(**arguments: int) -> nn.Module:
    return Joined(*groupnorm_cnn(**arguments))


def test_the_layout_found_with_a_bundle_serves_more_than_one_frame(copy_of: Path) -> None:
    expected, manifest = load_bundle(copy_of), json.loads((copy_of / "manifest.json").read_text())
    edit(copy_of, model={**manifest["model"], "architecture": f"{__name__}:joined"})
    frames = torch.randn(3, 1, 28, 28)
    found = load_bundle(copy_of, [f"{__name__}:joined"]).model(frames)
    torch.testing.assert_close(found, expected.model(frames))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("groupnorm_cnn", "not of the form module:name; built in: batchnorm-cnn, groupnorm-cnn, layernorm-vit"),
        ("meta.models:other", "module 'meta.models' has no 'other'"),
        (
            "not_there:net",
            r"cannot import 'not_there' .*; install it, or .*bundle\.code in a worker's",
        ),
        ("not.there:net", r"cannot import 'not.there' \(.*No module named 'not'\); install it, or"),
        ("not_timm:net", r"cannot import 'not_timm' \(NameError: name 'nonsense' is not defined\); correct it"),
    ],
)
def test_a_factory_that_cannot_be_had_is_named(
    copy_of: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "not_timm.py").write_text("nonsense\n")
    manifest = json.loads((copy_of / "manifest.json").read_text())
    edit(copy_of, model={**manifest["model"], "architecture": name})
    with pytest.raises(BundleError, match=rf"^architecture '{name}': {message}"):
        load_bundle(copy_of, [name])


def test_a_method_that_is_not_there_is_named(copy_of: Path) -> None:
    with pytest.raises(BundleError, match=r"^there is no method 'tnet'; known: mgg, source, bn, tent, "):
        load_bundle(copy_of, [], "tnet")


def with_correction(folder: Path, **changes: torch.Tensor | None) -> None:
    """Pack the bundle anew with a correction, which the changes spoil."""
    bundle = load_bundle(folder)
    features = bundle.model.feature_count
    tensors = {name: torch.full(shape, 0.1) for name, shape in Correction.shapes(features).items()} | changes
    parts = {
        "model": model_weights(folder),
        "generator": dict(bundle.method.learned.state_dict()),
        "statistics": bundle.statistics.as_tensors(),
        "correction": {name: tensor for name, tensor in tensors.items() if tensor is not None},
    }
    write_bundle(folder, bundle.manifest, parts, bundle.labels)


def test_a_correction_is_optional_and_survives(copy_of: Path) -> None:
    assert load_bundle(copy_of).model.correction is None
    with_correction(copy_of, bias=torch.linspace(0, 1, 64))
    bundle = load_bundle(copy_of)
    assert torch.equal(bundle.model.correction.bias, torch.linspace(0, 1, 64))
    assert "correction" in bundle.method.fresh(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": None}, "'bias' must have the shape"),
        ({"mean": torch.zeros(3)}, "'mean' must have the shape"),
        ({"expand": torch.zeros(64, 3)}, "two maps of one shape"),
        ({"spread": torch.zeros(64)}, "must be above 0"),
        ({"reduce": torch.full((64, 16), torch.nan)}, "not finite"),
    ],
)
def test_unsound_corrections(copy_of: Path, changes: dict[str, torch.Tensor | None], message: str) -> None:
    with_correction(copy_of, **changes)
    with pytest.raises(BundleError, match=message):
        load_bundle(copy_of)


def replaced(folder: Path, name: str, content: bytes) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    (folder / name).write_bytes(content)
    edit(folder, files={**files, name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}})


def test_labels_and_numbers_that_cannot_be_read_are_refused(copy_of: Path) -> None:
    header = b'{"mean":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}'
    replaced(copy_of, "statistics.safetensors", len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(BundleError, match=r"statistics.safetensors is no safetensors file"):
        load_bundle(copy_of)
    replaced(copy_of, "labels.txt", b"\xff\n" * 4)
    with pytest.raises(BundleError, match=r"labels.txt is no text in UTF-8"):
        load_bundle(copy_of)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e4m3fn])
def test_numbers_of_other_types_become_float32(copy_of: Path, dtype: torch.dtype) -> None:
    for name in ("model", "generator", "statistics"):
        tensors = safetensors.torch.load_file(copy_of / f"{name}.safetensors")
        content = safetensors.torch.save({key: t.to(dtype) if t.dim() else t for key, t in tensors.items()})
        replaced(copy_of, f"{name}.safetensors", content)
    method = load_bundle(copy_of).method
    forward = method.predict(torch.randn(2, 1, 28, 28), torch.zeros(2, dtype=torch.long), method.fresh(1))
    assert method.update(forward).state["feature_mean"].dtype == torch.float32


def test_a_full_disk_is_named(tiny_bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").symlink_to("/dev/full")
    with pytest.raises(BundleError, match="cannot be written: No space left on device; remove what is there of it"):
        write_bundle(tmp_path, read_manifest(tiny_bundle_path), {}, ["bolt", "nut"])
