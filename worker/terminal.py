"""What commands that print tables share."""

from __future__ import annotations

import json
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDE = 200  # columns, where the output is no terminal


def terminal() -> Console:
    """The terminal; where the output is a file or a pipe, one that cuts nothing off."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def printable(text: str) -> str:
    """Names, labels and reasons come from outside: nothing in them may steer the terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Names, and beside each what there is to say."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, Text(printable(text)))
    return table


def printable_lines(text: str) -> str:
    """The same of a text of several lines, whose ends are ours."""
    return "\n".join(map(printable, text.split("\n")))


def printable_json(text: str) -> str:
    """JSON that says the same. By itself it escapes a part of what steers a terminal, and not U+0080 to U+009F."""
    return "".join(letter if letter.isprintable() or letter == "\n" else json.dumps(letter)[1:-1] for letter in text)
