"""All that is stored of a stream but its tensors: a header, and what is said of each snapshot, as JSON.

The tensors are in `schemas.state_tensors`. Who only looks at streams does not need those, nor torch, which takes
seconds to load.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError

from schemas.errors import StateError, mistakes
from schemas.frame import Position
from schemas.policy import PolicyChange
from schemas.update import PlaceInChain, Proxies, SealedEvent

FORMAT_VERSION: Final = 1
HOUR_S: Final = 3_600
MAX_COUNT: Final = 10**15
MAX_HEADER_BYTES: Final = 256 << 10  # some 2 KB; parts of it go into events, which have to fit their topic
MAX_EVENTS_BYTES: Final = 4 << 20  # that lie beside a stream's state; some KB, and eight times as much once parsed
# Counts and hashes go into events and metrics, which have no room for others.
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Digest = Annotated[str, Field(max_length=64)]
Offset = Annotated[int, Field(lt=2**63)]


class Stored(BaseModel):
    """A part of a stored state. Fields that a later version has added are passed over, and gone with the next write:
    while two versions run side by side, or one goes back, no stream loses more than these."""

    model_config = ConfigDict(extra="ignore")


class RunningProxies(Stored):
    """Exponential means over the stream's recent frames, and how many frames they rest on."""

    frames: Count = 0
    confidence: float = Field(0.0, ge=0, le=1)
    entropy: float = Field(0.0, ge=0)
    signals: dict[str, FiniteFloat] = Field(
        default_factory=dict, max_length=64, description="Running means of the signals of `meta.proxies`."
    )
    generated: Count = Field(0, description="Frames that made an update. The generator's signals are means over these.")
    shadowed: Count = Field(0, description="Frames that the source model has answered too.")
    shadowed_at: Count | None = Field(
        None, description="Value of `frames` when the source model last answered; null: not known."
    )
    accuracy: float | None = Field(None, ge=0, le=1, description="Accuracy, estimated from the signals.")
    low: float | None = Field(None, ge=0, le=1, description="Lower end of the estimate's 90% interval.")
    high: float | None = Field(None, ge=0, le=1, description="Upper end of the estimate's 90% interval.")
    source_accuracy: float | None = Field(None, ge=0, le=1, description="Estimated accuracy of the source model.")


class Level(Stored):
    """A robust running level of a positive signal: centre and spread of its logarithm."""

    seen: Count = 0
    centre: FiniteFloat = 0.0
    spread: FiniteFloat = Field(0.0, ge=0, description="Mean absolute deviation of the logarithm from `centre`.")


class GuardState(Stored):
    """What the guard knows of a stream."""

    gradient: Level = Field(default_factory=Level, description="Usual norm of the raw gradient.")
    update: Level = Field(default_factory=Level, description="Usual norm of the generated gradient.")
    cosine: FiniteFloat = Field(
        0.0, ge=-1.01, le=1.01, description="Running mean of the cosine between raw and generated gradient."
    )
    cosines: Count = Field(0, description="Updates that `cosine` is a mean of.")
    wealth: FiniteFloat = Field(
        0.0,
        description="Drift alarm: logarithm of the wealth of the bet that source is less sure than on clean frames.",
    )
    stake: FiniteFloat = Field(0.0, description="Drift alarm: stake of the next bet.")
    slopes: FiniteFloat = Field(0.0, ge=0, description="Drift alarm: sum of the squared slopes of the bets so far.")
    alarms: Count = Field(0, description="How often the drift alarm has gone off.")
    shifted: bool = Field(
        False, description="Whether the drift alarm has gone off, and the stream has not come back since."
    )
    watchful: Count = Field(0, description="Frames that source is still to answer beside the stream, all of them.")
    recent: list[int] = Field(
        default_factory=list, max_length=64, description="Checksums of the newest frames' pixels."
    )
    dominant: int = Field(-1, ge=-1, description="Class that fills the newest frames; -1: none does.")
    alike: Count = Field(0, description="Frames in a row that are nearly all of the class `dominant`.")
    trusted: bool = Field(
        True, description="Whether the guard believes that the adapted parameters are no worse than source."
    )
    doubted: Count = Field(0, description="Frames since the guard lost this trust.")
    rest: Count = Field(0, description="Frames to go before updates begin again, after the stream went back.")
    resets: Count = Field(0, description="How often the stream went back lately. Each time doubles the rest.")
    sound: Count = Field(0, description="Frames since the stream last went back.")


class DriftWatch(Stored):
    """What drift detection knows of a stream; the lists have one value per signal."""

    adapting: bool = Field(True, description="Whether the stream is new, or has moved and not settled yet.")
    seen: int = Field(0, ge=0, description="Micro-batches since `adapting` changed.")
    rested: int = Field(0, ge=0, description="Micro-batches since the last one that made an update.")
    mean: list[float] = Field(default_factory=list, description="Mean of each signal.")
    variance: list[float] = Field(default_factory=list, description="Variance of each signal.")
    rise: list[float] = Field(default_factory=list, description="Cumulative sum of what lies above the mean.")
    fall: list[float] = Field(default_factory=list, description="Cumulative sum of what lies below the mean.")


class HourlyUpdates(Stored):
    """Updates applied within one hour of the clock."""

    hour: int = Field(0, ge=0, description="Which hour, counted since the epoch.")
    updates: int = Field(0, ge=0, description="Updates applied in that hour.")

    def within(self, now: float) -> int:
        """How many in the hour of `now` (seconds since the epoch)."""
        return self.updates if self.hour == int(now // HOUR_S) else 0

    def and_one(self, now: float) -> HourlyUpdates:
        """With one more at `now`."""
        return HourlyUpdates(hour=int(now // HOUR_S), updates=self.within(now) + 1)


def _but_unsaid(rules: object) -> object:
    return {name: value for name, value in rules.items() if value is not None} if isinstance(rules, dict) else rules


# A header says of every rule that its writer knew whether it was changed. One that a later version has added and nobody
# has set changes nothing; only one that is set cannot be passed over.
StoredChange = Annotated[PolicyChange, BeforeValidator(_but_unsaid)]


class StreamHeader(Stored):
    """A stream's state without its tensors."""

    version: Literal[1] = FORMAT_VERSION
    stream: str
    bundle: str = Field(max_length=200, description="Content hash of the bundle. The tensors fit this bundle only.")
    method: str = Field(max_length=200, description="Name of the method that updates the tensors.")
    positions: dict[str, Offset] = Field(
        default_factory=dict, description="Offset of the newest frame folded in, for each topic/partition."
    )
    frames: Count = Field(0, description="Frames folded in.")
    step: Count = Field(0, description="Updates that the parameters have seen since the source model.")
    events: Count = Field(0, description="Update events so far.")
    folded: Digest = Field("", description="Rolling hash of the positions folded in, in order.")
    proxies: RunningProxies = Field(default_factory=RunningProxies)
    guard: GuardState = Field(default_factory=GuardState)
    drift: DriftWatch | None = Field(
        None, description="State of drift detection; null if it is off, and for a new stream."
    )
    last_event: Digest = Field("", description="SHA-256 of the last update event, as published.")
    commands: dict[str, Offset] = Field(
        default_factory=dict, description="Offset of the newest command obeyed, for each topic/partition."
    )
    policy: StoredChange | None = Field(None, description="What commands have changed in the stream's policy.")
    approved: Count | None = Field(None, description="Step of the parameters that a person approved; null: none.")
    snapshot: Count = Field(0, description="Step at which the newest snapshot was taken.")
    lately: HourlyUpdates = Field(default_factory=HourlyUpdates)
    probation: Count = Field(0, description="Frames that source still answers first, after a change of bundle.")

    def has_folded(self, position: Position) -> bool:
        """Whether the frame at `position` has shaped this state already."""
        return position.offset <= self.positions.get(position.log, -1)

    def next_in_chain(self) -> PlaceInChain:
        """The fields by which the stream's next update event continues its numbers and its chain of hashes."""
        number, now = f"{self.stream}@{self.events + 1}", datetime.now(UTC)
        return {"id": number, "stream": self.stream, "time": now, "previous": self.last_event}

    def behind(self, last: SealedEvent) -> StreamHeader:
        """The header once `last` is the stream's last event."""
        return self.model_copy(update={"events": last.event.number, "last_event": last.digest})


class Snapshot(Stored):
    """What is kept beside the tensors of a state that a stream may return to."""

    model_config = ConfigDict(frozen=True)

    time: datetime
    reason: str
    proxies: Proxies | None = None
    header: StreamHeader


def encode_header(header: StreamHeader) -> bytes:
    """The header's bytes for the store."""
    return header.model_dump_json().encode()


def read_snapshot(content: bytes) -> Snapshot:
    """What `Snapshot.model_dump_json` wrote. Raises StateError."""
    try:
        return Snapshot.model_validate_json(content)
    except ValidationError as error:
        raise StateError(f"a stored snapshot cannot be read: {mistakes(error)[0][1]}") from error


def decode_header(header: bytes) -> StreamHeader:
    """The header alone. Raises StateError."""
    if not header or len(header) > MAX_HEADER_BYTES:
        raise StateError(f"the header of the stored state is empty or has more than {MAX_HEADER_BYTES} bytes")
    try:
        content = json.loads(header)
        version = content.get("version")
    except (ValueError, AttributeError, RecursionError) as error:
        raise StateError(f"the stored bytes are no stream state: {error}") from error
    check_version(version)
    try:
        return StreamHeader.model_validate_json(header)  # Parsed again, because what it takes for text is text.
    except ValidationError as error:
        where, words = mistakes(error)[0]
        raise StateError(f"the header of the stored state is wrong{where and f' at {where}'}: {words}") from error


def check_version(version: object) -> None:
    """Of a header, or of tensors. Raises StateError for any but ours."""
    if version != FORMAT_VERSION:
        raise StateError(
            f"the stored state has format version {version!r}, this worker knows {FORMAT_VERSION}; "
            "run the worker version that wrote it, or reset the stream"
        )
