"""What several commands share: options, checks of their values, and the usual way to end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from schemas.errors import ConfigError, UnreachableError

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        envvar="DRIFTKEEL_CONFIG",
        help="The workers' YAML file; without it, the defaults. DRIFTKEEL__ variables override both.",
    ),
]
ReasonOption = Annotated[str, typer.Option(help="Reason, recorded in the update event.")]


def as_utc(moment: datetime | None) -> datetime | None:
    """A time without a zone is UTC."""
    return moment and moment.replace(tzinfo=moment.tzinfo or UTC)


def must_be_writable(*files: Path | None) -> None:
    """Check before a long run that its results can be written. Raises ConfigError."""
    for file in files:
        if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
            raise ConfigError(f"{file} cannot be written: name a file in an existing folder that you may write to")


def pixels(size: str | None) -> tuple[int, int] | None:
    """Width and height of a `--size`, None where it is not given. Raises ConfigError."""
    if size is None:
        return None
    width, _, height = size.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ConfigError(f"--size {size!r} is not WIDTHxHEIGHT, such as 640x480")
    return int(width), int(height)


@contextmanager
def until_stopped() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set. Both are the usual way to end, also while a broker is waited for that does
    not answer. So is a reader that goes away."""
    stop, asked = threading.Event(), threading.Event()

    def end(*_: object) -> None:
        asked.set()  # `stop` alone does not tell: a failure inside may set it, too.
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    try:
        yield stop
    except UnreachableError:
        if not asked.is_set():
            raise
    except BrokenPipeError:  # As in `driftkeel watch | head`.
        sys.stderr.close()
