"""Writes docs/reference from the code: `make reference`. A test compares the folder with the code.

Command line and configuration as Markdown, messages as JSON Schemas and as one AsyncAPI 3 document.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.cli
import yaml
from pydantic import BaseModel, SecretStr
from pydantic_core import PydanticUndefined

from schemas.bundle import Manifest
from schemas.command import COMMAND_TYPE, Command
from schemas.config import ENVIRONMENT_PREFIX, Topics, WorkerConfig
from schemas.frame import FRAME_TYPE
from schemas.prediction import PREDICTION_TYPE, Prediction
from schemas.update import UPDATE_TYPE, UpdateEvent
from schemas.verdict import Verdict
from worker.cli.app import app

SCHEMAS: dict[str, type[BaseModel]] = {
    "prediction": Prediction,
    "update-event": UpdateEvent,
    "command": Command,
    "config": WorkerConfig,
    "manifest": Manifest,
    "verdict": Verdict,
}
GENERATED = "Generated from the code by `make reference`; do not edit."
PICTURES = {"type": "string", "format": "binary", "description": "JPEG, PNG or WebP, one picture"}


def reference() -> dict[str, str]:
    """Every generated file: path below docs/reference, and its text."""
    files = {"cli.md": command_line(), "config.md": configuration()}
    files["asyncapi.yaml"] = f"# {GENERATED}\n" + yaml.safe_dump(asyncapi(), sort_keys=False, width=120)
    for name, model in SCHEMAS.items():
        files[f"schemas/{name}.json"] = json.dumps(_schema(model), indent=2, ensure_ascii=False) + "\n"
    return files


def command_line() -> str:
    """Every command with its arguments and options, as the command line itself describes them."""
    command = typer.main.get_command(app)
    _list_in_full(command)
    context = typer.Context(command)
    text = typer.cli.get_docs_for_click(obj=command, ctx=context, name="driftkeel")
    body = text.split("\n", 1)[1].strip()
    return f"# Command line\n\n{GENERATED}\n\n{body}\n"


def _list_in_full(group: Any) -> None:
    """Have lists of commands show the whole first line of each help text; by default it is cut after 45 letters."""
    for command in getattr(group, "commands", {}).values():
        command.short_help = (command.help or "").partition("\n")[0]
        _list_in_full(command)


def configuration() -> str:
    """Every key with its type, default and meaning."""
    intro = (
        "The configuration is one YAML file. A key that is not set keeps its default. Environment variables override "
        f"the file: `kafka.topics.frames` is `{ENVIRONMENT_PREFIX}KAFKA__TOPICS__FRAMES`. `driftkeel config` prints "
        "what a worker would run with, secrets masked."
    )
    rows = "\n".join(_rows(WorkerConfig, ""))
    return f"# Configuration\n\n{GENERATED}\n\n{intro}\n\n| key | type | default | |\n|---|---|---|---|\n{rows}\n"


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            what = field.description or (kind.__doc__ or "").partition("\n")[0]
            yield f"| **`{prefix}{name}`** | | | {_cell(what)} |"
            yield from _rows(kind, f"{prefix}{name}.")
            continue
        default = field.default
        if isinstance(default, SecretStr):
            default = default.get_secret_value()
        made = "made at start" if default is PydanticUndefined else f"`{_plain(default)}`"
        if field.default_factory in (dict, list):
            made = f"`{_plain(field.default_factory())}`"
        shown = f"| `{prefix}{name}` | {_type(_schema(model)['properties'][name])} | {made} |"
        yield f"{shown} {_cell(field.description or '')} |"


def _plain(value: Any) -> str:
    """A default value as in YAML."""
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _type(schema: dict[str, Any]) -> str:
    """A JSON Schema in words: `integer, from 1`."""
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "$ref" in schema:
        return str(schema["$ref"].rsplit("/", 1)[1])
    kind = str(schema.get("type", "any"))
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    limits = [f"{word} {_number(schema[name])}" for name, word in bounds.items() if name in schema]
    return ", ".join([kind, *limits])


def _number(value: float) -> str:
    """A bound as the configuration has it: `1048576`, `0.5`, `1`."""
    return str(int(value)) if value == int(value) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def asyncapi() -> dict[str, Any]:
    """What goes through Kafka, seen from the worker, as an AsyncAPI 3.0 document. Topics have their default names."""
    topics = Topics()
    messages = {
        "frame": _message("One encoded picture of one stream.", FRAME_TYPE, "image/jpeg", PICTURES, required=()),
        "prediction": _message("One per frame.", PREDICTION_TYPE, "application/json", _embedded(Prediction)),
        "update": _message("One per guard decision.", UPDATE_TYPE, "application/json", _embedded(UpdateEvent)),
        "command": _message(
            "A command to one stream or to all.",
            COMMAND_TYPE,
            "application/json",
            _embedded(Command),
            required=(),
        ),
        "deadLetter": _dead_letter(),
    }
    directions = {
        "frames": ("receive", topics.frames, "frame"),
        "commands": ("receive", topics.commands, "command"),
        "predictions": ("send", topics.predictions, "prediction"),
        "updates": ("send", topics.updates, "update"),
        "deadLetters": ("send", topics.dead_letters, "deadLetter"),
    }
    fields = Topics.model_fields
    names = {"deadLetters": "dead_letters"}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Driftkeel worker",
            "version": "1",
            "description": "Frames in; predictions, update events and dead letters out.",
        },
        "defaultContentType": "application/json",
        "channels": {
            name: {
                "address": topic,
                "description": f"`kafka.topics.{names.get(name, name)}`: {fields[names.get(name, name)].description}",
                "messages": {message: {"$ref": f"#/components/messages/{message}"}},
            }
            for name, (_, topic, message) in directions.items()
        },
        "operations": {
            f"{action}{name[0].upper()}{name[1:]}": {
                "action": action,
                "channel": {"$ref": f"#/channels/{name}"},
                "messages": [{"$ref": f"#/channels/{name}/messages/{message}"}],
            }
            for name, (action, _, message) in directions.items()
        },
        "components": {"messages": messages},
    }


def _message(
    summary: str,
    kind: str,
    content: str,
    payload: dict[str, Any],
    required: tuple[str, ...] = ("ce_specversion", "ce_type", "ce_source", "ce_id", "ce_time", "content-type"),
) -> dict[str, Any]:
    """CloudEvents 1.0 in Kafka's binary mode, key = stream id. `required` are the headers that are always there."""
    text = {"type": "string"}
    headers: dict[str, Any] = {
        "type": "object",
        "properties": {
            "ce_specversion": {"const": "1.0"},
            "ce_type": {"const": kind},
            "ce_source": text,
            "ce_id": text,
            "ce_time": {"type": "string", "format": "date-time"},
            "content-type": text,
            "traceparent": text,
        },
    }
    if required:
        headers["required"] = list(required)
    return {
        "summary": summary,
        "contentType": content,
        "headers": headers,
        "payload": payload,
        "bindings": {"kafka": {"key": {"type": "string", "description": "stream id"}, "bindingVersion": "0.5.0"}},
    }


def _dead_letter() -> dict[str, Any]:
    names = ("error-class", "error-message", "topic", "partition", "offset", "worker")
    return {
        "summary": "A record that could not become a frame: key, value and headers as they were, and the reason.",
        "headers": {
            "type": "object",
            "properties": {f"driftkeel-{name}": {"type": "string"} for name in names},
            "required": [f"driftkeel-{name}" for name in names],
        },
        "payload": {"type": "string", "format": "binary"},
        "bindings": {"kafka": {"key": {"type": "string"}, "bindingVersion": "0.5.0"}},
    }


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema(mode="validation")


def _embedded(model: type[BaseModel]) -> dict[str, Any]:
    """A schema for use inside another document, with its references resolved."""
    schema = _schema(model)
    definitions = schema.pop("$defs", {})

    def resolved(part: Any) -> Any:
        if isinstance(part, list):
            return [resolved(item) for item in part]
        if not isinstance(part, dict):
            return part
        own = {key: resolved(value) for key, value in part.items() if key != "$ref"}
        if "$ref" in part:
            return {**resolved(definitions[part["$ref"].rsplit("/", 1)[1]]), **own}
        return own

    result: dict[str, Any] = resolved(schema)
    return result


def write(folder: Path) -> None:
    """Write every file below `folder`, and remove all others there."""
    files = reference()
    for old in folder.rglob("*"):
        if old.is_file() and str(old.relative_to(folder)) not in files:
            old.unlink()
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
