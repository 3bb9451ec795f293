"""What stands of commands: for each stream, and for all of them, those that nothing later has overtaken.

A freeze or a rule of a policy holds until the same is said again, however many commands come in between; so it also
holds for a stream that begins much later. Each rule is kept once, the newest.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from schemas.command import Command
from schemas.policy import PolicyChange

EVERYTHING = "*"  # in place of a rule: back to the configuration's policy


class HasCommand(Protocol):
    """A command, and whatever is known of it besides."""

    @property
    def command(self) -> Command:
        """The command."""


Told = TypeVar("Told", bound=HasCommand)


class Standing(Generic[Told]):
    """Per stream, at most one command for each rule that a policy has, and one that cleared them."""

    def __init__(self) -> None:
        self._of: dict[str, dict[str, Told]] = {}

    def add(self, told: Told) -> None:
        """The next in order. What does not stand is passed over."""
        rules = rules_of(told.command)
        if EVERYTHING in rules:
            self._of[told.command.stream] = {}
        for rule in rules:
            self._of.setdefault(told.command.stream, {})[rule] = told

    def of(self, stream: str) -> list[Told]:
        """What stands for a name, in no order; one command may come twice."""
        return list(self._of.get(stream, {}).values())


def rules_of(command: Command) -> list[str]:
    """The rules that a command sets; none where it passes, as a reset does."""
    if command.action in ("freeze", "unfreeze"):
        return ["frozen"]
    if command.action != "policy":
        return []
    changed = (command.policy or PolicyChange()).model_dump(exclude_none=True)
    return list(changed) or [EVERYTHING]
