"""A prediction as it leaves: one per frame."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from schemas.frame import YEARS

PREDICTION_TYPE = "io.driftkeel.prediction.v1"
Parameters = Literal["source", "adapted", "approved"]


def _within_years(moment: datetime) -> datetime:
    if not YEARS[0] <= moment.year <= YEARS[1]:
        raise ValueError(f"not every zone has a name for {moment}")
    return moment


class ClassScore(BaseModel):
    """One of the most likely classes of a frame."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    index: int = Field(ge=0, description="Index of the class.")
    label: str = Field(description="Name of the class.")
    confidence: float = Field(ge=0, le=1, description="Calibrated probability of the class.")


class Prediction(BaseModel):
    """The worker's answer to one frame. It may come twice: deduplicate on `id`. Ignore fields that you do not know."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    schema_version: Literal[1] = 1
    id: str = Field(description="Position of the frame: topic/partition/offset.")
    stream: str = Field(description="Stream id: the key of the frame's record.")
    event_time: Annotated[AwareDatetime, AfterValidator(_within_years)] = Field(
        description="When the frame was taken: its header `ce_time`, or the record's timestamp."
    )
    index: int = Field(ge=0, description="Index of the answered class.")
    label: str = Field(description="Name of the answered class.")
    confidence: float = Field(ge=0, le=1, description="Calibrated probability that the answer is right.")
    top: list[ClassScore] = Field(description="The most likely classes, best first.")
    source_index: int | None = Field(
        None, ge=0, description="Class index that the source model gives the frame; null if it was not asked."
    )
    source_label: str | None = Field(
        None, description="Name of the class that the source model gives the frame; null if it was not asked."
    )
    bundle: str = Field(description="Content hash of the worker's bundle.")
    step: int = Field(
        ge=0,
        description="Updates that the answering parameters had seen since the source model; 0 is the source model.",
    )
    parameters: Parameters = Field(
        description="Which parameters answered: `source`, `adapted`, or `approved` by a person."
    )
    estimated_accuracy: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Accuracy of the stream's answers now, estimated without labels; null if there is no estimate.",
    )
    worker: str = Field(description="Name of the worker that answered.")
    wait_seconds: float = Field(ge=0, description="Seconds from the frame's arrival at the worker to its pass.")
    pass_seconds: float = Field(
        ge=0,
        description="Seconds that the model's forward pass took, for all frames that shared it, without decoding.",
    )
