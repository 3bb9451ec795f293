"""A worker's configuration from one YAML file and the environment, and back to YAML."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import SettingsError

from schemas.config import ENVIRONMENT_PREFIX, WorkerConfig
from schemas.errors import ConfigError, mistakes
from schemas.yaml_file import yaml_content

OTHERS = {"DRIFTKEEL_CONSOLE_TOKEN"}  # named as an option but for an underscore: the compose file hands it on
OF_KUBERNETES = re.compile("(tcp|udp|sctp)://")  # as DRIFTKEEL_CONSOLE_PORT beside a service driftkeel-console


def load_config(path: Path | None) -> WorkerConfig:
    """The configuration in `path` (defaults where None) with the environment's overrides.

    Raises ConfigError, one line per mistake, with the nearest valid key for an unknown one.
    """
    content: dict[str, Any] = {}
    if path is not None:
        content = _read_yaml(path)
    where = f"config {path}" if path else "config defaults"
    _refuse_unknown_environment()
    try:
        return WorkerConfig(**content)
    except ValidationError as error:
        raise ConfigError("\n".join(_explained(error, where))) from error
    except SettingsError as error:
        raise ConfigError(_no_json(error)) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    content = yaml_content(path, "config")
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"config {path}: expected sections such as 'kafka:' at the top level")
    return content


def _explained(error: ValidationError, where: str) -> Iterator[str]:
    for problem, (name, words) in zip(error.errors(), mistakes(error), strict=True):
        place = _said_by(problem["loc"], where)
        if problem["type"] == "extra_forbidden":
            yield f"{place}: unknown key '{name}'{_nearest([str(part) for part in problem['loc']])}"
        else:
            yield f"{place}: {name or 'configuration'}: {words[:1].lower()}{words[1:]}"


def _said_by(location: Sequence[str | int], where: str) -> str:
    """Who said what is wrong at `location`: a variable; `where`, the file; or, of a section's rule, perhaps both."""
    key, whole, parts = [str(part).lower() for part in location], [], []
    for variable in _environment():
        named = variable[len(ENVIRONMENT_PREFIX) :].lower().split("__")
        if named == key[: len(named)] and _has(os.environ[variable], key[len(named) :]):
            whole.append(variable)
        elif key and named[: len(key)] == key:
            parts.append(variable)
    return _called(whole) if whole else " and ".join(filter(None, [where, _called(parts)]))


def _has(content: str, key: list[str]) -> bool:
    """Whether a variable's content has such a key in it, where it is a section as JSON."""
    try:
        inside = json.loads(content)
    except ValueError:
        return True
    for part in key:
        if not isinstance(inside, dict):
            break
        inside = {str(name).lower(): value for name, value in inside.items()}
        if part not in inside:
            return False
        inside = inside[part]
    return True


def _no_json(error: SettingsError) -> str:
    """pydantic-settings names the section and not the variable, but keeps the text."""
    text = getattr(error.__cause__, "doc", None)
    named = [variable for variable in _environment() if os.environ[variable] == text]
    return f'{_called(named) or error}: lists and sections are written as JSON there, such as \'["a", "b"]\''


def _called(variables: list[str]) -> str:
    return f"environment variable{'s' * (len(variables) > 1)} {', '.join(variables)}" if variables else ""


def _environment() -> list[str]:
    return [variable for variable in os.environ if variable.upper().startswith(ENVIRONMENT_PREFIX)]


def _nearest(location: list[str]) -> str:
    # A key in the wrong section is as common a mistake as a misspelt one, and surer to be seen.
    close = [key for key in dotted_keys(WorkerConfig) if key.split(".")[-1] == location[-1]][:1]
    if not close:
        valid = [key for key in dotted_keys(WorkerConfig) if key.count(".") == len(location) - 1]
        close = difflib.get_close_matches(".".join(location), valid, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else "; 'driftkeel config' prints all valid keys"


def dotted_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys, sections included."""
    found = []
    for name, field in model.model_fields.items():
        found.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found += dotted_keys(kind, f"{prefix}{name}.")
    return found


def _refuse_unknown_environment() -> None:
    """What is meant for an option and names none, so that nobody reads it: also where underscores alone are wrong."""
    valid = dotted_keys(WorkerConfig)
    options = {key.replace(".", "_"): key for key in valid if not any(other.startswith(f"{key}.") for other in valid)}
    for variable in os.environ:
        read, key = _as_key(variable)
        if key is None or (read and key in valid):
            continue
        meant = options.get(re.sub(r"[._]+", "_", key).strip("_"))
        right = f"{ENVIRONMENT_PREFIX}{meant.replace('.', '__').upper()}" if meant else ""
        if not read and (_is_of_others(variable, right) or not (meant or "." in key)):
            continue
        nearest = f"; did you mean {right}?" if meant else _nearest(key.split("."))
        raise ConfigError(f"environment variable {variable} names no option{nearest}")


def _as_key(variable: str) -> tuple[bool, str | None]:
    """Whether the variable is read, and the key that it names or seems to; None where it is nothing of ours."""
    for prefix in (ENVIRONMENT_PREFIX, ENVIRONMENT_PREFIX.removesuffix("_")):
        if variable.upper().startswith(prefix):
            return prefix == ENVIRONMENT_PREFIX, variable[len(prefix) :].lower().replace("__", ".")
    return False, None


def _is_of_others(variable: str, right: str) -> bool:
    """Whether a variable is not read on purpose: that with the `right` name may be made of it, and is there."""
    others = variable.upper() in OTHERS or OF_KUBERNETES.match(os.environ[variable])
    return bool(others) or right in map(str.upper, _environment())


def effective_yaml(config: WorkerConfig) -> str:
    """The configuration as YAML, secrets masked."""
    content = config.model_dump(mode="json")
    content["store"]["url"] = config.store.address
    return yaml.safe_dump(content, sort_keys=False)
