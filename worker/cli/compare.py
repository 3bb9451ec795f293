"""`driftkeel compare`: the answers of two groups of workers to the same frames."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from pydantic_core import to_json

from schemas.config_file import load_config
from schemas.errors import DriftkeelError
from worker.cli.options import as_utc


def compare(
    first: Annotated[Path, typer.Argument(help="Configuration of the workers in use.")],
    second: Annotated[
        Path,
        typer.Argument(help="Configuration of other workers that read the same frames and publish to other topics."),
    ],
    since: Annotated[datetime | None, typer.Option(help="Only frames from this time on, UTC.")] = None,
    until: Annotated[datetime | None, typer.Option(help="Only frames before this time, UTC.")] = None,
    show: Annotated[
        int, typer.Option(min=0, help="Also list this many of the newest frames with different answers.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Compare the answers of two groups of workers to the same frames, for example to try out a new bundle."""
    from worker import compare as side_by_side
    from worker.terminal import printable, printable_json, terminal

    one, other = load_config(first), load_config(second)
    side_by_side.must_be_comparable(one, other)
    times = as_utc(since), as_utc(until)
    found = side_by_side.compared(*(side_by_side.answers(config, *times) for config in (one, other)))
    if not found.total.frames:
        raise DriftkeelError(
            f"no frame was answered by both: {found.alone[0]} by the first only, {found.alone[1]} by the second only"
        )
    differing = found.differing[-show:] if show else []
    if as_json:
        content = {
            "streams": dict(sorted(found.streams.items())),
            "all": found.total,
            "alone": found.alone,
            "bundles": found.bundles,
            "differing": differing,
        }
        print(printable_json(to_json(content).decode()))
        return
    terminal().print(side_by_side.table(found))
    for name, path, bundles, alone in zip(
        ("first", "second"), (first, second), found.bundles, found.alone, strict=True
    ):
        words = f"{name}: {path}, bundle {', '.join(bundles)}; {alone:,} frames that the other has not answered"
        print(printable(words))
    for pair in differing:
        print(side_by_side.difference(*pair))
