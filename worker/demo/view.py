"""The demo's progress: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from worker.demo.score import Scoreboard

PLAIN_EVERY_S = 5.0


Show = Callable[[Scoreboard, float], None]  # called after every poll, with the frames per second so far


@contextlib.contextmanager
def open_view(live: bool, console: Console) -> Iterator[Show]:
    """The live view, if it is wanted and the output is a terminal; else plain lines."""
    if not (live and console.is_terminal):
        yield _plain_view(console)
        return
    with Live(console=console, refresh_per_second=8) as screen:
        yield lambda board, per_second: screen.update(_live_view(board, per_second))


def _plain_view(console: Console) -> Show:
    last = 0.0

    def show(board: Scoreboard, per_second: float) -> None:
        nonlocal last
        if time.monotonic() - last < PLAIN_EVERY_S:
            return
        last = time.monotonic()
        scores = {name: score.accuracies() for name, score in board.cameras.items()}
        parts = ", ".join(f"{name} {source:.3f}->{adapted:.3f}" for name, (source, adapted) in scores.items())
        console.print(
            f"{board.answered}/{board.total} frames, {per_second:.0f} frames/s, source->adapted: {parts}",
            highlight=False,
            soft_wrap=True,
        )

    return show


def _live_view(board: Scoreboard, per_second: float) -> Group:
    line = Text(f"{board.answered:,} of {board.total:,} frames, {per_second:,.0f} frames/s")
    return Group(table(board), line, ProgressBar(total=max(1, board.total), completed=board.answered, width=60))


def table(board: Scoreboard) -> Table:
    """A row per camera, in less than eighty columns."""
    rows = Table(title="six cameras, one worker", title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=0)
    rows.add_column("camera", no_wrap=True)
    for name in ("source", "adapted", "gain", "estim.", "gradient", "applied", "skipped"):
        rows.add_column(name, justify="right", no_wrap=True)
    for name, score in board.cameras.items():
        source, adapted = score.accuracies()
        gain = 100 * (adapted - source)
        style = "green" if gain > 0.5 else "red" if gain < -1 else ""
        rows.add_row(
            name,
            f"{source:.3f}",
            f"{adapted:.3f}",
            Text(f"{gain:+.1f}", style=style),
            f"{score.estimated_accuracy:.3f}",
            f"{score.gradient_norm:.1f}",
            str(score.applied),
            str(score.skipped),
        )
    return rows
