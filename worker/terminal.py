"""What commands that print tables share."""

from __future__ import annotations

import json
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDE = 200  # columns, where the output is no terminal


def terminal() -> Console:
    """The terminal. Where the output is a file or a pipe, it is wide enough to cut nothing off."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def printable(text: str) -> str:
    """The text without what could control a terminal: names, labels and reasons come from outside."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def counted(number: int, noun: str) -> str:
    """A count with its noun: `1 stream`, `2,000 streams`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """A table of names and texts."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, Text(printable(text)))
    return table


def printable_lines(text: str) -> str:
    """The same for a text of several lines, which keeps its line ends."""
    return "\n".join(map(printable, text.split("\n")))


def printable_json(text: str) -> str:
    """The same JSON with all unprintable characters escaped. JSON itself leaves some as they are, such as U+0080 to
    U+009F, which control a terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else json.dumps(letter)[1:-1] for letter in text)
