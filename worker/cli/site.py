"""`driftkeel init` and `driftkeel local`: the first steps of a site."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from schemas.config_file import load_config
from worker.cli.options import ConfigOption


def init(
    folder: Annotated[Path, typer.Argument(help="Where to write; made where it does not exist.")] = Path(),
    bootstrap: Annotated[
        str | None, typer.Option(help="host:port of your broker; the compose file then has none.")
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="redis:// URL of your store; the compose file then has none.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="The bundle to run, copied; the example's where not given.")
    ] = None,
    code: Annotated[
        Path | None,
        typer.Option(help="Folder of the function that builds the bundle's model; allows the bundle to run it."),
    ] = None,
) -> None:
    """Write a commented configuration, a compose file and a bundle: a folder to run a site from."""
    from worker.site.folder import write_site

    for path in write_site(folder, bootstrap, store, bundle, code):
        print(f"wrote {path}")
    print(f"next: cd {folder} && driftkeel doctor --config driftkeel.yaml")


def local(
    config: ConfigOption = None,
) -> None:
    """A broker and a store on this machine, for a first try without Docker: all in memory, gone with Ctrl-C."""
    from worker.site.folder import local_services

    settings = load_config(config)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with local_services(settings):
        topics = ", ".join(settings.kafka.topics.model_dump().values())
        print(
            f"broker {settings.kafka.bootstrap}, store {settings.store.address}, topics {topics}; Ctrl-C ends",
            flush=True,
        )
        stop.wait()
