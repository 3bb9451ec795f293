"""The command line."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from schemas.config_file import effective_yaml, load_config
from schemas.errors import ConfigError, DriftkeelError
from worker.cli.audit import audit_app
from worker.cli.benchmark import benchmark_app
from worker.cli.bundle import bundle_app
from worker.cli.command import command_app
from worker.cli.compare import compare
from worker.cli.options import ConfigOption, must_be_writable
from worker.cli.site import init, local
from worker.cli.streams import streams_app
from worker.cli.video import produce, watch

app = typer.Typer(
    name="driftkeel",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
meta_app = typer.Typer(help="Train generators and pack bundles, centrally.", no_args_is_help=True)
app.add_typer(meta_app, name="meta")
app.add_typer(bundle_app, name="bundle")
app.add_typer(streams_app, name="streams")
app.add_typer(command_app, name="command")
app.add_typer(audit_app, name="audit")
app.add_typer(benchmark_app, name="benchmark")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"driftkeel {version('driftkeel')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Keeps image classifiers accurate while their cameras drift."""


@app.command()
def worker(config: ConfigOption = None) -> None:
    """Consume frames, predict and adapt, until SIGTERM or Ctrl-C."""
    import os
    import signal

    # A container's first process receives only signals that it handles. Without this, a pod that is deleted while torch
    # loads would go on, join the group, and be killed while it holds partitions.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    # While torch loads there is nothing to finish, and its code may swallow a KeyboardInterrupt: the signal itself ends
    # the process. Where Ctrl-C is ignored, as in a background job, it stays ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from worker.log import set_up_logging

    settings = load_config(config)
    set_up_logging(settings.log)  # Before torch, which may warn while it loads.
    from worker.run import run_worker

    run_worker(settings)


@app.command()
def console(
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; any but loopback needs a token.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65_535, help="Port to listen on; 0 picks a free one.")] = None,
    token: Annotated[str | None, typer.Option(help="Login token; other users can see it in the process list.")] = None,
) -> None:
    """Serve a local web page: all cameras at a glance, one in detail, and the undo."""
    try:
        from worker.console.run import overridden, run_console
    except ModuleNotFoundError as error:
        raise ConfigError(f"the console needs the package {error.name}: pip install 'driftkeel[console]'") from error
    from worker.log import set_up_logging

    settings = overridden(load_config(config), host, port, token)
    set_up_logging(settings.log)
    run_console(settings)


@app.command("config")
def show_config(config: ConfigOption = None) -> None:
    """Print the configuration in force, with secrets masked."""
    print(effective_yaml(load_config(config)), end="")


@app.command()
def demo(
    frames: Annotated[int, typer.Option(min=32, max=9_000, help="Frames per camera.")] = 4_000,
    seed: Annotated[int, typer.Option(help="Random seed of images, their order and shifts.")] = 0,
    report: Annotated[
        Path | None, typer.Option("--report", "-o", help="Also write the results to this JSON file.")
    ] = None,
    html: Annotated[Path, typer.Option(help="File for the report with charts.")] = Path("demo-report.html"),
    picture: Annotated[Path | None, typer.Option(help="Also write only the charts to this SVG file.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Bundle to run; default: the example.")] = None,
    view: Annotated[bool, typer.Option(help="Show a live table; --no-view prints plain lines.")] = True,
    web_console: Annotated[
        bool, typer.Option("--console/--no-console", help="Also start the web console, if it is installed.")
    ] = True,
) -> None:
    """Run six drifting cameras through a real broker, store and worker on this machine, and report the results."""
    must_be_writable(report, html, picture)
    from worker.demo.run import run_demo
    from worker.site.folder import EXAMPLE_BUNDLE, shipped

    raise typer.Exit(
        run_demo(frames, seed, bundle or shipped(EXAMPLE_BUNDLE), report, html, picture, view, web_console)
    )


@meta_app.command("train")
def meta_train(
    config: Annotated[Path, typer.Option("--config", "-c", help="Recipe, a YAML file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the bundle to.")],
) -> None:
    """Train a source model and its generator, calibrate them, and pack the bundle."""
    from meta.recipe import build_bundle, read_recipe
    from worker.process import keep_freed_memory

    keep_freed_memory()
    build_bundle(read_recipe(config), output, f"driftkeel meta train --config {config} --output {output}")


@app.command()
def doctor(config: ConfigOption = None) -> None:
    """Check everything that a worker needs, and say what to do; exit 1 if a worker would fail."""
    from worker.site.doctor import examine
    from worker.terminal import printable

    failed = False
    for finding in examine(load_config(config)):
        failed |= finding.level == "failed"
        print(printable(f"{finding.level:8s} {finding.subject:9s} {finding.text}"))
    raise typer.Exit(int(failed))


app.command()(init)
app.command()(local)
app.command()(produce)
app.command()(watch)
app.command()(compare)


def run() -> None:
    """Run the command line. An error meant for the user is printed on standard error, with exit code 1."""
    try:
        app()
    except DriftkeelError as error:
        from worker.log import told_as_event
        from worker.terminal import printable_lines

        if not told_as_event(error):
            print(f"driftkeel: {printable_lines(str(error))}", file=sys.stderr)
        sys.exit(1)
