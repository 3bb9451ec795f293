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
    """Something that a person wants done to a stream. It is done once, and an update event with its id says so."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    id: str = Field(default_factory=lambda: uuid4().hex, min_length=1, max_length=64, pattern=r"^[\w.:-]+$")
    time: datetime = Field(default_factory=lambda: datetime.now(UTC))
    stream: str = Field(min_length=1, max_length=1_000, description="a stream id, or * for every stream")
    action: Action
    snapshot: int = Field(1, ge=1, le=1_000, description="rollback: how many snapshots back; 1 is the newest")
    policy: AskedChange | None = Field(None, description="policy: what shall hold from now on")
    by: str = Field("", max_length=200, description="who asks")
    reason: str = Field("", max_length=1_000)

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
