import pytest
from pydantic import ValidationError

from schemas.bundle import Manifest, Preprocess


def test_content_hash_changes_with_any_file(tiny_bundle) -> None:
    manifest = tiny_bundle.manifest
    entry = manifest.files["labels.txt"]
    other = manifest.model_copy(
        update={"files": {**manifest.files, "labels.txt": entry.model_copy(update={"sha256": "0" * 64})}}
    )
    assert len(manifest.content_hash) == 16
    assert other.content_hash != manifest.content_hash


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/b", "", "..", "manifest.json", "a\0b", "\x1b[2J"])
def test_file_names_stay_inside_the_bundle(tiny_bundle, name: str) -> None:
    content = tiny_bundle.manifest.model_dump()
    content["files"] = {name: {"sha256": "0" * 64, "size": 1}}
    with pytest.raises(ValidationError, match="plain name"):
        Manifest.model_validate(content)


@pytest.mark.parametrize("changes", [{"mean": [0.1, 0.2]}, {"std": [0.0]}, {"width": 0}, {"mode": "CMYK"}])
def test_preprocessing_must_make_sense(changes: dict) -> None:
    with pytest.raises(ValidationError):
        Preprocess.model_validate({"mode": "L", "width": 28, "height": 28, "mean": [0.5], "std": [0.2], **changes})


def test_a_field_that_a_later_version_adds_does_not_change_the_hash(tiny_bundle) -> None:
    """Else an upgrade of the worker would look like another bundle, and restart every stream."""
    manifest = tiny_bundle.manifest

    class Later(Manifest):
        signed_by: str | None = None

    assert Later.model_validate(manifest.model_dump()).content_hash == manifest.content_hash
    assert Later.model_validate({**manifest.model_dump(), "signed_by": "us"}).content_hash != manifest.content_hash


def test_the_models_hash_is_about_the_model_alone(tiny_bundle) -> None:
    manifest = tiny_bundle.manifest
    renamed = manifest.model_copy(update={"name": "other"})
    assert renamed.model_hash == manifest.model_hash
    brighter = manifest.preprocess.model_copy(update={"mean": [0.4]})
    assert manifest.model_copy(update={"preprocess": brighter}).model_hash != manifest.model_hash
    reordered = manifest.model.model_copy(update={"norm_order": ["2", "1"]})  # which the affine's layout depends on
    assert manifest.model_copy(update={"model": reordered}).model_hash != manifest.model_hash


@pytest.mark.parametrize("part", ["mean", "std"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_pixels_are_standardised_with_finite_numbers(part: str, number: float) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        Preprocess.model_validate({"mode": "L", "width": 8, "height": 8, "mean": [0.5], "std": [0.5], part: [number]})
