"""`driftkeel benchmark ...`: measure methods against each other and the worker's speed, and make tables of it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from worker.cli.options import must_be_writable

benchmark_app = typer.Typer(help="Measure adaptation methods and speed.", no_args_is_help=True)


@benchmark_app.command("accuracy")
def accuracy(
    config: Annotated[Path, typer.Option("--config", "-c", help="Plan of what to run, a YAML file.")],
    report: Annotated[
        Path, typer.Option("--report", "-o", help="JSON file to write; finished cells are kept beside it.")
    ],
    quick: Annotated[bool, typer.Option(help="One model and few frames, to check that everything works.")] = False,
    only: Annotated[str, typer.Option(help="Run only the cells whose name contains this.")] = "",
    minutes: Annotated[float, typer.Option(min=0, help="Start no cell after this many minutes; 0: no limit.")] = 0,
) -> None:
    """Measure the accuracy of every method under drift. Run it again to continue where it stopped."""
    must_be_writable(report)
    import math

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    from meta.benchmark.accuracy import Progress, run_accuracy
    from meta.benchmark.plan import read_benchmark

    settings = read_benchmark(config)
    parts = ["driftkeel", "benchmark", "accuracy", "--config", str(config), "--report", str(report)]
    parts += ["--quick"] * quick
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        whole = bars.add_task("cells", total=None)
        cell = bars.add_task("", total=None)

        def begin(name: str, done: int, cells: int, frames: int) -> None:
            if cells:
                bars.update(whole, completed=done, total=cells)
            bars.reset(cell, description=name, total=frames)

        progress = Progress(bars.console.print, begin, lambda frames: bars.advance(cell, frames))
        stop_after_s = 60 * minutes or math.inf
        plan = settings.quick() if quick else settings
        left = run_accuracy(plan, report, shlex.join(parts), progress, only, stop_after_s)
    print(f"{report} written" + (f"; {left} cells are left: run the same command again" if left else ""))


@benchmark_app.command("tables")
def tables(
    report: Annotated[Path, typer.Argument(help="Report of any of the benchmarks.")],
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the gains to this SVG or PNG file (accuracy reports only).")
    ] = None,
) -> None:
    """Print a report as the Markdown tables in the documentation."""
    from worker.benchmark.tables import markdown

    print(markdown(report, plot))


@benchmark_app.command()
def throughput(
    report: Annotated[
        Path | None, typer.Option("--report", "-o", help="Also write all figures to this JSON file.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Fewer and shorter runs: at most five minutes.")] = False,
    profile: Annotated[
        Path | None, typer.Option(help="Also write a trace of one engine pass to this file, for ui.perfetto.dev.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle with the small net; default: the example. The large net is built in.")
    ] = None,
) -> None:
    """Compare engine and worker with a bare loop of the same net: ratios, latencies, CPU time and memory."""
    must_be_writable(report, profile)
    from worker.benchmark.throughput import run_throughput
    from worker.site.folder import EXAMPLE_BUNDLE, shipped

    raise typer.Exit(run_throughput(bundle or shipped(EXAMPLE_BUNDLE), report, profile, quick))


BundleOption = Annotated[Path | None, typer.Option(help="Bundle to measure; default: the example.")]


def _invoked(name: str, report: Path, quick: bool, bundle: Path | None) -> str:
    """The command line that made a report, to be written into it."""
    options = ["--quick"] * quick + (["--bundle", str(bundle)] if bundle else [])
    return shlex.join(["driftkeel", "benchmark", name, "--report", str(report), *options])


@benchmark_app.command()
def proxies(
    report: Annotated[Path, typer.Option("--report", "-o", help="JSON file to write.")],
    quick: Annotated[bool, typer.Option(help="One seed, shorter streams: at most five minutes.")] = False,
    bundle: BundleOption = None,
) -> None:
    """Measure how far estimated accuracies are from the truth on held-out shifts, per signal and combined."""
    must_be_writable(report)
    from meta.benchmark.proxies import run_proxies
    from worker.site.folder import EXAMPLE_BUNDLE, shipped

    run_proxies(bundle or shipped(EXAMPLE_BUNDLE), report, _invoked("proxies", report, quick, bundle), quick)


@benchmark_app.command()
def guard(
    report: Annotated[Path, typer.Option("--report", "-o", help="JSON file to write.")],
    quick: Annotated[bool, typer.Option(help="Shorter attacks, three kinds of streams: at most five minutes.")] = False,
    bundle: BundleOption = None,
) -> None:
    """Attack engine and guard, and measure the gain that the guard leaves and what it costs."""
    must_be_writable(report)
    from worker.benchmark.guard import run_guard
    from worker.site.folder import EXAMPLE_BUNDLE, shipped

    run_guard(bundle or shipped(EXAMPLE_BUNDLE), report, _invoked("guard", report, quick, bundle), quick)
