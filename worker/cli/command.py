"""`driftkeel command ...`: send commands about streams to the workers, through the commands topic."""

from __future__ import annotations

import getpass
import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from schemas.command import EVERY_STREAM, Action, Command
from schemas.config import WorkerConfig
from schemas.config_file import load_config
from schemas.errors import ConfigError, UnreachableError, mistakes
from schemas.policy import Mode, PolicyChange
from schemas.update import UpdateEvent
from worker.cli.options import ConfigOption, ReasonOption
from worker.terminal import counted, printable

command_app = typer.Typer(
    help="Send workers a command for one stream or all of them; each is carried out once, and audited.",
    no_args_is_help=True,
)

NAMED = 10  # streams in a line that names them
ARGUMENTS = {"stream": "stream", "snapshot": "back"}  # by the command's field; all other fields are options
StreamArgument = Annotated[
    str, typer.Argument(help="Stream id, after -- if it begins with a dash; '*' for all streams.")
]
ByOption = Annotated[str, typer.Option(help="Who asks; default: the user's name.")]
WaitOption = Annotated[
    float, typer.Option(min=0, help="Seconds to wait for the update event that confirms it; 0: do not wait.")
]


def _add(action: Action, help: str) -> None:
    """Add a command that needs nothing but a stream."""

    def run(
        stream: StreamArgument,
        config: ConfigOption = None,
        reason: ReasonOption = "",
        by: ByOption = "",
        wait: WaitOption = 15,
    ) -> None:
        _send(config, wait, stream=stream, action=action, reason=reason, by=by)

    command_app.command(action, help=help)(run)


_add("freeze", "Stop updates; the parameters stay as they are.")
_add("unfreeze", "Resume updates.")
_add("reset", "Go back to the source model; an approval is withdrawn too.")


@command_app.command()
def rollback(
    stream: StreamArgument,
    back: Annotated[int, typer.Argument(min=1, help="Which snapshot; 1 is the newest.")] = 1,
    config: ConfigOption = None,
    reason: ReasonOption = "",
    by: ByOption = "",
    wait: WaitOption = 15,
) -> None:
    """Go back to a snapshot."""
    _send(config, wait, stream=stream, action="rollback", snapshot=back, reason=reason, by=by)


_add("approve", "Approve the present parameters: in mode approve these answer.")


@command_app.command()
def policy(
    stream: StreamArgument,
    mode: Annotated[Mode | None, typer.Option(help="Which parameters answer.")] = None,
    canary_share: Annotated[
        float | None, typer.Option(help="Share of the streams that adapted parameters answer, in mode canary.")
    ] = None,
    max_updates_per_hour: Annotated[int | None, typer.Option(help="Most updates in an hour; 0: no limit.")] = None,
    quiet_hours: Annotated[
        list[str] | None,
        typer.Option(help="UTC span without updates, such as 22:00-06:00; may be repeated; 'none' removes all."),
    ] = None,
    clear: Annotated[
        bool, typer.Option("--clear", help="Undo what commands changed in the policy, a freeze included.")
    ] = False,
    config: ConfigOption = None,
    reason: ReasonOption = "",
    by: ByOption = "",
    wait: WaitOption = 15,
) -> None:
    """Change rules of a stream's policy; rules that are not given stay."""
    named = {"mode": mode, "canary_share": canary_share, "max_updates_per_hour": max_updates_per_hour}
    change: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if quiet_hours:
        change["quiet_hours"] = [] if quiet_hours == ["none"] else quiet_hours
    if bool(change) == clear:
        raise ConfigError("say what to change, or give only --clear to undo what commands have changed")
    if clear and stream == EVERY_STREAM:
        _say_what_ends(load_config(config))
    _send(config, wait, stream=stream, action="policy", policy=change, reason=reason, by=by)


def _say_what_ends(settings: WorkerConfig) -> None:
    """Name the streams that lose a policy of their own: whoever thinks of all cameras may not think of these."""
    from worker.control.stored import own_policies
    from worker.store.store import StateStore

    try:
        own = own_policies(settings, StateStore(settings.store))
    except UnreachableError as error:  # The workers may reach it: the command itself does not need it.
        print(printable(f"which streams lose a policy of their own is not known: {error}"), file=sys.stderr)
        return
    if own:
        named = [f"{stream} ({change.in_words()})" for stream, change in islice(own.items(), NAMED)]
        more = f" and {len(own) - NAMED:,} more" if len(own) > NAMED else ""
        loses = "loses" if len(own) == 1 else "lose"
        said = f"{counted(len(own), 'stream')} {loses} what commands have set: {', '.join(named)}{more}"
        print(printable(said), file=sys.stderr)


def _send(config: Path | None, wait: float, **fields: Any) -> None:
    from worker.control.send import send_command

    try:
        if isinstance(fields.get("policy"), dict):
            fields["policy"] = PolicyChange.model_validate(fields["policy"])
        command = Command(**{**fields, "by": fields["by"] or getpass.getuser()})
    except ValidationError as error:
        where, words = mistakes(error)[0]
        field = where.rpartition(".")[2]
        raise ConfigError(f"{ARGUMENTS.get(field) or '--' + field.replace('_', '-')}: {words}") from error
    answers = send_command(
        load_config(config).kafka, command, wait, lambda: print(f"command {command.id} sent", file=sys.stderr)
    )
    decisions = []
    for event in answers:
        _print_outcome(event)
        decisions.append(event.decision)
    if not decisions and wait:
        print(
            f"no worker has confirmed it within {wait:g} s; it will be obeyed once a worker runs and knows the stream",
            file=sys.stderr,
        )
    raise typer.Exit(int(bool(wait) and (not decisions or "skipped" in decisions)))


def _print_outcome(event: UpdateEvent) -> None:
    print(printable(f"{event.id}: {event.decision}, now at step {event.step}: {event.reason}"), flush=True)
