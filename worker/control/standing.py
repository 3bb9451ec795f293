"""Commands that still hold, for each stream and for all streams: those that no later command has replaced.

A freeze, or a rule of a policy, holds until a command says otherwise, however many others come in between. So it also
holds for a stream that begins much later. Of each rule only the newest command is kept.

Streams come and go, and nothing tells when one is gone for good. So this is kept for a limited number of names. The one
whose last such command is oldest makes room. What its stream has obeyed is in the stream's own state all the same.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

from schemas.command import EVERY_STREAM, Command
from schemas.policy import PolicyChange

EVERYTHING = "*"  # in place of a rule: back to the configuration's policy


class HasCommand(Protocol):
    """Anything that has a command."""

    @property
    def command(self) -> Command:
        """The command."""


Told = TypeVar("Told", bound=HasCommand)


class Standing(Generic[Told]):
    """Per stream at most one command for each rule of a policy, and one that cleared them; for at most `max_names`
    streams, and for all streams together."""

    def __init__(self, max_names: int) -> None:
        self._max_names = max_names
        self._of_all: dict[str, Told] = {}
        # In the order of the last commands. To find the first key, a plain dict would scan past all removed ones.
        self._of: OrderedDict[str, dict[str, Told]] = OrderedDict()

    def add(self, told: Told) -> None:
        """Add the next command. One that does not hold on, such as a reset, is passed over."""
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
        """The commands that still hold for a name, in no order. One command may come twice."""
        return list((self._of_all if stream == EVERY_STREAM else self._of.get(stream, {})).values())


def rules_of(command: Command) -> list[str]:
    """The rules that a command sets; none for commands that are over once obeyed, such as a reset."""
    if command.action in ("freeze", "unfreeze"):
        return ["frozen"]
    if command.action != "policy":
        return []
    changed = (command.policy or PolicyChange()).model_dump(exclude_none=True)
    return list(changed) or [EVERYTHING]
