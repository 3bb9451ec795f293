"""An update event: the audit record of one guard decision."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from schemas.prediction import Parameters

UPDATE_TYPE = "io.driftkeel.update.v1"
MAX_NUMBER = 2**63 - 1  # tables have no room for more
# The first three judge an update that the stream's frames proposed. With the next three the parameters became what they
# were, or what somebody brought. The next four are a person's word; the parameters stay. With the next one they went on
# under another bundle. After the last one nothing is left of the stream; it may begin anew.
Decision = Literal[
    "applied",
    "partial",
    "skipped",
    "rolled_back",
    "reset",
    "imported",
    "approved",
    "frozen",
    "unfrozen",
    "policy",
    "carried",
    "deleted",
]


def _of_a_clock(moment: datetime) -> datetime:
    """In UTC. What reads events, from charts to spreadsheets, has no room around the ends of the calendar."""
    if not 1970 <= moment.year <= 9_000:
        raise ValueError(f"no worker's clock says {moment}")
    return moment.astimezone(UTC)


class Proxies(BaseModel):
    """What the stream looked like without labels, averaged over recent frames."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    estimated_accuracy: float | None = Field(
        None, ge=0, le=1, description="of the parameters that adapt; null where nobody estimates it"
    )
    low: float | None = Field(None, ge=0, le=1, description="lower end of its 90% interval")
    high: float | None = Field(None, ge=0, le=1, description="upper end")
    source_accuracy: float | None = Field(None, ge=0, le=1, description="the same estimate for the source model")
    confidence: float = Field(ge=0, le=1)
    entropy: float = Field(ge=0, description="nats")
    marginal_entropy: float | None = Field(None, ge=0, description="nats, of the mean prediction")
    flip_rate: float | None = Field(None, ge=0, le=1, description="share of predictions that source does not share")


class UpdateEvent(BaseModel):
    """Why a stream's parameters changed, or did not. Consumers deduplicate on `id`.

    Fields that a later version has added are passed over; the chain is one of bytes, and holds.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    schema_version: Literal[1] = 1
    id: str = Field(
        pattern=r"@[1-9][0-9]{0,17}$", description="stream@number, number counting the events of the stream"
    )
    stream: str
    time: Annotated[AwareDatetime, AfterValidator(_of_a_clock)]
    decision: Decision
    reason: str
    frames: list[str] = Field(description="positions of the frames covered")
    step: int = Field(ge=0, le=MAX_NUMBER, description="updates applied, after this decision")
    loss: float | None = Field(None, description="objective before the update; null where it is not finite")
    entropy: float | None = None
    discrepancy: float | None = None
    raw_gradient_norm: float | None = None
    generated_gradient_norm: float | None = None
    cosine: float | None = Field(None, description="between raw and generated gradient")
    source_distance: float | None = Field(None, description="of the norm affine from source, after the decision")
    layers: dict[str, float] = Field(default_factory=dict, description="how far each norm layer moved by the decision")
    flipped: int | None = Field(
        None,
        ge=0,
        le=MAX_NUMBER,
        description="of the frames that source answered too, those it calls otherwise",
    )
    parameters: Parameters = Field("adapted", description="which ones answer for the stream after the decision")
    before: Proxies | None = None
    after: Proxies | None = None
    command: str | None = Field(None, description="id of the command that asked for it")
    previous: str = Field("", description="sha256 of the stream's previous event as published; empty for the first")
    token: int = Field(ge=0, le=MAX_NUMBER)
    bundle: str
    worker: str

    @property
    def number(self) -> int:
        """Which of the stream's events this is; the first is 1."""
        return int(self.id.rsplit("@", 1)[1])


@dataclass(frozen=True)
class SealedEvent:
    """An event and its bytes. Whoever publishes it again sends the same bytes: the next event carries their hash."""

    event: UpdateEvent
    content: bytes

    @property
    def digest(self) -> str:
        """What the stream's next event carries as `previous`."""
        return digest(self.content)


def seal(event: UpdateEvent) -> SealedEvent:
    """The event as it is published and stored."""
    return SealedEvent(event, event.model_dump_json().encode())


def digest(content: bytes) -> str:
    """Of an event's bytes, as the chain carries it."""
    return hashlib.sha256(content).hexdigest()
