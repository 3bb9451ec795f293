"""The audit trail on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from schemas.update import Decision, Proxies, UpdateEvent
from worker.audit.history import Span, Summary, spans
from worker.terminal import counted, printable

STREAMS_FIT, SPANS_FIT = 120, 150  # columns that the two tables need without breaking words
COUNTS = ("events", "applied", "partial", "skipped", "undone", "commands")
COLUMNS = (*COUNTS, "step", "distance", "estimated accuracy", "answers")
UNDONE: tuple[Decision, ...] = ("rolled_back", "reset")
COLOURS = {
    **{"applied": "green", "partial": "yellow", "skipped": "dim"},
    **{"rolled_back": "red", "reset": "red", "deleted": "red"},
}


def show_streams(console: Console, found: Mapping[str, Summary]) -> None:
    """One line per stream; on a narrow terminal three."""
    rows = [_stream_cells(stream, summary) for stream, summary in found.items()]
    if console.width < STREAMS_FIT:
        for stream, *cells in rows:
            console.print(Text(printable(stream), style="bold"))
            named = list(zip(COLUMNS, cells, strict=True))
            _indented(console, named[: len(COUNTS)])
            _indented(console, named[len(COUNTS) :])
        return
    table = Table(box=None, header_style="bold")
    for name in ("stream", *COLUMNS):
        table.add_column(name, justify="left" if name in ("stream", "answers") else "right", overflow="fold")
    for row in rows:
        table.add_row(*[Text(printable(cell)) for cell in row])
    console.print(table)


def _indented(console: Console, named: Iterable[tuple[str, str]]) -> None:
    """A line of names and cells, without empty cells."""
    text = "  ".join(f"{name} {cell}".strip() for name, cell in named if cell != "-")
    if text:
        console.print(Padding(Text(printable(text)), (0, 0, 0, 2)))


def _stream_cells(stream: str, summary: Summary) -> list[str]:
    decisions, last, measured = summary.decisions, summary.last, summary.measured
    return [
        stream,
        str(decisions.total()),
        *(str(decisions[name]) for name in ("applied", "partial", "skipped")),
        str(sum(decisions[name] for name in UNDONE)),
        str(summary.commands),
        str(last.step) if last else "-",
        number(measured.source_distance if measured else None),
        change(summary.begun.before if summary.begun else None, summary.judged.after if summary.judged else None),
        last.parameters if last else "-",
    ]


def show_stream(console: Console, stream: str, events: Sequence[UpdateEvent], last: int) -> None:
    """A stream's `last` newest spans, the newest at the end: a table, or on a narrow terminal a few lines each."""
    found = spans(events)
    console.print(
        Text(f"{printable(stream)}: {counted(len(events), 'event')} in {counted(len(found), 'span')}", style="bold")
    )
    if console.width < SPANS_FIT:
        for span in found[-last:]:
            _span_lines(console, span)
        return
    table = Table(box=None, header_style="bold")
    for name in ("from, UTC", "to, UTC", "first", "decision", "events", "step", "distance", "layers that moved most"):
        table.add_column(name, justify="right" if name in ("events", "step", "distance") else "left", overflow="fold")
    table.add_column("estimated accuracy", justify="right")
    table.add_column("flips", justify="right")
    table.add_column("why", overflow="fold")
    for span in found[-last:]:
        table.add_row(*[Text(printable(cell), style=_colour(span)) for cell in _span_cells(span)])
    console.print(table)


def _span_lines(console: Console, span: Span) -> None:
    """A span on a narrow terminal."""
    begin, end, first, decision, events, step, distance, layers, accuracy, flips, why = _span_cells(span)
    time = begin if begin == end else f"{begin} to {end}"
    console.print(Text(printable(f"{time} UTC  {first}  {decision}"), style=_colour(span)))
    _indented(console, [("events", events), ("step", step), ("distance", distance), ("flips", flips)])
    _indented(console, [("estimated accuracy", accuracy), ("moved most", layers)])
    _indented(console, [("", why)])


def _colour(span: Span) -> str:
    return COLOURS.get(span.decision, "cyan")


def _span_cells(span: Span) -> list[str]:
    layers = ", ".join(f"{layer} {moved:.3g}" for layer, moved in span.most_moved())
    flips = f"{span.flipped}/{span.frames}" if span.compared else "-"
    return [
        f"{span.begin:%m-%d %H:%M:%S}",  # Without the year, to leave room for the reasons.
        f"{span.end:%m-%d %H:%M:%S}",
        f"@{span.first.rsplit('@', 1)[1]}",
        span.decision,
        str(span.events),
        str(span.step),
        number(span.distance),
        layers or "-",
        change(span.before, span.after),
        flips,
        span.reason,
    ]


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    return "-" if value is None else f"{value:.3g}"


def change(before: Proxies | None, after: Proxies | None) -> str:
    """Estimated accuracy before and after, or a dash."""
    ends = [one.estimated_accuracy if one is not None else None for one in (before, after)]
    if None in ends:
        return "-"
    return " → ".join(f"{accuracy:.1%}" for accuracy in ends)
