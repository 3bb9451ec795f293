"""A table of several demo runs: `python -m worker.demo.summary REPORT.json ...`, in Markdown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def summarise(reports: list[dict[str, Any]]) -> str:
    """A row per camera: mean accuracy in percent and, over the runs, mean and standard deviation of the gain."""
    lines = ["| camera | source % | adapted % | gain, points |", "|---|--:|--:|--:|"]
    for name in reports[0]["streams"]:
        source = np.array([100 * r["streams"][name]["accuracy_source"] for r in reports])
        adapted = np.array([100 * r["streams"][name]["accuracy_adapted"] for r in reports])
        lines.append(f"| {name} | {source.mean():.1f} | {adapted.mean():.1f} | {_spread(adapted - source)} |")
    shifted = np.array([r["gain_shifted_points"] for r in reports])
    healthy = np.array([r["gain_healthy_points"] for r in reports])
    lines.append(f"| **five drifting cameras** | | | **{_spread(shifted)}** |")
    lines.append(f"| **healthy camera** | | | **{_spread(healthy)}** |")
    missing = sum(r["predictions_missing"] for r in reports)
    sent = sum(r["frames_sent"] for r in reports)
    seeds = ", ".join(str(r["seed"]) for r in reports)
    lines.append(
        f"\nSeeds {seeds}; bundle {reports[0]['bundle']}; {sent:,} frames sent, {missing} predictions missing."
    )
    return "\n".join(lines)


def _spread(values: np.ndarray[Any, np.dtype[np.float64]]) -> str:
    return f"{values.mean():+.1f} ± {values.std():.1f}"


if __name__ == "__main__":
    print(summarise([json.loads(Path(path).read_text()) for path in sys.argv[1:]]))
