"""The files of a benchmark: journal, report, and the run file beside the report.

A report is a list of records; the run file says how they were made. The journal has a line for each finished cell of a
run in progress. Report and run file together contain what the journal does, so that a run can be resumed from them.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from meta.benchmark.plan import Cell
from meta.benchmark.streams import Stream
from schemas.errors import ConfigError


class Record(TypedDict):
    """The accuracy of a method under one shift: the mean over the frames of one seed."""

    data: str
    model: str
    setting: str
    shift: str
    severity: int
    batch: int
    method: str
    variant: str
    seed: int
    accuracy: float
    source_accuracy: float


def identity(record: Record) -> tuple[Any, ...]:
    """All fields of a record but the measured ones."""
    return tuple(value for name, value in record.items() if name not in ("accuracy", "source_accuracy"))


def records_of(cell: Cell, streams: list[Stream], right: list[np.ndarray], source: list[np.ndarray]) -> list[Record]:
    """The records of a cell, one per setting, seed, shift and severity; right and source (L,) bool for each stream."""
    sums: dict[tuple[str, int, str, int], list[float]] = {}
    for stream, ours, theirs in zip(streams, right, source, strict=True):
        for code, (shift, severity) in enumerate(stream.conditions):
            mine = stream.condition == code
            total = sums.setdefault((stream.setting, stream.seed, shift, severity), [0.0, 0.0, 0.0])
            total[0] += float(ours[mine].sum())
            total[1] += float(theirs[mine].sum())
            total[2] += float(mine.sum())
    return [
        Record(
            data=cell.data,
            model=cell.model,
            setting=setting,
            shift=shift,
            severity=severity,
            batch=cell.batch,
            method=cell.method,
            variant=cell.variant,
            seed=seed,
            accuracy=round(ours / count, 5),
            source_accuracy=round(theirs / count, 5),
        )
        for (setting, seed, shift, severity), (ours, theirs, count) in sums.items()
    ]


class Journal:
    """Finished work, one JSON object per line. An incomplete last line is ignored, and its work done again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue
                self.entries[entry["key"]] = entry

    @classmethod
    def beside(cls, report: Path) -> Journal:
        """The journal of an accuracy report, with the entries that only the report has. Raises ConfigError."""
        journal = cls(report.with_suffix(".jsonl"))
        if report.exists():
            try:
                made, records = (json.loads(path.read_text(encoding="utf-8")) for path in (run_file(report), report))
                finished = _entries(made, records)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{report} with {run_file(report).name} beside it is no accuracy report ({error!r}); name another "
                    "file, or move it"
                ) from error
            journal.entries = {**finished, **journal.entries}
        return journal

    def get(self, key: str) -> dict[str, Any] | None:
        """The entry of this key; None if there is none yet."""
        return self.entries.get(key)

    def add(self, key: str, **content: Any) -> dict[str, Any]:
        """Append an entry to the journal's file."""
        entry = {"key": key, **content}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        ended = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("" if ended else "\n") + _compact(entry) + "\n")
        self.entries[key] = entry
        return entry


def run_file(report: Path) -> Path:
    """The path of a report's run file: command, commit, plan, source models, and the cells."""
    return report.with_suffix(".run.json")


def write_report(
    path: Path, journal: Journal, keys: list[str], command: str, config: dict[str, Any], models: list[dict[str, Any]]
) -> None:
    """Write the records of the cells `keys`, and the run file.

    Records are in the order of the cells, and the run file has the number of records of each cell. If two cells
    measured the same, because one has fewer seeds, the later one keeps the record.
    """
    done = [journal.entries[key] for key in keys if key in journal.entries]
    owner = {identity(record): number for number, entry in enumerate(done) for record in entry["records"]}
    done = [
        {**entry, "records": [record for record in entry["records"] if owner[identity(record)] == number]}
        for number, entry in enumerate(done)
    ]
    made = {
        "command": command,
        "commit": commit(),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config,
        "models": models,
        "cells": [{**entry, "records": len(entry["records"])} for entry in done],
    }
    parts = [
        f' "{name}": {_rows(value) if isinstance(value, list) else json.dumps(value)}' for name, value in made.items()
    ]
    _replace(run_file(path), "{\n" + ",\n".join(parts) + "\n}\n")
    _replace(path, _rows([record for entry in done for record in entry["records"]]) + "\n")


def _entries(made: dict[str, Any], every: list[Record]) -> dict[str, dict[str, Any]]:
    """The journal's entries, restored from report and run file, but for those of tuning, which the cells repeat."""
    entries = {model["key"]: model for model in made["models"]}
    if sum(cell["records"] for cell in made["cells"]) != len(every):
        raise ValueError("the two files are of different runs")
    records = iter(every)
    for cell in made["cells"]:
        entries[cell["key"]] = {**cell, "records": list(islice(records, cell["records"]))}
    return entries


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _compact(value: Any) -> str:
    """JSON without spaces: there are tens of thousands of records."""
    return json.dumps(value, separators=(",", ":"))


def _rows(values: Sequence[Any]) -> str:
    """A JSON list with one record or cell per line, so that a diff of two reports is readable."""
    return "[\n" + ",\n".join(_compact(value) for value in values) + "\n]"


def commit() -> str:
    """The commit of this working tree, followed by + if tracked files were changed; empty outside of one."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        described = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return ""
    return described.stdout.strip()
