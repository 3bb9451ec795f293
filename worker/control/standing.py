"""What stands of commands: for each stream, and for all of them, those that nothing later has overtaken.

A freeze or a rule of a policy holds until the same is said again, however many commands come in between; so it also
holds for a stream that begins much later. Each rule is kept once, the newest.

Names come and go, and nobody says when one has gone. So what stands is kept of so many names: the one that was told
nothing of this kind for longest makes room. What its stream has obeyed stands in the stream's own state all the same.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

from schemas.command import EVERY_STREAM, Command
from schemas.policy import PolicyChange

EVERYTHING = "*"  # in place of a rule: back to the configuration's policy


class HasCommand(Protocol):
    """A command, and whatever is known of it besides."""

    @property
    def command(self) -> Command:
        """The command."""


Told = TypeVar("Told", bound=HasCommand)


class Standing(Generic[Told]):
    """Per stream, at most one command for each rule that a policy has, and one that cleared them. There are at most
    `max_names` streams, and all of them together."""

    def __init__(self, max_names: int) -> None:
        self._max_names = max_names
        self._of_all: dict[str, Told] = {}
        # Who was told something last comes last. A plain dict would look for its first key past all that have gone.
        self._of: OrderedDict[str, dict[str, Told]] = OrderedDict()

    def add(self, told: Told) -> None:
        """The next in order. What does not stand is passed over."""
        stream, rules = told.command.stream, rules_of(told.command)
        if not rules:
            return
        of = self._of_all if stream == EVERY_STREAM else self._of.pop(stream, {})
        if EVERYTHING in rules:
            of.clear()
        of.update(dict.fromkeys(rules, told))
        if stream != EVERY_STREAM:
            self._of[stream] = of
        if len(self._of) > self._max_names:
            self._of.popitem(last=False)

    def of(self, stream: str) -> list[Told]:
        """What stands for a name, in no order; one command may come twice."""
        return list((self._of_all if stream == EVERY_STREAM else self._of.get(stream, {})).values())


def rules_of(command: Command) -> list[str]:
    """The rules that a command sets; none where it passes, as a reset does."""
    if command.action in ("freeze", "unfreeze"):
        return ["frozen"]
    if command.action != "policy":
        return []
    changed = (command.policy or PolicyChange()).model_dump(exclude_none=True)
    return list(changed) or [EVERYTHING]
