"""Recipes and benchmark plans: YAML files, validated."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from schemas.errors import ConfigError, mistakes
from schemas.yaml_file import yaml_content

Model = TypeVar("Model", bound=BaseModel)


def read_yaml(path: Path, model: type[Model], what: str) -> Model:
    """The content of the file as a `model`; `what` names the kind of file in errors. Raises ConfigError."""
    content = yaml_content(path, what)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        where, words = mistakes(error)[0]
        raise ConfigError(f"{what} {path}: {where or 'the file'}: {words}") from error
