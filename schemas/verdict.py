"""The verdict of a bundle: whether to adapt this model, by what was measured when the bundle was made."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Recommendation = Literal["adapt", "adapt with care", "do not adapt"]


class Measured(BaseModel):
    """Accuracy of the source model and of the adapted model on the same frames, under one held-out shift or none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    setting: str = Field(description="Name of the shift.")
    frames: int = Field(ge=1, description="How many frames were measured.")
    source: float = Field(ge=0, le=1, description="Accuracy of the source model.")
    adapted: float = Field(
        ge=0, le=1, description="Accuracy of the adapted model. Each frame is predicted before its own update."
    )
    error: float = Field(ge=0, description="Standard error of the difference, over the images and cameras drawn.")

    @property
    def gain(self) -> float:
        return self.adapted - self.source


class Verdict(BaseModel):
    """`verdict.json` of a bundle: whether to adapt this model, and the measurements that say so."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    recommendation: Recommendation = Field(description="Whether to adapt this model in production.")
    reasons: list[str] = Field(description="Why, a sentence each.")
    truth: Literal["labels", "source"] = Field(
        description="What counts as right: `labels`, the images' labels; `source`, the source model's answer to the "
        "undisturbed image, where there are no labels."
    )
    clean_accuracy: float = Field(
        ge=0, le=1, description="Accuracy of the source model on undisturbed held-out images, by their labels."
    )
    gain: float = Field(
        description="Accuracy of the adapted model minus that of the source model, as a share: mean over the shifts."
    )
    gain_error: float = Field(
        ge=0, description="Standard error of `gain`, over images and cameras. How much shifts differ is not in it."
    )
    settings: list[Measured] = Field(description="What was measured, shift by shift.")
    generator: str = Field(description="How the generator was made.")
    images: dict[str, int] = Field(description="How many images served which purpose. No image served two.")
    batch: int = Field(ge=1, description="Frames of one update in the measurement.")
    seed: int = Field(description="Seed of the measurement.")
    notes: list[str] = Field(default_factory=list, description="What else is worth knowing, a sentence each.")
