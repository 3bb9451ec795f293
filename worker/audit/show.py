"""The audit trail on the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from schemas.update import Proxies, UpdateEvent
from worker.audit.history import Span, spans
from worker.terminal import printable

BACK = ("rolled_back", "reset")
COLOURS = {
    **{"applied": "green", "partial": "yellow", "skipped": "dim"},
    **{"rolled_back": "red", "reset": "red", "deleted": "red"},
}


def show_streams(console: Console, histories: dict[str, list[UpdateEvent]]) -> None:
    """One line per stream."""
    table = Table(box=None, header_style="bold")
    for name in ("stream", "events", "applied", "partial", "skipped", "undone", "commands", "step", "distance"):
        table.add_column(name, justify="left" if name == "stream" else "right", overflow="fold")
    table.add_column("estimated accuracy", justify="right")
    table.add_column("answers")
    for stream, events in histories.items():
        table.add_row(*[Text(printable(cell)) for cell in _summary(stream, events)])
    console.print(table)


def _summary(stream: str, events: Sequence[UpdateEvent]) -> list[str]:
    decisions = Counter[str](event.decision for event in events)
    last = events[-1]
    distance = next((e.source_distance for e in reversed(events) if e.source_distance is not None), None)
    first = next((e.before for e in events if e.before is not None), None)
    newest = next((e.after for e in reversed(events) if e.after is not None), None)
    return [
        stream,
        str(len(events)),
        *(str(decisions[name]) for name in ("applied", "partial", "skipped")),
        str(sum(decisions[name] for name in BACK)),
        str(sum(event.command is not None for event in events)),
        str(last.step),
        number(distance),
        change(first, newest),
        last.parameters,
    ]


def show_stream(console: Console, stream: str, events: Sequence[UpdateEvent], last: int) -> None:
    """A stream over time: spans of what was decided, newest last."""
    found = spans(events)
    console.print(Text(f"{printable(stream)}: {len(events)} events in {len(found)} spans", style="bold"))
    table = Table(box=None, header_style="bold")
    for name in ("from", "to", "first", "decision", "events", "step", "distance", "layers that moved most"):
        table.add_column(name, justify="right" if name in ("events", "step", "distance") else "left", overflow="fold")
    table.add_column("estimated accuracy", justify="right")
    table.add_column("flips", justify="right")
    table.add_column("why", overflow="fold")
    for span in found[-last:]:
        table.add_row(*_row(span))
    console.print(table)


def _row(span: Span) -> list[Text]:
    layers = ", ".join(f"{layer} {moved:.3g}" for layer, moved in span.most_moved())
    flips = f"{span.flipped}/{span.frames}" if span.compared else "-"
    cells = [
        f"{span.begin:%m-%d %H:%M:%S}",
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
    return [Text(printable(cell), style=COLOURS.get(span.decision, "cyan")) for cell in cells]


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    return "-" if value is None else f"{value:.3g}"


def change(before: Proxies | None, after: Proxies | None) -> str:
    """Estimated accuracy before and after."""
    if before is None or after is None:
        return "-"
    return f"{before.estimated_accuracy:.1%} → {after.estimated_accuracy:.1%}"
