"""docs/reference is what the code says, and what others would read without complaint."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import jsonschema
import pytest
import yaml

from schemas.config import WorkerConfig
from schemas.config_file import dotted_keys
from worker.reference import SCHEMAS, asyncapi, command_line, configuration, reference, write

FOLDER = Path(__file__).parents[2] / "docs" / "reference"


def test_the_reference_agrees_with_the_code() -> None:
    written = {str(p.relative_to(FOLDER)): p.read_text(encoding="utf-8") for p in FOLDER.rglob("*") if p.is_file()}
    expected = reference()
    assert set(written) == set(expected), "run 'make reference'"
    for name, text in expected.items():
        assert written[name] == text, f"{name} is not what the code says; run 'make reference'"


def test_lists_of_commands_say_the_whole_line() -> None:
    listed = [line for line in command_line().splitlines() if line.startswith("* `")]
    assert "* `worker`: Consume frames, predict and adapt, until SIGTERM or Ctrl-C." in listed
    assert [line for line in listed if line.endswith("...")] == []


def test_bounds_are_plain_numbers() -> None:
    rows = dict(line.split(" | ")[:2] for line in configuration().splitlines() if line.startswith("| `"))
    assert rows["| `batch.max_buffered_bytes`"] == "integer, from 1048576"
    assert rows["| `kafka.connect_timeout_s`"] == "number, above 0"
    assert [kind for kind in rows.values() if "e+" in kind] == []


def test_what_is_no_longer_generated_is_removed(tmp_path: Path) -> None:
    (tmp_path / "schemas").mkdir()
    (tmp_path / "schemas" / "gone.json").write_text("{}")
    write(tmp_path)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == set(reference())


def test_every_key_of_the_configuration_is_there() -> None:
    text = configuration()
    keys = [key for key in dotted_keys(WorkerConfig) if not key.startswith("streams.")]  # below a stream's name
    assert len(keys) > 60
    assert [key for key in keys if f"`{key}`" not in text] == []


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_json_schemas(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(json.loads((FOLDER / "schemas" / f"{name}.json").read_text()))


def test_the_example_configuration_fits_its_schema() -> None:
    schema = json.loads((FOLDER / "schemas" / "config.json").read_text())
    example = yaml.safe_load((FOLDER.parents[1] / "driftkeel.example.yaml").read_text())
    jsonschema.validate(example, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"kafka": {"bootstrp": "x:1"}}, schema)


def test_the_asyncapi_document_is_one() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its models warn about their own field names
        from asyncapi3.models.asyncapi import AsyncAPI3
    document = yaml.safe_load((FOLDER / "asyncapi.yaml").read_text())
    AsyncAPI3.model_validate(document)
    assert document == asyncapi()
    text = json.dumps(document)
    assert text.count("$ref") == text.count('"$ref": "#/channels/') + text.count('"$ref": "#/components/messages/')
    with pytest.raises(ValueError, match="chanels"):
        AsyncAPI3.model_validate({**document, "chanels": {}})
