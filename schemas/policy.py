"""What a stream may do: which parameters answer, when it may update, and how often."""

from __future__ import annotations

import re
from datetime import datetime, time
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

Mode = Literal["auto", "shadow", "canary", "approve"]
MOST_SPANS = 24  # a policy of its own lies in each header of a stream
SPAN = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


def _are_spans(spans: tuple[str, ...]) -> tuple[str, ...]:
    for span in spans:
        if not SPAN.fullmatch(span):
            raise ValueError(f"{span!r} is not a span such as 22:00-06:00")
    return spans


class Policy(BaseModel):
    """The rules of one stream."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode = Field(
        "auto",
        description="Which parameters answer. The stream adapts in every mode. `auto`: the adapted ones while the "
        "guard trusts them, otherwise source. `shadow`: source; the adapted ones are only reported, for a first trial. "
        "`canary`: as `auto` for `canary_share` of the streams, source for the others. `approve`: the ones that a "
        "person approved last, source before the first approval.",
    )
    canary_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="With mode `canary`, the share of streams that the adapted parameters answer. A hash of the names "
        "chooses them, so a larger share keeps those of a smaller one. 0: none. 1: all.",
    )
    max_updates_per_hour: int = Field(
        0,
        ge=0,
        description="Most updates of a stream in one hour of the clock. Further frames are predicted, and the stream "
        "learns nothing from them. 0: no limit.",
    )
    quiet_hours: tuple[str, ...] = Field(
        (),
        max_length=MOST_SPANS,
        description="Times of day in UTC without updates, such as `22:00-06:00`, by the worker's clock. Frames are "
        "still predicted.",
    )
    frozen: bool = Field(
        False,
        description="true: no updates at all. The parameters stay as they are, and frames are predicted with them.",
    )

    @field_validator("quiet_hours")
    @classmethod
    def _spans(cls, spans: tuple[str, ...]) -> tuple[str, ...]:
        for span in _are_spans(spans):
            begin, end = span.split("-")
            if begin == end:
                raise ValueError(f"{span!r} ends where it begins; for the whole day write 00:00-12:00 and 12:00-00:00")
        return spans

    def is_quiet(self, moment: datetime) -> bool:
        """Whether `moment` (UTC) lies in a quiet span; a span may reach over midnight."""
        now = moment.time()
        for span in self.quiet_hours:
            begin, end = (time.fromisoformat(part) for part in span.split("-"))
            inside = begin <= now < end if begin <= end else now >= begin or now < end
            if inside:
                return True
        return False


class PolicyChange(BaseModel):
    """Changes of a policy. A rule that is null or missing stays as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode | None = Field(None, description="Which parameters answer: `auto`, `shadow`, `canary` or `approve`.")
    canary_share: float | None = Field(
        None, ge=0, le=1, description="With mode `canary`, the share of streams that the adapted parameters answer."
    )
    max_updates_per_hour: int | None = Field(
        None, ge=0, description="Most updates of a stream in one hour of the clock. 0: no limit."
    )
    quiet_hours: tuple[str, ...] | None = Field(
        None, description="Times of day in UTC without updates, such as `22:00-06:00`. An empty list: none."
    )
    frozen: bool | None = Field(None, description="true: no updates at all. false: updates again.")

    @field_validator("quiet_hours")
    @classmethod
    def _spans(cls, spans: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return _are_spans(spans) if spans is not None else None

    def over(self, policy: Policy) -> Policy:
        """`policy` with these rules changed."""
        return policy.model_copy(update=self.model_dump(exclude_none=True))

    def in_words(self) -> str:
        """The rules that it changes, such as `mode=shadow, quiet_hours=22:00-06:00`."""
        return ", ".join(f"{name}={_brief(value)}" for name, value in self.model_dump(exclude_none=True).items())


def _brief(value: object) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple | list) else str(value)


def _makes_a_policy(change: PolicyChange) -> PolicyChange:
    Policy.model_validate(change.model_dump(exclude_none=True))
    return change


# A change that somebody asks for now. What is stored of earlier ones is not held to rules that came later.
AskedChange = Annotated[PolicyChange, AfterValidator(_makes_a_policy)]
