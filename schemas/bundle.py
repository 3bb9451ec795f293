"""The manifest of a bundle: what the centre ships to its sites."""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator, model_validator

Layout = Literal["channels-first", "channels-last"]


class Part(BaseModel):
    """A part of the manifest. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Preprocess(Part):
    """How decoded pixels become the model's input: convert, resize, scale to [0, 1], standardise."""

    mode: Literal["L", "RGB"] = Field(description="Colours of the input: `L` is grey, `RGB` three channels.")
    width: int = Field(ge=1, le=4_096, description="Width of the input in pixels.")
    height: int = Field(ge=1, le=4_096, description="Height of the input in pixels.")
    mean: list[FiniteFloat] = Field(description="Subtracted from each channel, after scaling to [0, 1].")
    std: list[FiniteFloat] = Field(description="Each channel is divided by this, after `mean` is subtracted.")

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
    """The source model: the name and arguments of its architecture. Its weights are in `model.safetensors`."""

    architecture: str = Field(
        description="Name of a shipped architecture, or `module:function` that the site allows in `bundle.factories`."
    )
    arguments: dict[str, Any] = Field(default_factory=dict, description="Arguments that build the architecture.")
    norm_order: list[str] = Field(
        default_factory=list,
        description="Names of the normalisation layers in the order in which they run. Empty: the network's own order.",
    )
    norm_layouts: dict[str, Layout] = Field(
        default_factory=dict,
        description="Position of the channels in normalisation layers of classes that are the network's own, by name. "
        "Such layers that are not listed do not adapt.",
    )
    clean_accuracy: float = Field(
        ge=0, le=1, description="Accuracy on undisturbed images that trained neither the model nor the generator."
    )


class MethodPart(Part):
    """How streams adapt. What was learned for it is in `generator.safetensors`."""

    name: Literal["mgg", "mgg-paper"] = Field(description="Name of the method.")
    settings: dict[str, Any] = Field(default_factory=dict, description="Settings of the method.")


class Estimator(Part):
    """Estimates a stream's accuracy from its signals: logistic regression on n standardised signals and their products.

    The regression has 1 + n + n (n + 1) / 2 weights.
    """

    signals: list[str] = Field(min_length=1, max_length=64, description="Names of the n signals.")
    centre: list[FiniteFloat] = Field(description="Subtracted from each signal.")
    scale: list[FiniteFloat] = Field(description="Each signal is divided by this, after `centre` is subtracted.")
    adapted: list[FiniteFloat] = Field(description="Weights of the estimate for the adapted parameters.")
    source: list[FiniteFloat] = Field(description="Weights of the estimate for the source model.")
    levels: list[FiniteFloat] = Field(
        min_length=1,
        max_length=64,
        description="Estimates for which `low` and `high` are given; those in between are interpolated.",
    )
    low: list[FiniteFloat] = Field(
        description="Added to the estimate, gives the lower end of its 90% interval. Nine of ten streams in "
        "calibration lay within it."
    )
    high: list[FiniteFloat] = Field(description="Added to the estimate, gives the upper end of its 90% interval.")

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
    """How the model's outputs become confidences and estimated accuracies. Fitted on simulated shifts.

    Confidence is softmax(logits / t) with log t = log temperature + softening * (mean confidence - estimated accuracy),
    both of the stream's recent frames. Without an estimator the estimated accuracy of a stream is
    `intercept + slope * mean confidence`, within [0, 1].
    """

    temperature: float = Field(gt=0, description="Temperature of the adapted parameters' answers.")
    source_temperature: float | None = Field(
        None, gt=0, description="Temperature of the source model's own answers; null: the same as `temperature`."
    )
    softening: FiniteFloat = Field(
        0.0, ge=0, le=100, description="How much the temperature rises if a stream is surer than it is right."
    )
    intercept: float = Field(description="Of the estimated accuracy, if there is no estimator.")
    slope: float = Field(description="Of the estimated accuracy, if there is no estimator.")
    error: float = Field(ge=0, description="Mean absolute error of the estimated accuracy in calibration, as a share.")
    threshold: float = Field(
        0.9, ge=0, le=1, description="Confidence that undisturbed frames exceed as often as they are predicted rightly."
    )
    entropies: list[FiniteFloat] = Field(
        default_factory=list,
        max_length=1_000,
        description="Quantiles of the source model's entropy on undisturbed frames, which the guard compares with.",
    )
    estimator: Estimator | None = Field(
        None, description="Estimates accuracy from more signals than confidence; null: the line above is used."
    )


class Limits(Part):
    """What is normal: all but one in a thousand of the values seen in calibration lie within these limits.

    The guard multiplies some of them by `guard.max_gradient_factor` and `guard.max_distance_factor`.
    """

    raw_gradient_norm: float = Field(gt=0, description="Upper limit of the raw gradient's norm.")
    source_distance: float = Field(gt=0, description="Upper limit of the distance of adapted parameters from source.")
    generated_gradient_norm: float | None = Field(
        None, gt=0, description="Upper limit of the generated gradient's norm."
    )
    cosine: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="Lower limit of the running mean of the cosine between raw and generated gradients.",
    )
    gain_error: float | None = Field(
        None,
        ge=0,
        description="Lead in estimated accuracy above which source answers. In calibration source seemed to lead by "
        "more in one of a hundred windows in which it was not better.",
    )


class FileEntry(Part):
    """Hash and size of a file of the bundle. A worker refuses a bundle whose files differ."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the file.")
    size: int = Field(ge=0, description="Bytes.")


class Manifest(Part):
    """`manifest.json` of a bundle."""

    schema_version: Literal[1] = 1
    name: str = Field(description="Name of the bundle, for people.")
    created_by: str = Field(description="Command that made this bundle.")
    calibrated_by: str = Field(
        "", description="Command that fitted calibration and limits again later; empty if none did."
    )
    model: ModelPart
    method: MethodPart
    preprocess: Preprocess
    calibration: Calibration
    limits: Limits
    files: dict[str, FileEntry] = Field(description="Every other file of the bundle, by name.")

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
