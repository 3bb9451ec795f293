"""An update event: the audit record of one guard decision."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Literal, TypedDict

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
    """Signs of how well a stream does, without labels, averaged over recent frames."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    estimated_accuracy: float | None = Field(
        None, ge=0, le=1, description="Estimated accuracy of the adapted parameters; null if there is no estimate."
    )
    low: float | None = Field(None, ge=0, le=1, description="Lower end of the estimate's 90% interval.")
    high: float | None = Field(None, ge=0, le=1, description="Upper end of the estimate's 90% interval.")
    source_accuracy: float | None = Field(
        None, ge=0, le=1, description="Estimated accuracy of the source model on the same frames."
    )
    confidence: float = Field(ge=0, le=1, description="Mean calibrated confidence of the answers.")
    entropy: float = Field(ge=0, description="Mean entropy of the predictions, in nats. High: the model is unsure.")
    marginal_entropy: float | None = Field(
        None,
        ge=0,
        description="Entropy of the mean prediction, in nats. Near 0: nearly all answers are of one class.",
    )
    flip_rate: float | None = Field(
        None, ge=0, le=1, description="Share of the predictions for which the source model gives another class."
    )


class UpdateEvent(BaseModel):
    """Why a stream's parameters changed, or did not. It may come twice: deduplicate on `id`.

    Ignore fields that you do not know. Later versions may add some; the hash chain covers the bytes as published, so it
    holds all the same.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    schema_version: Literal[1] = 1
    id: str = Field(
        pattern=r"@[1-9][0-9]{0,17}$",
        description="stream@number. The numbers count the events of the stream from 1 and have no gaps.",
    )
    stream: str = Field(description="Stream id.")
    time: Annotated[AwareDatetime, AfterValidator(_of_a_clock)] = Field(
        description="When it was decided, by the worker's clock."
    )
    decision: Decision = Field(
        description="`applied`, `partial`, `skipped`: the proposed update was applied whole, shrunk, or not at all. "
        "`rolled_back`, `reset`, `imported`: the parameters were replaced by a snapshot, by source, or from a file. "
        "`approved`, `frozen`, `unfrozen`, `policy`: a person's command was carried out. `carried`: the parameters "
        "continue under another bundle. `deleted`: the stream was deleted."
    )
    reason: str = Field(description="Why, in words, with the numbers and limits that decided.")
    frames: list[str] = Field(description="Positions of the frames that it covers, as topic/partition/offset.")
    step: int = Field(
        ge=0, le=MAX_NUMBER, description="Updates that the stream's parameters have seen, after this decision."
    )
    loss: float | None = Field(
        None, description="Objective before the proposed update; null if there was none, or it is not finite."
    )
    entropy: float | None = Field(None, description="Part of the loss: entropy of the predictions.")
    discrepancy: float | None = Field(
        None, description="Part of the loss: distance of the features' statistics from those of the source data."
    )
    raw_gradient_norm: float | None = Field(None, description="Norm of the unsupervised gradient.")
    generated_gradient_norm: float | None = Field(
        None, description="Norm of the gradient that the generator made of it."
    )
    cosine: float | None = Field(
        None, description="Cosine between the two gradients: 1 is the same direction, below 0 the opposite one."
    )
    source_distance: float | None = Field(
        None, description="How far the stream's norm parameters are from source, after the decision."
    )
    layers: dict[str, float] = Field(
        default_factory=dict, description="How far the decision moved each normalisation layer."
    )
    flipped: int | None = Field(
        None,
        ge=0,
        le=MAX_NUMBER,
        description="How many of the frames got another class from the source model; null if it was not asked.",
    )
    parameters: Parameters = Field("adapted", description="Which parameters answer for the stream after the decision.")
    before: Proxies | None = Field(None, description="How the stream did before the decision.")
    after: Proxies | None = Field(None, description="How the stream did after the decision.")
    command: str | None = Field(None, description="Id of the command that asked for it; null if the guard decided.")
    previous: str = Field(
        "", description="SHA-256 of the stream's previous event, as published; empty for the first event."
    )
    token: int = Field(
        ge=0, le=MAX_NUMBER, description="Number of the claim under which the event was written. Claims only grow."
    )
    bundle: str = Field(description="Content hash of the bundle that was in use.")
    worker: str = Field(description="Name of the worker or program that wrote the event.")

    @property
    def number(self) -> int:
        """Which of the stream's events this is; the first is 1."""
        return int(self.id.rsplit("@", 1)[1])


class PlaceInChain(TypedDict):
    """The fields of an `UpdateEvent` that follow from the stream's event before it."""

    id: str
    stream: str
    time: datetime
    previous: str


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
