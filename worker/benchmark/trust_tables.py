"""The tables of docs/trust.md, from the reports of `driftkeel benchmark proxies` and `driftkeel benchmark guard`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from worker.benchmark.throughput_tables import table

KINDS = {
    "all": "all",
    "adapted": "adapted",
    "unadapted": "unadapted",
    "held_out/adapted": "held-out shifts, adapted",
    "held_out/unadapted": "held-out shifts, unadapted",
    "corruptions/adapted": "common corruptions, adapted",
    "corruptions/unadapted": "common corruptions, unadapted",
}
NAMES = {"combination": "**combination**", "source": "combination, for source"}
SPANS = ("", "_512", "_visit")
DECISIONS = (("applied",), ("partial",), ("skipped",), ("rolled_back", "reset"))


def proxies_tables(report: dict[str, Any]) -> str:
    """Every signal alone and combined; then the combination by kind of shift and over longer spans."""
    results = report["results"]
    head = ("signal", "adapted: error", "rank", "covered", "unadapted: error", "rank", "covered")
    kinds = results["adapted"], results["unadapted"]
    single = [name for name in kinds[0] if name not in NAMES and name != "truth"]
    single.sort(key=lambda name: sum(kind[name]["mae_points"] for kind in kinds))
    rows = [(NAMES.get(n, n), *_score(kinds[0][n]), *_score(kinds[1][n])) for n in (*NAMES, *single)]
    lengths = ("128 frames", "512", "whole visit")
    spans = ("shifts", f"error: {lengths[0]}", *lengths[1:], "bias", "covered", f"rank: {lengths[0]}", *lengths[1:])
    return table(head, rows) + "\n\n" + table(spans, [_over_spans(results[kind], KINDS[kind]) for kind in KINDS])


def _score(of: dict[str, float]) -> tuple[str, str, str]:
    covered = f"{of['coverage90']:.0%}" if "coverage90" in of else ""
    return f"{of['mae_points']:.1f}", f"{of['spearman']:.2f}", covered


def _over_spans(of: dict[str, dict[str, float]], name: str) -> tuple[str, ...]:
    found, best = of["combination"], of["truth"]
    return (
        name,
        *(f"{found[f'mae_points{span}']:.1f}" for span in SPANS),
        f"{round(found['bias_points'], 1) + 0.0:+.1f}",
        f"{found['coverage90']:.0%}",
        *(f"{found[f'spearman{span}']:.2f} of {best[f'best_spearman{span}']:.2f}" for span in SPANS),
    )


def guard_tables(report: dict[str, Any]) -> str:
    """The attacks, as means over the seeds with the worst in brackets, and the accuracy benchmark's streams."""
    head = ("attack", "frames", "collapsed", "probe: points below source", "first 128 frames", "recovered after")
    attacks = table(
        (*head, "updates applied / partial / skipped / back"),
        [_attack(name, seen) for name, seen in report["attacks"].items()],
    )
    head = ("stream", "streams", "source", "guarded", "unguarded", "furthest below source, points")
    return f"{attacks}\n\n{table((*head, 'frames that source answered'), _streams(report['streams']))}"


def _attack(name: str, seen: dict[str, Any]) -> tuple[str, ...]:
    runs = seen["runs"]
    decided = [np.mean([sum(run["decisions"].get(one, 0) for one in kind) for run in runs]) for kind in DECISIONS]
    recovered = seen["recovery_frames"]
    return (
        name,
        f"{seen['frames']:,}",
        "yes" if seen["collapsed"] else "no",
        _with_worst(run["probe_drop_points"] for run in runs),
        _with_worst(run["healing_drop_points"] for run in runs),
        "never" if recovered is None else f"{recovered:.0f}",
        " / ".join(f"{count:.0f}" for count in decided[:3]) + f" / {decided[3]:.1f}",
    )


def _with_worst(values: Iterable[float]) -> str:
    found = list(values)
    return f"{np.mean(found) + 0.0:.1f} ({max(found) + 0.0:.1f})"


def _streams(streams: list[dict[str, Any]]) -> Iterable[tuple[str, ...]]:
    settings = dict.fromkeys(one["stream"].rsplit("-", 1)[0] for one in streams)
    for setting in settings:
        own = [one for one in streams if one["stream"].rsplit("-", 1)[0] == setting]
        means = [np.mean([one[name] for one in own]) for name in ("source", "guarded", "unguarded")]
        yield (
            setting,
            str(len(own)),
            *(f"{mean:.1f}" for mean in means),
            f"{max(one['source'] - one['guarded'] for one in own):.1f}",
            f"{sum(one['answered_by_source'] for one in own):,}",
        )
