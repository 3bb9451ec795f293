"""`driftkeel streams ...`: show stored streams, and change them while workers run."""

from __future__ import annotations

import getpass
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schemas.config_file import load_config
from schemas.errors import ConfigError, StateError
from worker.cli.options import ConfigOption, ReasonOption

if TYPE_CHECKING:
    from schemas.update import UpdateEvent
    from worker.control.operate import Operator
    from worker.control.stored import ListedStream

streams_app = typer.Typer(
    help="Show stored streams, and change them in the store, even while workers run.", no_args_is_help=True
)

DASH = "after -- if it begins with a dash"
StreamArgument = Annotated[str, typer.Argument(help=f"Stream id; {DASH}.")]


def _operator(config: Path | None) -> Operator:
    from worker.control.operate import Operator
    from worker.engine.engine import Engine
    from worker.site.bundle import site_bundle
    from worker.store.store import StateStore

    settings = load_config(config)
    bundle = site_bundle(settings)
    name = f"operator {getpass.getuser()}"
    return Operator(settings, StateStore(settings.store), Engine(bundle), name)


@streams_app.command("list")
def list_streams(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list: what 'show --json' has, and the number of snapshots.")
    ] = False,
    config: ConfigOption = None,
) -> None:
    """List streams: frames, updates, state bytes, whether a worker can use the state, and which worker has it."""
    from worker.control.stored import listed
    from worker.store.store import StateStore
    from worker.terminal import printable

    streams = listed(StateStore(load_config(config).store))
    if as_json:
        print(json.dumps([_as_json(found) | {"snapshots": found.snapshots} for found in streams], indent=2))
        return
    print(f"{'stream':32s} {'frames':>9s} {'step':>7s} {'bytes':>9s} {'state':8s} owner")
    for found in streams:
        frames, step = (found.header.frames, found.header.step) if found.header else ("-", "-")
        counts = f"{frames!s:>9s} {step!s:>7s} {found.tensor_bytes:9d}"
        print(printable(f"{found.stream:32s} {counts} {found.condition:8s} {found.owner}"))


@streams_app.command()
def show(
    stream: StreamArgument,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything stored except the tensors, as JSON.")
    ] = False,
    config: ConfigOption = None,
) -> None:
    """Show which parameters answer for a stream and why, its accuracy, and its snapshots to roll back to."""
    from worker.cli.streams_show import show as show_stream
    from worker.control.stored import judged, listed_one, snapshots
    from worker.store.store import StateStore
    from worker.terminal import terminal

    settings = load_config(config)
    store = StateStore(settings.store)
    found = listed_one(store, stream)
    kept = [] if found.foreign else snapshots(store, stream)
    if as_json:
        written = [snapshot and snapshot.model_dump(mode="json") for snapshot in kept]
        print(json.dumps(_as_json(found) | {"snapshots": written}, indent=2))
    else:
        show_stream(terminal(), found, kept, *judged(settings, found))


@streams_app.command()
def export(
    stream: StreamArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    config: ConfigOption = None,
) -> None:
    """Write a stream's state to a file."""
    content = _operator(config).export(stream)
    try:
        output.write_bytes(content)
    except OSError as error:
        raise StateError(f"{output} cannot be written: {error.strerror}") from error


@streams_app.command("import")
def import_(
    stream: StreamArgument,
    file: Annotated[Path, typer.Option("--input", "-i", help="File that 'streams export' wrote.")],
    reason: ReasonOption = "imported by hand",
    config: ConfigOption = None,
) -> None:
    """Give a stream the parameters from a file; it keeps its position."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise StateError(f"{file} cannot be read: {error.strerror}") from error
    _print_event(_operator(config).import_file(stream, content, reason))


@streams_app.command()
def reset(stream: StreamArgument, reason: ReasonOption = "reset by hand", config: ConfigOption = None) -> None:
    """Set a stream back to the source model."""
    _print_event(_operator(config).reset(stream, reason))


@streams_app.command()
def rollback(
    stream: StreamArgument,
    back: Annotated[int, typer.Argument(min=1, help="Which snapshot; 1 is the newest.")] = 1,
    reason: ReasonOption = "rolled back by hand",
    config: ConfigOption = None,
) -> None:
    """Set a stream back to one of its snapshots."""
    _print_event(_operator(config).rollback(stream, back, reason))


@streams_app.command()
def delete(
    streams: Annotated[list[str] | None, typer.Argument(help=f"Stream ids; {DASH}.")] = None,
    frames_at_most: Annotated[
        int | None, typer.Option(min=0, help="Instead of names: all 'ok' streams with at most this many frames.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    reason: ReasonOption = "deleted by hand",
    config: ConfigOption = None,
) -> None:
    """Delete what is stored for retired cameras; a last update event records it.

    A camera that sends again starts anew.
    """
    from worker.control import retire
    from worker.kafka.client import require_topics
    from worker.store.store import StateStore
    from worker.terminal import counted, printable

    if bool(streams) == (frames_at_most is not None):
        raise ConfigError("name the streams to delete, or give --frames-at-most instead of names")
    settings = load_config(config)
    store, name = StateStore(settings.store), f"operator {getpass.getuser()}"
    require_topics(settings.kafka, only=[settings.kafka.topics.updates])
    chosen = streams or [] if frames_at_most is None else retire.of_few_frames(store, frames_at_most)
    for stream, found in zip(chosen, store.overview(chosen), strict=True):
        print(printable(f"{stream}: {retire.described(store, stream, found)}"))
    if chosen and not yes:
        _must_agree(f"Delete {counted(len(chosen), 'stream')} for good?")
    deleted = 0
    for stream in chosen:
        # The question and the streams before this one took time: the camera may have begun to send meanwhile.
        if frames_at_most is None or retire.of_few_frames(store, frames_at_most, [stream]):
            retire.publish(settings.kafka, name, retire.delete(store, stream, reason, name))
            deleted += 1
    print(f"deleted: {deleted}")


def _must_agree(question: str) -> None:
    """Ask, and end the command if the answer is no. Raises ConfigError where nobody is there to answer."""
    try:
        agreed = typer.confirm(question)
    except typer.Abort:  # Ctrl-C, or an input that has ended.
        if sys.stdin.isatty():
            raise
        raise ConfigError("nothing was deleted: nobody can be asked here; give -y to delete without asking") from None
    if not agreed:
        raise typer.Abort


def _as_json(found: ListedStream) -> dict[str, Any]:
    """All that is stored but tensors and snapshots; a header that cannot be read is null."""
    return {
        "stream": found.stream,
        "condition": found.condition,
        "owner": found.owner,
        "token": found.token,
        "tensor_bytes": found.tensor_bytes,
        "header": found.header and found.header.model_dump(mode="json"),
    }


def _print_event(event: UpdateEvent) -> None:
    print(f"{event.id}: {event.decision}, now at step {event.step}")
