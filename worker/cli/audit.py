"""`driftkeel audit ...`: what changed in a stream, when, by how much and why, and whether the trail is complete."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from schemas.config_file import load_config
from schemas.errors import ConfigError, StateError
from worker.cli.options import ConfigOption, as_utc
from worker.terminal import counted, printable, terminal

if TYPE_CHECKING:
    from schemas.state import StreamHeader
    from worker.audit.read import Coverage, EventFilter, History, Record

audit_app = typer.Typer(
    help="Show and check what changed, when, by how much and why; from the topic or a file.", no_args_is_help=True
)

FileOption = Annotated[
    Path | None, typer.Option("--file", "-f", help="Read this file (a jsonl export) instead of the topic.")
]
StreamOption = Annotated[list[str] | None, typer.Option("--stream", "-s", help="Only this stream; may be repeated.")]
SinceOption = Annotated[datetime | None, typer.Option(help="Only events from this time on, UTC.")]
UntilOption = Annotated[datetime | None, typer.Option(help="Only events before this time, UTC.")]


@audit_app.command()
def show(
    config: ConfigOption = None,
    file: FileOption = None,
    stream: StreamOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    last: Annotated[int, typer.Option(min=1, help="Number of newest spans to show per stream.")] = 50,
) -> None:
    """Show a line per stream; with --stream, what happened to it over time."""
    from worker.audit.history import summaries
    from worker.audit.read import Coverage, events_of
    from worker.audit.show import show_stream, show_streams

    console, wanted = terminal(), _wanted(stream, since, until)
    if not stream:
        coverage = Coverage()
        found = summaries(
            event for event, _ in events_of(_readable(_records(config, file, wanted.since)), wanted, coverage)
        )
        _say_coverage(coverage, set(found), wanted)
        show_streams(console, found)
        return
    for name, events in _histories(config, file, wanted).items():
        show_stream(console, name, events, last)


@audit_app.command()
def report(
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("audit.html"),
    config: ConfigOption = None,
    file: FileOption = None,
    stream: StreamOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
) -> None:
    """Write one HTML page with charts, to keep or to send."""
    from worker.audit.verify import verify

    try:
        from worker.audit.report import write_report
    except ImportError as error:
        raise ConfigError("the charts need matplotlib: pip install 'driftkeel[embedded]'") from error
    verification = verify(_records(config, file))
    chain = "The record is sound: every event has the hash that the next one carries."
    if not verification.sound:
        findings = counted(len(verification.findings), "finding")
        chain = f"The record is not sound: {findings}; 'driftkeel audit verify' names them."
    found = _histories(config, file, _wanted(stream, since, until))
    write_report(output, found, chain)
    print(f"{output}: {counted(len(found), 'stream')}, {counted(_events(found), 'event')}")


@audit_app.command()
def export(
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    format: Annotated[
        Literal["jsonl", "csv", "parquet"], typer.Option(help="jsonl is the bytes as published, for verify --file.")
    ] = "jsonl",
    config: ConfigOption = None,
    file: FileOption = None,
    stream: StreamOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
) -> None:
    """Write the events to a file, as published or as a table."""
    from worker.audit.export import write_csv, write_lines, write_parquet

    if format == "jsonl":
        if stream or since or until:
            raise ConfigError("jsonl exports the whole record as published: leave out --stream, --since and --until")
        print(f"{output}: {counted(write_lines(_readable(_records(config, file)), output), 'record')}")
        return
    found = _histories(config, file, _wanted(stream, since, until))
    columns = (write_csv if format == "csv" else write_parquet)(found.values(), output)
    print(f"{output}: {counted(_events(found), 'event')}, {counted(columns, 'column')}")


@audit_app.command()
def verify(
    config: ConfigOption = None,
    file: FileOption = None,
    store: Annotated[
        bool, typer.Option("--store", help="Also compare each stream's end with the store; stop its workers first.")
    ] = False,
    complete: Annotated[
        bool, typer.Option("--complete", help="Require every stream to begin with its first event.")
    ] = False,
    heads_file: Annotated[
        Path | None,
        typer.Option("--heads", help="File that 'audit heads' wrote: the trail must contain these very events."),
    ] = None,
) -> None:
    """Name every event that is missing, altered, reordered or forked; exit 1 if there is one."""
    from schemas.heads import read_heads
    from worker.audit.verify import verify as examine

    heads = read_heads(heads_file).streams if heads_file is not None else None
    headers, beside = _stored_ends(config) if store else (None, [])
    verification = examine(_records(config, file), headers, beside, lambda: _stored_ends(config)[0], heads)
    for finding in verification.findings:
        print(printable(f"{finding.kind:10s} {finding.event} {finding.text}"))
    sound = verification.sound and (verification.complete or not complete)
    copies = f", {verification.copies} published again with the same bytes" if verification.copies else ""
    counts = f"{counted(verification.streams, 'stream')}, {counted(verification.events, 'event')}"
    print(f"{'sound' if sound else 'NOT SOUND'}: {counts}{copies}")
    raise typer.Exit(int(not sound))


@audit_app.command()
def heads(
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    config: ConfigOption = None,
    file: FileOption = None,
) -> None:
    """Write every stream's newest event and its hash to a file, for verify --heads.

    Keep the file where those who can write to the topic or the store cannot change it.
    """
    from worker.audit.export import write_heads
    from worker.audit.verify import verify as examine

    verification = examine(_records(config, file))
    if not verification.sound:
        raise StateError("the trail is not sound, so no heads are written: 'driftkeel audit verify' says why")
    print(f"{output}: {counted(len(verification.heads), 'stream')}, SHA-256 {write_heads(verification.heads, output)}")


def _records(config: Path | None, file: Path | None, since: datetime | None = None) -> Iterator[Record]:
    from worker.audit.read import read_file, read_topic

    return read_file(file) if file is not None else read_topic(load_config(config).kafka, since)


def _readable(records: Iterable[Record]) -> Iterator[Record]:
    """The records that could be read; at the end a line on standard error says how many could not."""
    damaged: list[Record] = []
    for record in records:
        if record.damage:
            damaged.append(record)
        else:
            yield record
    if damaged:
        missing = counted(sum(record.records for record in damaged), "record")
        print(f"driftkeel: {missing} left out; {damaged[0].damage}", file=sys.stderr)


def _wanted(streams: list[str] | None, since: datetime | None, until: datetime | None) -> EventFilter:
    from worker.audit.read import EventFilter

    return EventFilter(frozenset(streams or ()), as_utc(since), as_utc(until))


def _histories(config: Path | None, file: Path | None, wanted: EventFilter) -> dict[str, History]:
    from worker.audit.read import Coverage, histories

    coverage = Coverage()
    found = histories(_readable(_records(config, file, wanted.since)), wanted, coverage)
    _say_coverage(coverage, set(found), wanted)
    return found


def _events(histories: dict[str, History]) -> int:
    return sum(map(len, histories.values()))


def _say_coverage(coverage: Coverage, found: set[str], wanted: EventFilter) -> None:
    """Say what else was read. Raises StateError if there were no update events at all, or a stream has none."""
    if coverage.strays and not (coverage.events or found):
        raise StateError(
            f"{coverage.first_stray} is not an update event, and there are none; --file needs a jsonl export"
        )
    if coverage.strays:
        print(
            f"driftkeel: {counted(coverage.strays, 'record')} left out, no update events; first {coverage.first_stray}",
            file=sys.stderr,
        )
    if missing := sorted(wanted.streams - found):
        raise StateError(f"no events of stream {missing[0]!r} found; without --stream all streams are shown")


def _stored_ends(config: Path | None) -> tuple[dict[str, StreamHeader], list[Record]]:
    """Every stream's header in the store, and the events stored beside the headers, published or not yet."""
    from schemas.state import StreamHeader, decode_header
    from worker.audit.read import Record
    from worker.store.store import StateStore
    from worker.streams.last_events import after_last_event, lines_beside

    client = StateStore(load_config(config).store)
    headers: dict[str, StreamHeader] = {}
    beside: list[Record] = []
    for name in client.deleted_streams():
        event = client.deleted(name) or b""
        headers[name] = after_last_event(StreamHeader(stream=name, bundle="", method=""), event)
        beside += [Record(line, f"where stream {name} was deleted in the store") for line in lines_beside(event)]
    for name, header, event in client.ends():
        # If its header cannot be read, the next worker continues from the event beside it.
        headers[name] = after_last_event(StreamHeader(stream=name, bundle="", method=""), event)
        try:
            headers |= {name: decode_header(header)} if header else {}
        except StateError as error:
            beside.append(Record(b"", f"the state of {name} in the store", str(error)))
        beside += [Record(line, f"beside the state of {name} in the store") for line in lines_beside(event)]
    client.close()
    return headers, beside
