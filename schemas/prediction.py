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
    """One of the most likely classes."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    index: int = Field(ge=0)
    label: str
    confidence: float = Field(ge=0, le=1)


class Prediction(BaseModel):
    """What the worker says of one frame. Consumers deduplicate on `id`, and pass over fields that they do not know."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    schema_version: Literal[1] = 1
    id: str = Field(description="topic/partition/offset of the frame")
    stream: str
    event_time: Annotated[AwareDatetime, AfterValidator(_within_years)]
    index: int = Field(ge=0, description="class index")
    label: str
    confidence: float = Field(ge=0, le=1, description="calibrated probability of the class")
    top: list[ClassScore]
    source_index: int | None = Field(
        None, ge=0, description="class that source gives the frame, where it was asked too"
    )
    source_label: str | None = None
    bundle: str = Field(description="content hash of the bundle")
    step: int = Field(ge=0, description="updates that the stream's parameters had seen; 0 is the source model")
    parameters: Parameters = Field(description="which ones answered")
    estimated_accuracy: float | None = Field(
        None, ge=0, le=1, description="of the answers now, as estimated without labels; null where nobody estimates it"
    )
    worker: str
    wait_seconds: float = Field(ge=0, description="from the frame's arrival to its pass, as far as the worker can tell")
    pass_seconds: float = Field(ge=0, description="decode to logits, of the whole pass")
