"""The report of a demo run: one HTML file with charts, and a picture for the README."""

from __future__ import annotations

import html
import io
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from worker.demo.score import CameraScore, Scoreboard

SOURCE, ADAPTED, SHIFT, ESTIMATE = "#9a5b13", "#0b6e8f", "#c9d3da", "#7a8791"
POINTS = 320  # per line: more cannot be seen, and make the file larger

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Driftkeel demo</title><style>
body{{font:16px/1.5 system-ui,sans-serif;color:#1c2730;background:#fbfcfd;
max-width:1040px;margin:2rem auto;padding:0 1rem}}
h1{{font-size:1.6rem;margin-bottom:.2rem}} table{{border-collapse:collapse;margin:1rem 0}}
th,td{{padding:.35rem .8rem;text-align:right;border-bottom:1px solid #dde4e9}}
th:first-child,td:first-child{{text-align:left}}
svg{{width:100%;height:auto}} .big{{font-size:1.15rem}}
footer{{color:#5c6b76;font-size:.9rem;margin-top:2rem}}
</style></head><body>
<h1>Driftkeel demo</h1>
<p class="big">{headline}</p>
{charts}
{table}
<p>{legend}</p>
<details><summary>All numbers as JSON</summary><pre>{numbers}</pre></details>
<footer>Bundle {bundle}. Fashion-MNIST test images; neither model nor generator was trained on these shifts.</footer>
</body></html>
"""


def write_report(path: Path, board: Scoreboard, results: dict[str, Any], bundle: str) -> None:
    """Write the self-contained page."""
    headline = (
        f"On the five drifting cameras adapting changes accuracy by {results['gain_shifted_points']:+.1f} points, "
        f"on the healthy one by {results['gain_healthy_points']:+.1f}. {results['frames_predicted']:,} of "
        f"{results['frames_sent']:,} frames predicted, {results['predictions_missing']} missing."
    )
    legend = (
        "Accuracy over the last 200 frames. Brown: the source model. Blue: the adapted model. "
        "Dotted: the worker's own estimate of its accuracy, made without labels. Grey: severity of the shift."
    )
    page = _PAGE.format(
        headline=html.escape(headline),
        charts=draw(board),
        table=_table(results),
        legend=html.escape(legend),
        numbers=html.escape(json.dumps(results, indent=2)),
        bundle=html.escape(bundle),
    )
    path.write_text(page, encoding="utf-8")


def draw(board: Scoreboard) -> str:
    """One chart per camera as an SVG element."""
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "driftkeel", "font.family": "sans-serif", "font.size": 9}
    with plt.rc_context(settings):
        figure, grid = plt.subplots(2, 3, figsize=(11, 5.2), sharex=True, sharey=True, layout="constrained")
        for axes, score in zip(grid.flat, board.cameras.values(), strict=True):
            _chart(axes, score)
        grid[0, 0].set_ylabel("accuracy")
        grid[1, 0].set_ylabel("accuracy")
        for axes in grid[1]:
            axes.set_xlabel("frame")
        grid[0, 0].legend(loc="lower left", frameon=False, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _chart(axes: Axes, score: CameraScore) -> None:
    count = len(score.source_right)
    frames = np.arange(0, count, max(1, count // POINTS))
    lines: list[tuple[npt.NDArray[Any], dict[str, Any]]] = [
        (_smooth(score.source_right), {"color": SOURCE, "linewidth": 1.4, "label": "source"}),
        (_smooth(score.adapted_right), {"color": ADAPTED, "linewidth": 1.6, "label": "adapted"}),
        (score.estimate, {"color": ESTIMATE, "linewidth": 0.9, "linestyle": ":", "label": "estimated"}),
    ]
    axes.fill_between(frames, 0, score.reel.severity[frames], color=SHIFT, linewidth=0, alpha=0.6)
    for values, style in lines:
        axes.plot(frames, values[frames], **style)
    source, adapted = score.accuracies()
    axes.set_title(f"{score.reel.camera.stream}   {100 * source:.1f} → {100 * adapted:.1f}%", loc="left", fontsize=10)
    axes.set_ylim(0, 1)
    axes.set_xlim(0, count)
    axes.grid(color="#e6ecf0", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _smooth(right: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Mean over the last 200 frames (fewer at the beginning)."""
    total = np.cumsum(np.concatenate([[0], right.astype(np.float64)]))
    ends = np.arange(1, len(right) + 1)
    starts = np.maximum(0, ends - 200)
    smooth: npt.NDArray[np.float64] = (total[ends] - total[starts]) / (ends - starts)
    smooth[: min(20, len(right))] = np.nan
    return smooth


def _table(results: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{100 * s['accuracy_source']:.1f}</td>"
        f"<td>{100 * s['accuracy_adapted']:.1f}</td>"
        f"<td>{100 * (s['accuracy_adapted'] - s['accuracy_source']):+.1f}</td>"
        f"<td>{s['updates_applied']}</td><td>{s['updates_skipped']}</td></tr>"
        for name, s in results["streams"].items()
    )
    head = "<th>camera</th><th>source %</th><th>adapted %</th><th>gain</th><th>applied</th><th>skipped</th>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
