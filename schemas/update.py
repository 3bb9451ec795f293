"""An update event: the audit record of one guard decision."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

UPDATE_TYPE = "io.driftkeel.update.v1"
Decision = Literal["applied", "skipped", "reset", "rolled_back", "imported"]


class Proxies(BaseModel):
    """What the stream looked like without labels, averaged over recent frames."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    estimated_accuracy: float = Field(ge=0, le=1)
    confidence: float = Field(ge=0, le=1)
    entropy: float = Field(ge=0, description="nats")


class UpdateEvent(BaseModel):
    """Why a stream's parameters changed, or did not. Consumers deduplicate on `id`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    id: str = Field(description="stream@number, number counting the events of the stream")
    stream: str
    time: datetime
    decision: Decision
    reason: str
    frames: list[str] = Field(description="positions of the frames covered")
    step: int = Field(ge=0, description="updates applied, after this decision")
    loss: float | None = Field(None, description="objective before the update; null where it is not finite")
    entropy: float | None = None
    discrepancy: float | None = None
    raw_gradient_norm: float | None = None
    generated_gradient_norm: float | None = None
    cosine: float | None = Field(None, description="between raw and generated gradient")
    source_distance: float | None = Field(None, description="of the norm affine from source, after the decision")
    before: Proxies | None = None
    after: Proxies | None = None
    token: int = Field(ge=0)
    bundle: str
    worker: str
