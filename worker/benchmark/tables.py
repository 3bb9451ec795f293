"""Markdown tables of any benchmark's report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError, DataError


def markdown(report: Path, plot: Path | None = None) -> str:
    """The tables; `plot` also draws the gains of an accuracy report there. Raises DataError, ConfigError."""
    content = _read(report)
    if isinstance(content, list):
        from meta.benchmark import tables

        results = tables.Results(tables.read_records(report))
        if plot is not None:
            tables.plot(results, plot)
        return tables.markdown(results).rstrip("\n")
    if plot is not None:
        raise ConfigError(f"--plot draws a report of 'driftkeel benchmark accuracy', which {report} is not")
    if "ratios" in content:
        from worker.benchmark.throughput_tables import throughput_tables

        return throughput_tables(content)
    from worker.benchmark.trust_tables import guard_tables, proxies_tables

    if "attacks" in content:
        return guard_tables(content)
    if "results" in content:
        return proxies_tables(content)
    raise DataError(f"{report} is no report of a benchmark")


def _read(report: Path) -> dict[str, Any] | list[Any]:
    try:
        content = json.loads(report.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{report} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{report} is no report of a benchmark: {error}") from error
    return content if isinstance(content, dict | list) else {}
