"""The tables of docs/performance.md, from a report of `driftkeel benchmark throughput`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

BARS: dict[str, tuple[str, str, float]] = {
    "engine_vs_bare": ("engine over bare loop, 64 streams x 4 frames", ">=", 0.85),
    "streams64_vs_one": ("engine, 64 streams x 4 frames over 1 x 256", ">=", 0.85),
    "streams64_vs_loop": ("engine, 64 streams x 4 frames, over a loop of streams", ">=", 3.0),
    "worker_vs_bare_small": ("whole worker over bare loop, example net", ">=", 0.75),
    "worker_vs_bare_large": ("whole worker over bare loop, net of 300 MFLOPs", ">=", 0.95),
    "on_demand_gain_share": ("gain kept by adapting on demand, frames at a camera's pace", ">=", 0.95),
    "on_demand_cpu_vs_predict": ("processor time on demand over predicting only, the same", "<=", 1.35),
    "on_demand_backlog_gain_share": ("gain kept by adapting on demand, a backlog", ">=", 0.95),
    "on_demand_backlog_cpu_vs_predict": ("processor time on demand over predicting only, the same", "<=", 1.35),
    "cost_1000_vs_8_streams": ("cost of a frame, 1,000 streams over 8", "<=", 1.2),
}


def throughput_tables(results: dict[str, Any]) -> str:
    """All tables, one after the other."""
    parts = [_ratios(results), _engine(results), _workers(results), _latency(results), _on_demand(results)]
    return "\n\n".join(parts)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _ratios(results: dict[str, Any]) -> str:
    rows = []
    for name, (text, sign, bar) in BARS.items():
        value = results["ratios"].get(name)
        if value is None:
            continue  # A quick run leaves some out.
        holds = value >= bar if sign == ">=" else value <= bar
        rows.append((f"{text} (`{name}`)", f"{value:.2f}", f"{sign} {bar:g}", "yes" if holds else "**no**"))
    memory = results["idle_stream_bytes"]["ratio"]
    rows.append(
        ("memory of an idle stream over its state", f"{memory:.2f}", "<= 1.1", "yes" if memory <= 1.1 else "no")
    )
    return table(("ratio", "measured", "wanted", "holds"), rows)


def _engine(results: dict[str, Any]) -> str:
    found = results["engine"]["frames_per_second"]
    return table(("256 frames a pass, torch's own threads", "frames/s"), [(k, f"{v:,.0f}") for k, v in found.items()])


def _workers(results: dict[str, Any]) -> str:
    small, large = results["small"], results["large"]
    runs = {
        "example net, 64 streams": small["worker"],
        "the same, one process with a thread per processor": small.get("one_process"),
        "the same, predicting only": small.get("predict_only"),
        "large net, 16 streams, JPEG 128 x 128": large["worker"],
        "large net, 16 streams, JPEG 640 x 640": large.get("worker_640x640_jpeg"),
        **{f"example net, one worker, streams: {name}": seen for name, seen in results["streams"].items()},
        **{
            f"example net, one worker, 100 cameras, frames a second of each: {rate}": seen
            for rate, seen in results.get("cameras", {}).items()
        },
    }
    rows = [
        (
            name,
            f"{seen['frames_per_second']:,.0f}",
            f"{seen['cpu_seconds_per_1000_frames']:.2f}",
            f"{seen['peak_memory_bytes'] / (1 << 20):,.0f}",
        )
        for name, seen in runs.items()
        if seen is not None  # A quick run leaves some out.
    ]
    bare = [
        (f"bare loop, {size} net", " / ".join(f"{v:,.0f}" for v in results[size]["bare_frames_per_second"]), "", "")
        for size in ("small", "large")
    ]
    # A quick run has one of them.
    capacity = " / ".join(
        f"{results['latency'][k]:,.0f}" for k in ("capacity", "capacity_again") if k in results["latency"]
    )
    bare.append(("example net, 64 streams, while frames keep coming", capacity, "", ""))
    return table(("whole workers", "frames/s", "CPU s per 1,000", "peak MiB"), rows + bare)


def _latency(results: dict[str, Any]) -> str:
    rows = []
    wait, budget = results["latency"]["max_wait_ms"], f"{results['latency']['budget_ms']:,} ms"
    for name, seen in results["latency"].items():
        if not name.startswith("load_"):
            continue
        latency = seen["latency_ms"]
        share, *how = name.removeprefix("load_").split("_")
        rows.append(
            (
                f"{share} of capacity ({seen['offered_frames_per_second']:,.0f} frames/s)",
                budget if "budget" in how else "none",
                *(f"{latency[p]:.0f}" for p in ("p50", "p90", "p99")),
                f"{seen['step_ms']:.0f}",
                f"{wait + 3 * seen['step_ms']:.0f}",
                f"{seen['share_within_budget']:.2%}",
                f"{seen['shed']:.0f} of {seen['micro_batches']:.0f}",
                f"{seen['dropped'] / seen['frames']:.1%}" if "dropping" in how else "none",
            )
        )
    head = (
        *("load", "budget", "p50 ms", "p90 ms", "p99 ms", "step ms", "wait + 3 steps, ms"),
        f"answers within {budget}",
        "updates shed",
        "frames dropped",
    )
    return table(head, rows)


def _on_demand(results: dict[str, Any]) -> str:
    rows = []
    for found in (results[name] for name in ("on_demand", "on_demand_backlog") if name in results):
        rate = found.get("frames_a_second")  # Older reports are of backlogs alone.
        pace = f"{rate:.0f} frames/s each" if rate else "a backlog"
        for seed, run in zip(found["seeds"], found["runs"], strict=True):
            for mode, seen in run.items():
                rows.append(
                    (
                        f"{pace}, seed {seed}, {mode}",
                        f"{100 * seen['accuracy']:.2f}",
                        f"{seen['updates']:.0f}",
                        f"{seen['cpu_seconds_per_1000_frames']:.2f}",
                    )
                )
    return table(("demo's cameras", "accuracy %", "updates", "CPU s per 1,000"), rows)
