"""Tables and a plot from a benchmark's report, computed from its records alone.

A *cell* here is one data set, model, batch size, setting, shift and severity, averaged over seeds. *Gain* is adapted
minus source accuracy of the same frames, in points. Means over shifts give every shift the same weight.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import NamedTuple

from meta.benchmark.report import Record, identity
from meta.benchmark.streams import DRIFT, SETTINGS
from schemas.errors import DataError


class Place(NamedTuple):
    """Where methods are compared."""

    data: str
    model: str
    batch: int


class Entry(NamedTuple):
    """Who is compared."""

    method: str
    variant: str

    def __str__(self) -> str:
        return f"{self.method} ({self.variant})" if self.variant else self.method


OURS = Entry("mgg", "ours")
TOLERATED = 0.5  # points that a cell may lose
ROUNDING = 1e-9  # bound on rounding errors in a mean gain


def read_records(path: Path) -> list[Record]:
    """The records of a report. Raises DataError."""
    try:
        records: list[Record] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no report of the benchmark: {error}") from error
    if not records:
        raise DataError(f"{path} has no records")
    if not all(isinstance(record, dict) and record.keys() == Record.__annotations__.keys() for record in records):
        raise DataError(f"{path} is no report of a benchmark: it is no list of records {{data, model, setting, ...}}")
    return records


class Results:
    """Statistics of records. Raises DataError if two records measure the same: means would count it twice."""

    def __init__(self, records: Sequence[Record]) -> None:
        if twice := [key for key, times in Counter(map(identity, records)).items() if times > 1]:
            raise DataError(f"{len(twice)} results are there twice, the first of {twice[0]}; write the report anew")
        self._by: dict[tuple[Place, Entry, str], list[Record]] = defaultdict(list)
        for record in records:
            place = Place(record["data"], record["model"], record["batch"])
            self._by[place, Entry(record["method"], record["variant"]), record["setting"]].append(record)
        self.places = sorted({place for place, _, _ in self._by})
        self.entries = sorted({entry for _, entry, _ in self._by}, key=_rank)
        present = {setting for _, _, setting in self._by}
        self.settings = [setting for setting in SETTINGS if setting in present]

    def records(self, place: Place, entry: Entry, setting: str) -> list[Record]:
        """The records of a method in a setting."""
        return self._by.get((place, entry, setting), [])

    def by_seed(self, place: Place, entry: Entry, setting: str) -> dict[int, float]:
        """Mean accuracy in percent, by seed."""
        found: dict[int, dict[tuple[str, int], float]] = defaultdict(dict)
        for r in self.records(place, entry, setting):
            found[r["seed"]][r["shift"], r["severity"]] = 100 * r["accuracy"]
        return {seed: fmean(shifts.values()) for seed, shifts in found.items()}

    def accuracy(self, place: Place, entry: Entry, setting: str) -> tuple[float, float] | None:
        """Mean accuracy in percent and its standard deviation over seeds (0 for one seed)."""
        means = list(self.by_seed(place, entry, setting).values())
        return _over_seeds(means) if means else None

    def gains(self, place: Place, entry: Entry, setting: str) -> dict[tuple[str, int], float]:
        """Gain in points by shift and severity, averaged over seeds."""
        values: dict[tuple[str, int], list[float]] = defaultdict(list)
        for r in self.records(place, entry, setting):
            values[r["shift"], r["severity"]].append(100 * (r["accuracy"] - r["source_accuracy"]))
        return {key: fmean(found) for key, found in values.items()}

    def mean_gain(self, place: Place, entry: Entry, setting: str) -> float | None:
        """Mean gain over source in points; None without records."""
        gains = self.gains(place, entry, setting)
        return fmean(gains.values()) if gains else None

    def spread(self, place: Place, entry: Entry) -> float | None:
        """Standard deviation of the gain over shifts, averaged over the settings of drift.

        Other settings are left out: few methods were run on them, and means over different settings do not compare.
        """
        found = [list(self.gains(place, entry, setting).values()) for setting in DRIFT]
        spreads = [pstdev(gains) for gains in found if len(gains) > 1]
        return fmean(spreads) if spreads else None

    def worst(self, place: Place, entry: Entry) -> tuple[float, str] | None:
        """The lowest gain of all cells, and the name of the cell."""
        found = [
            (gain, f"{setting}, {shift} {severity}")
            for setting in self.settings
            for (shift, severity), gain in self.gains(place, entry, setting).items()
        ]
        return min(found) if found else None

    def oracle_share(self, place: Place, entry: Entry) -> float | None:
        """Gain in percent of the oracle's, both summed over the settings of drift: in a setting where the oracle gains
        little, the ratio alone would be meaningless. None if the oracle gains less than a point on average."""
        pairs = [[self.mean_gain(place, e, setting) for e in (entry, Entry("oracle", ""))] for setting in DRIFT]
        both = [(ours, best) for ours, best in pairs if ours is not None and best is not None]
        gained, most = (sum(gains) for gains in zip(*both, strict=True)) if both else (0.0, 0.0)
        return 100 * gained / most if most > len(both) else None

    def best_baseline(self, place: Place, setting: str, variant: str) -> tuple[Entry, float] | None:
        """The baseline with the highest accuracy, and that accuracy in percent."""
        found = []
        for entry in self.entries:
            value = self.accuracy(place, entry, setting)
            if value is not None and entry.method not in ("mgg", "oracle", "source") and entry.variant == variant:
                found.append((value[0], entry))
        return (max(found)[1], max(found)[0]) if found else None

    def margin(self, place: Place, entry: Entry, setting: str) -> tuple[float, float] | None:
        """Points of accuracy above the best baseline, published or tuned, and the standard deviation over seeds, paired
        as both see the same streams (0 for one seed, or if the seeds differ). None if either was not run."""
        own = self.by_seed(place, entry, setting)
        both = [self.best_baseline(place, setting, variant) for variant in ("published", "tuned")]
        found = [best for best in both if best is not None]
        if not own or not found:
            return None
        theirs = self.by_seed(place, max(found, key=lambda best: best[1])[0], setting)
        if own.keys() == theirs.keys():
            return _over_seeds([own[seed] - theirs[seed] for seed in own])
        return fmean(own.values()) - fmean(theirs.values()), 0.0


def _over_seeds(values: list[float]) -> tuple[float, float]:
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def _rank(entry: Entry) -> tuple[int, str, str]:
    return ({"source": 0, "mgg": 2, "oracle": 3}.get(entry.method, 1), entry.method, entry.variant)


def markdown(results: Results) -> str:
    """All tables in Markdown: the margins of `mgg`, then a section per data set, model and batch size."""
    parts = [table] if (table := margins_table(results)) else []
    for place in results.places:
        parts.append(f"### {place.data}, {place.model}, batches of {place.batch}\n")
        parts.append(accuracy_table(results, place))
        parts.append(leaders_table(results, place))
    return "\n".join(parts)


def accuracy_table(results: Results, place: Place) -> str:
    """Mean accuracy per setting, then spread over shifts, worst cell, share of the oracle's gain."""
    settings = [s for s in results.settings if any(results.records(place, e, s) for e in results.entries)]
    head = ["accuracy, %", *settings, "spread", "worst cell", "of oracle"]
    rows = []
    for entry in results.entries:
        values = [results.accuracy(place, entry, setting) for setting in settings]
        if not any(values):
            continue
        spread, worst = results.spread(place, entry), results.worst(place, entry)
        share = results.oracle_share(place, entry)
        rows.append(
            [
                str(entry),
                *[_with_deviation(value) for value in values],
                "" if spread is None else f"{spread:.1f}",
                "" if worst is None else f"{worst[0]:+.1f} ({worst[1]})",
                "" if share is None else f"{share:.0f}%",
            ]
        )
    return _table(head, rows)


def margins_table(results: Results) -> str:
    """Margins of `mgg (ours)` above the best baseline, and the number of cells in which it loses to the source model.

    Empty if `mgg` or all baselines were not run.
    """
    rows = []
    for place in results.places:
        margins = [results.margin(place, OURS, setting) for setting in results.settings]
        if any(margin is not None for margin in margins):
            gains = [gain for setting in results.settings for gain in results.gains(place, OURS, setting).values()]
            lost = f"{sum(gain < -TOLERATED - ROUNDING for gain in gains)} of {len(gains)}"
            row = [f"{place.data}, {place.model}, {place.batch}"]
            rows.append([*row, *[_with_deviation(margin, "+") for margin in margins], lost])
    head = ["ours over the best baseline, points", *results.settings, f"cells that lose over {TOLERATED}"]
    return _table(head, rows) if rows else ""


def leaders_table(results: Results, place: Place) -> str:
    """The baseline to beat in each setting, published and tuned."""
    rows = []
    run = [e for e in results.entries if any(results.records(place, e, setting) for setting in results.settings)]
    own = [entry for entry in run if entry.method in ("source", "mgg", "oracle")]
    for setting in results.settings:
        row = [setting]
        for variant in ("published", "tuned"):
            best = results.best_baseline(place, setting, variant)
            row.append("" if best is None else f"{best[0].method} {best[1]:.1f}")
        row += [_with_deviation(results.accuracy(place, entry, setting)) for entry in own]
        if any(row[1:]):
            rows.append(row)
    return _table(["setting", "best published", "best tuned", *map(str, own)], rows)


def _with_deviation(value: tuple[float, float] | None, sign: str = "") -> str:
    if value is None:
        return ""
    mean = f"{value[0]:{sign}.1f}"
    return f"{mean} ± {value[1]:.1f}" if value[1] else mean


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(head), " | ".join(["---", *["--:"] * (len(head) - 1)]), *[" | ".join(row) for row in rows]]
    return "".join(f"| {line} |\n" for line in lines)


def plot(results: Results, path: Path) -> None:
    """Gain per setting of every method, one panel per data set, model and batch size. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = 1.2 + 0.22 * len(results.entries)
    figure, axes = pyplot.subplots(
        len(results.places), 1, figsize=(9, height * len(results.places)), squeeze=False, layout="constrained"
    )
    for axis, place in zip(axes[:, 0], results.places, strict=True):
        entries = [e for e in results.entries if any(results.records(place, e, s) for s in results.settings)]
        for i, setting in enumerate(results.settings):
            points = [(results.mean_gain(place, e, setting), y) for y, e in enumerate(reversed(entries))]
            seen = [(gain, y) for gain, y in points if gain is not None]
            axis.scatter([g for g, _ in seen], [y for _, y in seen], s=22, color=f"C{i}", label=setting, alpha=0.8)
        axis.axvline(0, color="0.4", linewidth=0.8)
        axis.set_yticks(range(len(entries)), [str(e) for e in reversed(entries)], fontsize=8)
        axis.grid(axis="y", color="0.9")
        axis.set_title(f"{place.data}, {place.model}, batches of {place.batch}", fontsize=9, loc="left")
        axis.set_xlabel("accuracy gained over the source model, points", fontsize=8)
    axes[0, 0].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
