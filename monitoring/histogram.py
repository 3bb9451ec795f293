"""A histogram that takes the values of a whole pass at once: the client library's costs more per value than a
prediction."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from time import time

from prometheus_client import CollectorRegistry
from prometheus_client.core import Exemplar, HistogramMetricFamily
from prometheus_client.registry import Collector

LONGEST_EXEMPLAR = 120  # OpenMetrics allows 128 characters for an exemplar's label and value together


class FrameHistogram(Collector):
    """Classic buckets. In OpenMetrics scrapes the exemplar of a bucket is the last frame that was named in it."""

    def __init__(self, name: str, text: str, buckets: Sequence[float], registry: CollectorRegistry) -> None:
        self._name, self._text = name, text
        self._bounds = (*buckets, float("inf"))
        self._counts, self._sum = [0] * len(self._bounds), 0.0
        self._exemplars: dict[int, Exemplar] = {}
        registry.register(self)

    def observe_many(self, values: Iterable[float], named: tuple[float, str] | None = None) -> None:
        """Add finite values. Called from one thread only. `named` is one of them with its frame's position."""
        bounds, counts, total = self._bounds, self._counts, 0.0
        for value in values:
            counts[bisect_left(bounds, value)] += 1
            total += value
        self._sum += total
        if named is not None and len(named[1]) <= LONGEST_EXEMPLAR:
            value, position = named
            self._exemplars[bisect_left(bounds, value)] = Exemplar({"frame": position}, value, time())

    def collect(self) -> Iterable[HistogramMetricFamily]:
        labels = [*(str(float(bound)) for bound in self._bounds[:-1]), "+Inf"]
        totals = map(float, accumulate(list(self._counts)))
        exemplars = dict(self._exemplars)
        buckets = [
            (label, total, exemplars[i]) if i in exemplars else (label, total)
            for i, (label, total) in enumerate(zip(labels, totals, strict=True))
        ]
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)
