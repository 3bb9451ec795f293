"""`driftkeel compare`: how two groups of workers answer the same frames, such as with an old and a new bundle."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime

from rich.table import Table
from rich.text import Text

from schemas.config import WorkerConfig
from schemas.errors import ConfigError
from schemas.prediction import Prediction
from worker.kafka.batches import PassedOver
from worker.kafka.topic import records_now
from worker.terminal import printable
from worker.watch import parsed

ALL = "all"


@dataclass(frozen=True, slots=True)
class ComparedAnswer:
    """The part of a prediction that is compared, and no more of it, as there may be millions."""

    id: str
    stream: str
    event_time: datetime
    label: str
    confidence: float
    estimated_accuracy: float | None
    bundle: str


@dataclass
class Agreement:
    """Of the frames that both have answered: how many, how many with the same label, and the mean estimated accuracy of
    each; None where it is not estimated for all."""

    frames: int = 0
    alike: int = 0
    first: float | None = 0.0
    second: float | None = 0.0

    def add(self, one: ComparedAnswer, other: ComparedAnswer) -> None:
        """Count one more frame."""
        self.frames += 1
        self.alike += one.label == other.label
        self.first = _moved(self.first, one.estimated_accuracy, self.frames)
        self.second = _moved(self.second, other.estimated_accuracy, self.frames)


def _moved(mean: float | None, value: float | None, count: int) -> float | None:
    return None if mean is None or value is None else mean + (value - mean) / count


@dataclass
class Comparison:
    """`streams`: those with frames that both have answered. `differing`: the pairs whose labels differ, newest last.
    `alone`: how many frames only the first has answered, and how many only the second."""

    streams: dict[str, Agreement] = field(default_factory=dict)
    total: Agreement = field(default_factory=Agreement)
    differing: list[tuple[ComparedAnswer, ComparedAnswer]] = field(default_factory=list)
    alone: tuple[int, int] = (0, 0)
    bundles: tuple[list[str], list[str]] = ([], [])


def must_be_comparable(first: WorkerConfig, second: WorkerConfig) -> None:
    """Raises ConfigError where the two read other frames, or publish to the same topic."""
    one, other = (config.kafka.topics for config in (first, second))
    if one.frames != other.frames:
        raise ConfigError(
            f"kafka.topics.frames are {one.frames} and {other.frames}: only answers to the same frames can be compared"
        )
    if (first.kafka.bootstrap, one.predictions) == (second.kafka.bootstrap, other.predictions):
        raise ConfigError(
            f"both publish to {one.predictions}: give the second a kafka.topics.predictions of its own, as in "
            "docs/upgrade.md"
        )


def answers(
    config: WorkerConfig, since: datetime | None = None, until: datetime | None = None
) -> Iterator[ComparedAnswer]:
    """The answers in a site's predictions topic, as far as it goes now. Records that are no prediction are passed over.
    `since` and `until` are event times. Raises ConfigError where there is no such topic, UnreachableError where the
    broker is away."""
    records = records_now(config.kafka, config.kafka.topics.predictions, since)
    for record in PassedOver().readable(records):
        found = parsed(record.value)
        if found and (since is None or since <= found.event_time) and (until is None or found.event_time < until):
            yield _answer(found)


def _answer(found: Prediction) -> ComparedAnswer:
    stream, label, bundle = map(sys.intern, (found.stream, found.label, found.bundle))
    return ComparedAnswer(found.id, stream, found.event_time, label, found.confidence, found.estimated_accuracy, bundle)


def compared(first: Iterable[ComparedAnswer], second: Iterable[ComparedAnswer]) -> Comparison:
    """Compare frame by frame. If one has answered a frame more than once, as after a crash, the last answer counts."""
    ours, theirs = ({one.id: one for one in given} for given in (first, second))
    both = [(one, theirs[place]) for place, one in ours.items() if place in theirs]
    found = Comparison(
        alone=(len(ours) - len(both), len(theirs) - len(both)),
        bundles=(_bundles(ours.values()), _bundles(theirs.values())),
    )
    for one, other in both:
        for agreement in (found.streams.setdefault(one.stream, Agreement()), found.total):
            agreement.add(one, other)
        if one.label != other.label:
            found.differing.append((one, other))
    found.differing.sort(key=lambda pair: pair[0].event_time)
    return found


def _bundles(given: Iterable[ComparedAnswer]) -> list[str]:
    return sorted({one.bundle for one in given})


def table(comparison: Comparison) -> Table:
    """One row per stream, those that differ most first, and one row for all."""
    made = Table(box=None, header_style="bold")
    made.add_column("stream", overflow="fold")
    for name in ("frames", "same answer", "estimated accuracy", "of the second", "points more"):
        made.add_column(name, justify="right", min_width=max(map(len, name.split())))
    rows = sorted(comparison.streams.items(), key=lambda row: (row[1].alike / row[1].frames, row[0]))
    for name, row in [*rows, (ALL, comparison.total)]:
        if row.frames:
            made.add_row(
                Text(printable(name)),
                f"{row.frames:,}",
                f"{row.alike / row.frames:.1%}",
                "-" if row.first is None else f"{row.first:.1%}",
                "-" if row.second is None else f"{row.second:.1%}",
                "-" if row.first is None or row.second is None else f"{100 * (row.second - row.first):+.1f}",
            )
    return made


def difference(one: ComparedAnswer, other: ComparedAnswer) -> str:
    """A frame whose labels differ, as one line."""
    labels = (f"{printable(each.label)} {each.confidence:.0%}" for each in (one, other))
    return f"{printable(one.id)}  {printable(one.stream)}  " + "  ".join(labels)
