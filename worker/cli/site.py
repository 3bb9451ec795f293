"""`driftkeel init` and `driftkeel local`: the first steps of a site."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from schemas.config_file import load_config
from worker.cli.options import ConfigOption, until_stopped


def init(
    folder: Annotated[Path, typer.Argument(help="Folder to write to; created if needed.")] = Path(),
    bootstrap: Annotated[
        str | None, typer.Option(help="host:port of your own broker; the compose file then leaves Kafka out.")
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="redis:// URL of your own store; the compose file then leaves it out.")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="Bundle to run, which is copied; default: the example.")] = None,
    code: Annotated[
        Path | None,
        typer.Option(help="Folder with the function that builds the bundle's model; allows the bundle to run it."),
    ] = None,
) -> None:
    """Write a folder to run a site from: a commented configuration, a compose file and a bundle."""
    from worker.site.folder import write_site

    for path in write_site(folder, bootstrap, store, bundle, code):
        print(f"wrote {path}")
    print(f"next: cd {quote(str(folder))} && driftkeel doctor --config driftkeel.yaml")


def local(
    config: ConfigOption = None,
) -> None:
    """Run a broker and a store on this machine for a first try, without Docker: in memory, gone after Ctrl-C."""
    from worker.site.folder import local_services

    settings = load_config(config)
    with until_stopped() as stop, local_services(settings):
        topics = ", ".join(settings.kafka.topics.model_dump().values())
        print(
            f"broker {settings.kafka.bootstrap}, store {settings.store.address}, topics {topics}; Ctrl-C ends",
            flush=True,
        )
        stop.wait()
