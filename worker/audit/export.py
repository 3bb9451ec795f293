"""The audit trail as files: the published bytes, one event per line, or a table."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError, StateError
from schemas.heads import Head, Heads
from schemas.update import Proxies, UpdateEvent
from worker.audit.read import Record

NESTED = {"schema_version", "frames", "layers", "before", "after"}  # these have no column, or several
PLAIN = tuple(name for name in UpdateEvent.model_fields if name not in NESTED)


def write_lines(records: Iterable[Record], path: Path) -> int:
    """Write every record as published, repeated ones too, for `driftkeel audit verify --file`. Returns their number."""
    count = 0
    with _open(path, "wb") as file:
        for record in records:
            file.write(record.content.replace(b"\n", b" ") + b"\n")
            count += 1
    return count


def layers_of(histories: Iterable[Iterable[UpdateEvent]]) -> list[str]:
    """All layers that the events name, in the order of their first mention."""
    return list(dict.fromkeys(layer for events in histories for event in events for layer in event.layers))


def table(events: Sequence[UpdateEvent], layers: Sequence[str]) -> dict[str, list[Any]]:
    """The events as columns by name, one of them for each layer."""
    columns: dict[str, list[Any]] = {"number": [event.number for event in events]}
    columns |= {name: [getattr(event, name) for event in events] for name in PLAIN}
    columns["frames"] = [len(event.frames) for event in events]
    columns["first_frame"] = [event.frames[0] if event.frames else None for event in events]
    columns["last_frame"] = [event.frames[-1] if event.frames else None for event in events]
    for moment in ("before", "after"):
        for name in Proxies.model_fields:
            columns[f"{moment}_{name}"] = [getattr(getattr(event, moment), name, None) for event in events]
    for layer in layers:
        columns[f"layer_{layer}"] = [event.layers.get(layer) for event in events]
    return columns


def write_csv(histories: Collection[Iterable[UpdateEvent]], path: Path) -> int:
    """Write stream by stream below a header. Times are ISO 8601, unknown ones empty. Returns the number of columns."""
    layers = layers_of(histories)
    with _open(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow(header := list(table([], layers)))
        for events in histories:
            for row in zip(*table(list(events), layers).values(), strict=True):
                writer.writerow([_cell(value) for value in row])
    return len(header)


def write_parquet(histories: Collection[Iterable[UpdateEvent]], path: Path) -> int:
    """Write all events, which have to fit into memory. Returns the number of columns. Raises ConfigError."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError("Parquet needs the package pyarrow: pip install 'driftkeel[parquet]'") from error
    columns = table([event for events in histories for event in events], layers_of(histories))
    with _open(path, "wb") as file:
        parquet.write_table(arrow.table(columns), file)
    return len(columns)


def write_heads(heads: dict[str, Head], path: Path) -> str:
    """Write the file for `driftkeel audit verify --heads`. Returns its SHA-256."""
    content = Heads(time=datetime.now(UTC), streams=heads).model_dump_json(indent=1).encode() + b"\n"
    with _open(path, "wb") as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"  # Stream names and reasons come from outside: a spreadsheet must not take them for formulas.
    return value.isoformat() if hasattr(value, "isoformat") else value


@contextmanager
def _open(path: Path, mode: str) -> Iterator[Any]:
    """The file to write. Raises StateError, also where the disk is full later on."""
    try:
        with path.open(mode) if "b" in mode else path.open(mode, encoding="utf-8", newline="") as file:
            yield file
    except OSError as error:
        raise StateError(f"{path} cannot be written: {error.strerror or error}") from error
