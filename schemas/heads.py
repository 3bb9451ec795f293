"""The newest event of every stream's chain, to be kept where nobody can write who can write to topic and store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from schemas.errors import StateError, first_mistake

MAX_FILE_BYTES = 64 << 20


class Head(BaseModel):
    """An event by its number in its stream, with its time and the SHA-256 of its bytes as published."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    event: int = Field(ge=1)
    time: AwareDatetime
    hash: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Heads(BaseModel):
    """What `driftkeel audit heads` writes. Every earlier event follows from these by the chain."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    time: AwareDatetime
    streams: dict[str, Head]


def read_heads(path: Path) -> Heads:
    """Raises StateError where there are none."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise StateError(f"{path} has more than {MAX_FILE_BYTES} bytes: are these heads?")
        return Heads.model_validate_json(content)
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise StateError(f"{path} is not what 'driftkeel audit heads' writes: {first_mistake(error)}") from error
