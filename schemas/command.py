"""A command to the workers: on the commands topic, keyed by stream or `*` for all."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, model_validator

from schemas.cloud_event import Headers, cloud_event
from schemas.policy import AskedChange

COMMAND_TYPE = "io.driftkeel.command.v1"
EVERY_STREAM = "*"
Action = Literal["freeze", "unfreeze", "reset", "rollback", "approve", "policy"]


class Command(BaseModel):
    """What a person asks a stream to do. It is done once, and an update event with the command's id confirms it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    id: str = Field(
        default_factory=lambda: uuid4().hex,
        min_length=1,
        max_length=64,
        pattern=r"^[\w.:-]+$",
        description="A new one for each command: a second command with the same id is skipped.",
    )
    time: datetime = Field(default_factory=lambda: datetime.now(UTC), description="When the command was given.")
    stream: str = Field(
        min_length=1,
        max_length=1_000,
        description="A stream id, or `*` for every stream. The same as the record's key.",
    )
    action: Action = Field(
        description="`freeze`, `unfreeze`: stop updates, allow them again. `reset`: back to the source model. "
        "`rollback`: back to a snapshot. `approve`: the present parameters become the approved ones. `policy`: change "
        "rules."
    )
    snapshot: int = Field(
        1, ge=1, le=1_000, description="Only for `rollback`: which snapshot to go back to. 1 is the newest."
    )
    policy: AskedChange | None = Field(
        None, description="Only for `policy`: the rules to change. Rules that are not named stay as they are."
    )
    by: str = Field("", max_length=200, description="Who asks, for the audit trail.")
    reason: str = Field("", max_length=1_000, description="Why, for the audit trail.")

    @model_validator(mode="after")
    def _policy_where_asked(self) -> Command:
        if (self.action == "policy") != (self.policy is not None):
            raise ValueError("'policy' belongs to the action policy, and to no other")
        return self


def encode_command(command: Command) -> bytes:
    """The command's bytes for the topic, without what it does not say: workers of an earlier version refuse a field
    that they do not know, also where it is null."""
    return command.model_dump_json(exclude_none=True).encode()


def command_headers(command: Command, sender: str) -> Headers:
    """What its record says beside it; `sender` is the program that a person used."""
    return cloud_event(COMMAND_TYPE, f"driftkeel/{sender}", command.id, command.time)
