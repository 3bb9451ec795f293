"""Options that several groups of commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", envvar="DRIFTKEEL_CONFIG", help="The workers' YAML file.")
]
ReasonOption = Annotated[str, typer.Option(help="Goes into the update event.")]
