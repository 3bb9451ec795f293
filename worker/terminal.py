"""What commands that print tables share."""

from __future__ import annotations

from rich.console import Console

WIDE = 200  # columns, where the output is no terminal


def terminal() -> Console:
    """The terminal; where the output is a file or a pipe, one that cuts nothing off."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def printable(text: str) -> str:
    """Names, labels and reasons come from outside: nothing in them may steer the terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
