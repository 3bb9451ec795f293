"""All that is stored of a stream but its tensors: a header, and what is said of each snapshot, as JSON.

The tensors are in `schemas.state_tensors`. Who only looks at streams does not need those, nor torch, which takes
seconds to load.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError

from schemas.errors import StateError, mistakes
from schemas.frame import Position
from schemas.policy import PolicyChange
from schemas.update import Proxies, SealedEvent, UpdateEvent, seal

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
    signals: dict[str, FiniteFloat] = Field(default_factory=dict, max_length=64, description="of meta.proxies")
    generated: Count = Field(0, description="frames that made an update, on which the generator's signals rest")
    shadowed: Count = Field(0, description="frames that the source model has answered too")
    shadowed_at: Count | None = Field(None, description="of `frames`, when it did last; null: not known")
    accuracy: float | None = Field(None, ge=0, le=1, description="as estimated from the signals")
    low: float | None = Field(None, ge=0, le=1)
    high: float | None = Field(None, ge=0, le=1)
    source_accuracy: float | None = Field(None, ge=0, le=1)


class Level(Stored):
    """A robust running level of a positive signal: centre and spread of its logarithm."""

    seen: Count = 0
    centre: FiniteFloat = 0.0
    spread: FiniteFloat = Field(0.0, ge=0, description="mean absolute deviation")


class GuardState(Stored):
    """What the guard knows of a stream."""

    gradient: Level = Field(default_factory=Level, description="of the raw gradient's norm")
    update: Level = Field(default_factory=Level, description="of the generated gradient's norm")
    cosine: FiniteFloat = Field(0.0, ge=-1.01, le=1.01, description="running mean, between raw and generated gradient")
    cosines: Count = Field(0, description="updates it rests on")
    wealth: FiniteFloat = Field(
        0.0, description="logarithm, of the bet that the stream is not what source was made for"
    )
    stake: FiniteFloat = Field(0.0, description="what the next bet stakes")
    slopes: FiniteFloat = Field(0.0, ge=0, description="squared slopes of the bets so far")
    alarms: Count = Field(0, description="times that the bet was won")
    shifted: bool = Field(False, description="whether it was won, and the stream has not come back since")
    watchful: Count = Field(0, description="frames that source is still to answer in full")
    recent: list[int] = Field(default_factory=list, max_length=64, description="checksums of the newest frames' pixels")
    dominant: int = Field(-1, ge=-1, description="class that fills the newest frames; -1: none does")
    alike: Count = Field(0, description="frames in a row that one class fills")
    trusted: bool = Field(True, description="whether the adapted parameters are believed to do no worse than source")
    doubted: Count = Field(0, description="frames since that changed to no")
    rest: Count = Field(0, description="frames to go before updates begin again after a reset")
    resets: Count = Field(0, description="recent resets; each doubles the rest")
    sound: Count = Field(0, description="frames since the last reset")


class DriftWatch(Stored):
    """What drift detection knows of a stream; the lists have one value per signal."""

    adapting: bool = Field(True, description="whether the stream is new, or has moved and not settled yet")
    seen: int = Field(0, ge=0, description="micro-batches since that changed")
    rested: int = Field(0, ge=0, description="and since the last one that adapted")
    mean: list[float] = Field(default_factory=list, description="of the signals where the stream settled")
    variance: list[float] = Field(default_factory=list)
    rise: list[float] = Field(default_factory=list, description="cumulative sums upwards")
    fall: list[float] = Field(default_factory=list, description="and downwards")


class HourlyUpdates(Stored):
    """Updates applied within one hour of the clock."""

    hour: int = Field(0, ge=0, description="hours since the epoch")
    updates: int = Field(0, ge=0)

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
    """All of a stream's state but its tensors."""

    version: Literal[1] = FORMAT_VERSION
    stream: str
    bundle: str = Field(max_length=200, description="content hash; tensors fit this bundle only")
    method: str = Field(max_length=200)
    positions: dict[str, Offset] = Field(
        default_factory=dict, description="newest offset folded in, per topic/partition"
    )
    frames: Count = Field(0, description="frames folded in")
    step: Count = Field(0, description="updates applied since the source model")
    events: Count = Field(0, description="update events so far")
    folded: Digest = Field("", description="rolling hash of the positions folded in, in order")
    proxies: RunningProxies = Field(default_factory=RunningProxies)
    guard: GuardState = Field(default_factory=GuardState)
    drift: DriftWatch | None = Field(None, description="null where nothing watches, and for a new stream")
    last_event: Digest = Field("", description="sha256 of the last update event as published")
    commands: dict[str, Offset] = Field(default_factory=dict, description="newest command obeyed, per topic/partition")
    policy: StoredChange | None = Field(None, description="what commands have changed of the stream's policy")
    approved: Count | None = Field(None, description="step of the parameters that a person approved")
    snapshot: Count = Field(0, description="step at which the newest snapshot was taken")
    lately: HourlyUpdates = Field(default_factory=HourlyUpdates)
    probation: Count = Field(0, description="frames that source answers yet, after a change of bundle")

    def has_folded(self, position: Position) -> bool:
        """Whether the frame at `position` has shaped this state already."""
        return position.offset <= self.positions.get(position.log, -1)

    def next_event(self, **said: Any) -> SealedEvent:
        """The stream's next event, with what it says: its number and its chain go on from this header."""
        number, now = f"{self.stream}@{self.events + 1}", datetime.now(UTC)
        return seal(UpdateEvent(id=number, stream=self.stream, time=now, previous=self.last_event, **said))

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
