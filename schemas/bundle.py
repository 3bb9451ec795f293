"""The manifest of a bundle: what the centre ships to its sites."""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Preprocess(Part):
    """From decoded pixels to the model's input: convert, resize, scale to [0, 1], standardise."""

    mode: Literal["L", "RGB"]
    width: int = Field(ge=1, le=4_096)
    height: int = Field(ge=1, le=4_096)
    mean: list[float]
    std: list[float]

    @model_validator(mode="after")
    def _one_value_per_channel(self) -> Preprocess:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need {self.channels} values for mode {self.mode}")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        return self

    @property
    def channels(self) -> int:
        return 1 if self.mode == "L" else 3


class ModelPart(Part):
    """The source model: an architecture's name and arguments; the weights lie in model.safetensors."""

    architecture: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    clean_accuracy: float = Field(ge=0, le=1, description="on frames that trained neither model nor generator")


class MethodPart(Part):
    """How streams adapt; the learned parameters lie in generator.safetensors."""

    name: Literal["mgg", "mgg-paper"]
    settings: dict[str, Any] = Field(default_factory=dict)


class Calibration(Part):
    """From logits to honest numbers, fitted on simulated shifts.

    Confidence is softmax(logits / temperature). The estimated accuracy of a stream is
    `intercept + slope * mean confidence`, within [0, 1].
    """

    temperature: float = Field(gt=0)
    intercept: float
    slope: float
    error: float = Field(ge=0, description="mean absolute error of the estimate in calibration")


class Limits(Part):
    """What is normal: upper ends seen in calibration, from which the guard takes its limits."""

    raw_gradient_norm: float = Field(gt=0)
    source_distance: float = Field(gt=0)


class FileEntry(Part):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Manifest(Part):
    """manifest.json."""

    schema_version: Literal[1] = 1
    name: str
    created_by: str = Field(description="the command that makes this bundle")
    model: ModelPart
    method: MethodPart
    preprocess: Preprocess
    calibration: Calibration
    limits: Limits
    files: dict[str, FileEntry]

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            if PurePosixPath(name).name != name or name in ("", ".", "..", "manifest.json"):
                raise ValueError(f"file name {name!r} must be a plain name inside the bundle")
        return files

    @property
    def content_hash(self) -> str:
        """Sixteen hexadecimal digits that change with any byte of the bundle."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
