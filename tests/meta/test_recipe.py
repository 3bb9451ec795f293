"""Recipes, on the smallest settings that still go all the way."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from meta.bundle import load_bundle
from meta.bundle_folder import read_manifest
from meta.mgg import MGG
from meta.paper import PaperMGG
from meta.recipe import Recipe, build_bundle, calibrate_bundle, read_recipe
from schemas.errors import BundleError, ConfigError
from tests.conftest import SHIPPED_BUNDLE

SOURCE = {"bundle": str(SHIPPED_BUNDLE)}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A build takes as many threads as its recipe says, and leaves them to whatever comes next."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def build(folder: Path, **content: object) -> torch.Tensor:
    recipe = Recipe.model_validate(
        {
            "name": "small",
            "data": "fashion-mnist",
            "source": SOURCE,
            "correction_draws": 20,
            "calibration_windows": 2,
            "calibration_streams": 1,
            **content,
        }
    )
    manifest = build_bundle(recipe, folder, "a test", say=lambda text: None)
    bundle = load_bundle(folder)
    assert bundle.hash == manifest.content_hash
    wanted = PaperMGG if "paper" in content else MGG
    assert isinstance(bundle.method, wanted)
    frames, stream = torch.randn(4, 1, 28, 28), torch.zeros(4, dtype=torch.long)
    update = bundle.method.update(bundle.method.predict(frames, stream, bundle.method.fresh(1)))
    return update.state["affine"]


@pytest.mark.long
@pytest.mark.timeout(1_800)  # three whole builds: half a minute each where nothing else runs
def test_ours_and_the_papers(tmp_path: Path) -> None:
    training = {"meta_steps": 2, "unroll": 2, "streams": 2}
    ours = build(tmp_path / "ours", training=training)
    again = build(tmp_path / "again", training=training)
    assert torch.equal(ours, again)
    assert read_manifest(tmp_path / "ours") == read_manifest(tmp_path / "again")
    paper = build(tmp_path / "paper", paper={"images": 8, "epochs": 1})
    source = load_bundle(SHIPPED_BUNDLE).model.source_affine
    assert (paper - source).abs().max() <= 1e-3 + 1e-6


@pytest.mark.long
def test_a_generator_can_be_trained_further(tmp_path: Path) -> None:
    training = {"meta_steps": 1, "unroll": 2, "streams": 2, "batches": [1], "learning_rate": 1e-6}
    build(tmp_path / "further", training=training, correction_draws=0, start=str(SHIPPED_BUNDLE))
    shipped, further = (load_bundle(folder).method.learned for folder in (SHIPPED_BUNDLE, tmp_path / "further"))
    for name, tensor in shipped.named_parameters():
        torch.testing.assert_close(further.get_parameter(name), tensor, rtol=0, atol=1e-5, msg=name)
    held = {"dose_shift": -4}
    build(tmp_path / "held", training=training, correction_draws=0, start=str(SHIPPED_BUNDLE), generator=held)
    bundle = load_bundle(tmp_path / "held")
    method = bundle.method
    assert method.settings.dose_shift == -4
    assert bundle.manifest.limits != load_bundle(tmp_path / "further").manifest.limits  # those of what is served
    assert all(torch.equal(t, further.get_parameter(name)) for name, t in method.learned.named_parameters())
    with pytest.raises(BundleError, match="does not fit"):
        build(
            tmp_path / "other",
            training=training,
            correction_draws=0,
            start=str(SHIPPED_BUNDLE),
            generator={"hidden": 8},
        )


@pytest.mark.long
def test_what_was_measured_of_a_source_is_kept_with_it(tmp_path: Path) -> None:
    """Measured again it would differ by rounding, and other methods' records are about these bytes."""
    source = SHIPPED_BUNDLE.with_name("fashion-mnist-batchnorm")
    build(tmp_path / "anew", source={"bundle": str(source)}, training={"meta_steps": 0})
    before, after = read_manifest(source).files, read_manifest(tmp_path / "anew").files
    for name in ("model.safetensors", "statistics.safetensors", "correction.safetensors"):
        assert after[name] == before[name]
    assert after["generator.safetensors"] != before["generator.safetensors"]


def test_every_shipped_recipe_can_be_read() -> None:
    recipes = sorted(SHIPPED_BUNDLE.parent.glob("*.yaml"))
    assert len(recipes) >= 2
    for path in recipes:
        assert read_recipe(path).name == path.stem


def test_shipped_bundles_name_commands_that_anybody_can_run() -> None:
    for manifest in SHIPPED_BUNDLE.parent.glob("*/manifest.json"):
        content = json.loads(manifest.read_text())
        for name in ("created_by", "calibrated_by"):
            for word in str(content.get(name) or "").split():
                assert not Path(word).is_absolute(), f"{manifest}: {name} names {word}"


def test_the_papers_generator_starts_from_nothing(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "x", "data": "fashion-mnist", "paper": {}, "start": "bundles/any"}))
    with pytest.raises(ConfigError, match="leave one of them out"):
        read_recipe(path)


def test_a_wrong_recipe_names_the_place(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    with pytest.raises(ConfigError, match=r"recipe\.yaml: No such file or directory$"):
        read_recipe(path)
    path.write_text("name: [\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml is not YAML"):
        read_recipe(path)
    path.write_text(yaml.safe_dump({"name": "x", "data": "fashion-mnist", "training": {"unroll": 1}}))
    with pytest.raises(ConfigError, match=r"training\.unroll"):
        read_recipe(path)
    for batches, place in (([], r"training\.batches"), ([4, 0], r"training\.batches\.1")):
        path.write_text(yaml.safe_dump({"name": "x", "data": "fashion-mnist", "training": {"batches": batches}}))
        with pytest.raises(ConfigError, match=place):
            read_recipe(path)


@pytest.mark.parametrize(("what", "other"), [("meta.data.LABELS", ("bolt", "nut")), ("width", 64), ("mode", "RGB")])
def test_a_bundle_of_other_images_is_not_calibrated_on_ours(
    what: str, other: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(SHIPPED_BUNDLE, tmp_path / "bundle")
    if what == "meta.data.LABELS":
        monkeypatch.setattr(what, other)
    else:
        manifest = json.loads((folder / "manifest.json").read_text())
        changes = {what: other, "mean": [0.5] * 3, "std": [0.5] * 3} if what == "mode" else {what: other}
        manifest["preprocess"] |= changes
        (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr("meta.recipe.calibrate", lambda *_: pytest.fail("calibrated"))
    with pytest.raises(BundleError, match="is no bundle of Fashion-MNIST; 'driftkeel bundle create' calibrates on"):
        calibrate_bundle(folder, "test", 0, 2)
