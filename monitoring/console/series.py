"""The newest points of a stream for its charts, in bounded memory."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import numpy.typing as npt

from schemas.update import Decision, UpdateEvent

DECISIONS = (*get_args(Decision), "refused")  # "refused": skipped by the guard; stream.js has the same list
COLUMNS = (
    *("time", "accuracy", "low", "high", "source", "entropy", "raw", "generated", "cosine", "distance", "flips"),
    "decision",  # place in DECISIONS
)
CAPACITY = 480


class Series:
    """A ring of points, one per update event. Points are numbered from the first one ever."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.count = 0
        # Allocated as points come, as most of many streams have few.
        self._capacity = capacity
        self._values: npt.NDArray[np.float64] = np.empty((0, len(COLUMNS)))

    def add(self, event: UpdateEvent, refused: bool) -> None:
        """Add the point of an event."""
        if self.count >= len(self._values) and len(self._values) < self._capacity:
            grown = np.full((min(self._capacity, max(32, 2 * len(self._values))), len(COLUMNS)), np.nan)
            grown[: len(self._values)] = self._values
            self._values = grown
        self._values[self.count % self._capacity] = _point(event, refused)
        self.count += 1

    def since(self, number: int) -> dict[str, list[float | None]]:
        """The columns of the points from `number` on that are kept; None for unknown values."""
        rows = self._rows(max(number, self.count - self._capacity))
        return {name: [_plain(value) for value in rows[:, i].tolist()] for i, name in enumerate(COLUMNS)}

    def known(self, column: str, points: int = CAPACITY) -> npt.NDArray[np.float64]:
        """The known values among the newest `points` of a column."""
        values = self._rows(max(0, self.count - min(points, self._capacity)))[:, COLUMNS.index(column)]
        return values[np.isfinite(values)]

    def outline(self, column: str, points: int) -> npt.NDArray[np.float64]:
        """The whole column as at most `points` means of neighbours."""
        values = self.known(column)
        if len(values) <= points:
            return values
        # Blocks are aligned to the first value ever, so that a new value does not change all means.
        size = -(-len(values) // points)
        skip = (size - (self.count - len(values)) % size) % size
        whole = (len(values) - skip) // size * size
        return values[skip : skip + whole].reshape(-1, size).mean(1)

    def _rows(self, begin: int) -> npt.NDArray[np.float64]:
        return self._values[np.arange(begin, max(begin, self.count)) % self._capacity]


def _point(event: UpdateEvent, refused: bool) -> list[float]:
    after = event.after
    values = [
        event.time.timestamp(),
        *((after.estimated_accuracy, after.low, after.high, after.source_accuracy) if after else [None] * 4),
        after.entropy if after else event.entropy,
        *(event.raw_gradient_norm, event.generated_gradient_norm, event.cosine, event.source_distance),
        after.flip_rate if after else None,
        float(DECISIONS.index("refused" if refused else event.decision)),
    ]
    return [float("nan") if value is None else value for value in values]


def _plain(value: float) -> float | None:
    # JSON knows neither NaN nor infinity; six digits are more than a screen has pixels.
    if not math.isfinite(value):
        return None
    return round(value, 3) if value > 1e6 else float(f"{value:.6g}")
