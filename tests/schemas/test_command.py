import json

from schemas.command import Command, encode_command
from schemas.policy import PolicyChange


def test_what_a_command_does_not_say_is_not_sent() -> None:
    """A worker of an earlier version would refuse a field that it does not know, also where it is null."""

    class LaterChange(PolicyChange):
        later_rule: int | None = None

    class LaterCommand(Command):
        later_field: str | None = None
        policy: LaterChange | None = None

    command = LaterCommand(stream="cam", action="policy", policy=LaterChange(frozen=True))
    content = encode_command(command)
    assert Command.model_validate_json(content).policy == PolicyChange(frozen=True)
    assert json.loads(content)["schema_version"] == 1
