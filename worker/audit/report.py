"""The audit trail as one self-contained HTML page with charts."""

from __future__ import annotations

import html
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt

mpl.use("svg")
from matplotlib import dates as mdates
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from schemas.errors import StateError
from schemas.update import UpdateEvent
from worker.audit.export import layers_of
from worker.audit.history import ROUTINE, Span, spans
from worker.audit.show import UNDONE, change, number
from worker.terminal import counted

ADAPTED, SOURCE, UNDONE_COLOUR, COMMANDED_COLOUR = "#0b6e8f", "#9a5b13", "#b3261e", "#5b4b8a"
BINS = 60  # spans of time in the chart of the layers
MAX_STREAMS, MAX_ROWS = 24, 200
LARGEST = 1e100  # value in a chart: no worker writes larger ones, and matplotlib has no ticks for them

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Driftkeel audit</title><style>
body{{font:16px/1.5 system-ui,sans-serif;color:#1c2730;background:#fbfcfd;
max-width:1100px;margin:2rem auto;padding:0 1rem}}
h1{{font-size:1.6rem;margin-bottom:.2rem}} h2{{font-size:1.2rem;margin-top:2.4rem;overflow-wrap:anywhere}}
table{{border-collapse:collapse;margin:1rem 0;font-size:.9rem}}
th,td{{padding:.3rem .6rem;text-align:left;border-bottom:1px solid #dde4e9;vertical-align:top;overflow-wrap:anywhere}}
svg{{width:100%;height:auto}} .undone{{color:#b3261e}} .commanded{{color:#5b4b8a}}
footer{{color:#5c6b76;font-size:.9rem;margin-top:2rem}}
</style></head><body>
<h1>Driftkeel audit</h1>
<p>{headline}</p>
<p>Blue: estimated accuracy of the parameters that adapt, with its 90% interval where it is known. Brown: of the source
model. Below: the distance of the norm affine from source, and how far each norm layer moved, darker for further. Red
lines: undone by the guard or a person. Violet lines: other commands. All times are UTC.</p>
{chain}
{sections}
<footer>{footer}</footer>
</body></html>
"""


def write_report(path: Path, histories: Mapping[str, Sequence[UpdateEvent]], chain: str) -> None:
    """Write the page; `chain` is the result of the verification in words. Raises StateError if it cannot be written."""
    order = sorted(histories, key=lambda stream: (-_notable(histories[stream]), stream))
    shown, left_out = order[:MAX_STREAMS], len(order) - MAX_STREAMS
    decisions = Counter(event.decision for events in histories.values() for event in events)
    counts = ", ".join(f"{count:,} {decision}" for decision, count in decisions.most_common())
    footer = (
        f"{left_out} more streams, with less to tell, are left out; name them with --stream." if left_out > 0 else ""
    )
    page = _PAGE.format(
        headline=html.escape(
            f"{counted(len(histories), 'stream')}, {counted(decisions.total(), 'update event')}: {counts or 'none'}."
        ),
        chain=f"<p>{html.escape(chain)}</p>" if chain else "",
        sections="\n".join(_section(stream, list(histories[stream])) for stream in shown),
        footer=html.escape(footer),
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StateError(f"{path} cannot be written: {error.strerror}") from error


def _notable(events: Sequence[UpdateEvent]) -> int:
    return sum(event.decision not in ROUTINE or event.command is not None for event in events)


def _section(stream: str, events: Sequence[UpdateEvent]) -> str:
    return f"<h2>{html.escape(stream)}</h2>\n{_draw(events)}\n{_table(spans(events))}"


def _draw(events: Sequence[UpdateEvent]) -> str:
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "driftkeel", "font.family": "sans-serif", "font.size": 9}
    times = np.array(mdates.date2num([event.time for event in events]))  # type: ignore[no-untyped-call]
    with plt.rc_context(settings):
        figure, (accuracy, distance, layers) = plt.subplots(
            3, 1, figsize=(11, 6), sharex=True, layout="constrained", height_ratios=(2, 1, 1.6)
        )
        _accuracy(accuracy, times, events)
        _line(distance, times, [event.source_distance for event in events], ADAPTED)
        distance.set_ylabel("distance")
        _layers(layers, times, events)
        for axes in (accuracy, distance):
            _mark(axes, times, events)
            axes.grid(color="#e6ecf0", linewidth=0.6)
        layers.xaxis.set_major_formatter(mdates.ConciseDateFormatter(layers.xaxis.get_major_locator()))  # type: ignore[no-untyped-call]
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _accuracy(axes: Axes, times: npt.NDArray[np.float64], events: Sequence[UpdateEvent]) -> None:
    def seen(name: str) -> npt.NDArray[np.float64]:
        return np.array([np.nan if (v := getattr(e.after, name, None)) is None else v for e in events])

    axes.fill_between(times, seen("low"), seen("high"), color=ADAPTED, alpha=0.15, linewidth=0)
    axes.plot(times, seen("estimated_accuracy"), color=ADAPTED, linewidth=1.5)
    axes.plot(times, seen("source_accuracy"), color=SOURCE, linewidth=1.2)
    axes.set_ylim(0, 1)
    axes.set_ylabel("estimated accuracy")


def _line(axes: Axes, times: npt.NDArray[np.float64], values: Sequence[float | None], colour: str) -> None:
    both = zip(times, values, strict=True)
    known = [(moment, value) for moment, value in both if value is not None and abs(value) < LARGEST]
    axes.step([moment for moment, _ in known], [value for _, value in known], where="post", color=colour, linewidth=1.3)


def _layers(axes: Axes, times: npt.NDArray[np.float64], events: Sequence[UpdateEvent]) -> None:
    """How far each layer moved in each span of time, with the model's first layer on top."""
    names = layers_of([events])
    if not names:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no layer moved", transform=axes.transAxes, ha="center")
        return
    edges = np.linspace(times[0], max(times[-1], times[0] + 1e-6), BINS + 1)
    moved = np.zeros((len(names), BINS))
    rows = {name: row for row, name in enumerate(names)}
    columns = np.clip(np.searchsorted(edges, times, "right") - 1, 0, BINS - 1)
    for column, event in zip(columns, events, strict=True):
        for layer, far in event.layers.items():
            moved[rows[layer], column] += far if abs(far) < LARGEST else 0
    axes.pcolormesh(edges, np.arange(len(names) + 1), moved, cmap="Blues", rasterized=False)
    axes.invert_yaxis()
    every = max(1, len(names) // 12)
    axes.set_yticks(np.arange(0, len(names), every) + 0.5, names[::every], fontsize=7, parse_math=False)


def _mark(axes: Axes, times: npt.NDArray[np.float64], events: Sequence[UpdateEvent]) -> None:
    for moment, event in zip(times, events, strict=True):
        if event.decision in UNDONE:
            axes.axvline(moment, color=UNDONE_COLOUR, linewidth=1)
        elif event.command is not None or event.decision not in ROUTINE:
            axes.axvline(moment, color=COMMANDED_COLOUR, linewidth=0.8, linestyle="--")


def _table(found: Sequence[Span]) -> str:
    columns: dict[str, Callable[[Span], str]] = {
        "from": lambda span: f"{span.begin:%Y-%m-%d %H:%M:%S}",
        "to": lambda span: f"{span.end:%Y-%m-%d %H:%M:%S}",
        "decision": lambda span: span.decision,
        "events": lambda span: f"{span.events} from @{span.first.rsplit('@', 1)[1]}",
        "step": lambda span: str(span.step),
        "distance": lambda span: number(span.distance),
        "moved most": lambda span: ", ".join(f"{layer} {far:.3g}" for layer, far in span.most_moved()) or "-",
        "estimated accuracy": lambda span: change(span.before, span.after),
        "flips": lambda span: f"{span.flipped} of {span.frames}" if span.compared else "-",
        "answers": lambda span: span.answers,
        "why": lambda span: span.reason,
    }
    rows = []
    for span in found[-MAX_ROWS:]:
        style = "undone" if span.decision in UNDONE else "" if span.decision in ROUTINE else "commanded"
        cells = "".join(f"<td>{html.escape(cell(span))}</td>" for cell in columns.values())
        rows.append(f'<tr class="{style}">{cells}</tr>')
    head = "".join(f"<th>{name}</th>" for name in columns)
    older = f"<p>{len(found) - MAX_ROWS} older spans are left out.</p>" if len(found) > MAX_ROWS else ""
    return f"{older}<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
