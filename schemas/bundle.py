"""The manifest of a bundle: what the centre ships to its sites."""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator, model_validator

Layout = Literal["channels-first", "channels-last"]


class Part(BaseModel):
    """A part of the manifest; unknown fields are errors, and nothing can be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Preprocess(Part):
    """From decoded pixels to the model's input: convert, resize, scale to [0, 1], standardise."""

    mode: Literal["L", "RGB"]
    width: int = Field(ge=1, le=4_096)
    height: int = Field(ge=1, le=4_096)
    mean: list[FiniteFloat]
    std: list[FiniteFloat]

    @model_validator(mode="after")
    def _one_value_per_channel(self) -> Preprocess:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need {self.channels} values for mode {self.mode}")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        return self

    @property
    def channels(self) -> int:
        """1 for mode L, 3 for RGB."""
        return 1 if self.mode == "L" else 3


class ModelPart(Part):
    """The source model: an architecture's name and arguments; the weights lie in model.safetensors."""

    architecture: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    norm_order: list[str] = Field(
        default_factory=list,
        description="the norm layers' names in the order in which they run; empty: as the network names them",
    )
    norm_layouts: dict[str, Layout] = Field(
        default_factory=dict,
        description="where the channels lie in norm layers of the network's own classes, by name; others do not adapt",
    )
    clean_accuracy: float = Field(ge=0, le=1, description="on frames that trained neither model nor generator")


class MethodPart(Part):
    """How streams adapt; the learned parameters lie in generator.safetensors."""

    name: Literal["mgg", "mgg-paper"]
    settings: dict[str, Any] = Field(default_factory=dict)


class Estimator(Part):
    """From a stream's signals to its accuracy: logistic regression on n standardised signals and their products.

    `adapted` and `source` hold 1 + n + n (n + 1) / 2 weights each. At the estimate `levels[i]`, nine of ten streams in
    calibration lay between it plus `low[i]` and plus `high[i]`; in between, these are interpolated.
    """

    signals: list[str] = Field(min_length=1, max_length=64)
    centre: list[FiniteFloat]
    scale: list[FiniteFloat]
    adapted: list[FiniteFloat]
    source: list[FiniteFloat]
    levels: list[FiniteFloat] = Field(min_length=1, max_length=64)
    low: list[FiniteFloat]
    high: list[FiniteFloat]

    @model_validator(mode="after")
    def _lengths_fit(self) -> Estimator:
        n = len(self.signals)
        weights = 1 + n + n * (n + 1) // 2
        if len(self.centre) != n or len(self.scale) != n or min(self.scale) <= 0:
            raise ValueError(f"centre and scale need {n} values, scales above zero")
        if len(self.adapted) != weights or len(self.source) != weights:
            raise ValueError(f"adapted and source need {weights} weights for {n} signals")
        if not len(self.levels) == len(self.low) == len(self.high) or sorted(self.levels) != self.levels:
            raise ValueError("levels, low and high need equal lengths, levels rising")
        return self


class Calibration(Part):
    """From logits to honest numbers, fitted on simulated shifts.

    Confidence is softmax(logits / t) with log t = log temperature + softening * (mean confidence - estimated accuracy),
    both of the stream's recent frames. Without an estimator the estimated accuracy of a stream is
    `intercept + slope * mean confidence`, within [0, 1].
    """

    temperature: float = Field(gt=0)
    source_temperature: float | None = Field(None, gt=0, description="of source's plain answers; null: as the others")
    softening: FiniteFloat = Field(0.0, ge=0, le=100)
    intercept: float
    slope: float
    error: float = Field(ge=0, description="mean absolute error of the estimate in calibration")
    threshold: float = Field(0.9, ge=0, le=1, description="clean frames are as often surer than this as they are right")
    entropies: list[FiniteFloat] = Field(
        default_factory=list, max_length=1_000, description="quantiles of the source model's entropy on clean frames"
    )
    estimator: Estimator | None = None


class Limits(Part):
    """What is normal: upper ends seen in calibration, from which the guard takes its limits."""

    raw_gradient_norm: float = Field(gt=0)
    source_distance: float = Field(gt=0)
    generated_gradient_norm: float | None = Field(None, gt=0)
    cosine: float | None = Field(None, ge=-1, le=1, description="lower end of the running mean")
    gain_error: float | None = Field(
        None, ge=0, description="source was estimated to do better by no more than this where it did not"
    )


class FileEntry(Part):
    """Content and size of a file of the bundle."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Manifest(Part):
    """manifest.json."""

    schema_version: Literal[1] = 1
    name: str
    created_by: str = Field(description="the command that makes this bundle")
    calibrated_by: str = Field("", description="the command that has since fitted calibration and limits anew")
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
            plain = PurePosixPath(name).name == name and name.isprintable()
            if not plain or name in ("", ".", "..", "manifest.json"):
                raise ValueError(f"file name {name!r} must be a plain name inside the bundle")
        return files

    @property
    def content_hash(self) -> str:
        """Sixteen hexadecimal digits that change with any byte of the bundle.

        A field that a later version adds does not change it for bundles that do not have the field.
        """
        return _digest(self.model_dump(mode="json", exclude_defaults=True))

    @property
    def model_hash(self) -> str:
        """Changes with all that gives a stream's parameters their meaning: network, weights, preprocessing, labels."""
        model = [self.model.architecture, self.model.arguments, self.preprocess.model_dump(mode="json")]
        files = [self._sha256(name) for name in ("model.safetensors", "labels.txt")]
        return _digest([*model, *files, *self.model.norm_order])

    @property
    def generator_hash(self) -> str:
        """Changes with the method, its settings and what it has learned."""
        return _digest([self.method.model_dump(mode="json"), self._sha256("generator.safetensors")])

    def _sha256(self, name: str) -> str | None:
        entry = self.files.get(name)
        return entry.sha256 if entry else None


def _digest(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
