"""The verdict of a bundle: whether to adapt this model, by what was measured when the bundle was made."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Recommendation = Literal["adapt", "adapt with care", "do not adapt"]


class Measured(BaseModel):
    """One held-out shift, or none, and what both models made of the same frames."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    setting: str
    frames: int = Field(ge=1)
    source: float = Field(ge=0, le=1, description="accuracy of the source model")
    adapted: float = Field(ge=0, le=1, description="accuracy of the adapted model, each frame before its own update")
    error: float = Field(ge=0, description="standard error of the difference, over images and cameras drawn")

    @property
    def gain(self) -> float:
        return self.adapted - self.source


class Verdict(BaseModel):
    """verdict.json of a bundle. Accuracies are shares; `gain` is the mean over the shifts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    recommendation: Recommendation
    reasons: list[str]
    truth: Literal["labels", "source"] = Field(
        description="what counts as right: the images' labels, or the source model's answer to the undisturbed image"
    )
    clean_accuracy: float = Field(ge=0, le=1, description="of the source model on held-out images, by their labels")
    gain: float
    gain_error: float = Field(ge=0, description="standard error of `gain`, over images and cameras, not over shifts")
    settings: list[Measured]
    generator: str = Field(description="how the generator was made")
    images: dict[str, int] = Field(description="how many served what; no image served two purposes")
    batch: int = Field(ge=1)
    seed: int
    notes: list[str] = Field(default_factory=list)
