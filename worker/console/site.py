"""What the workers' own /metrics say of the whole site: are they there, how fast, how far behind."""

from __future__ import annotations

import http.client
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

EVERY_S = 2.0
TIMEOUT_S = 3.0
MAX_BYTES = 8 << 20
PREDICTIONS, LAG, BAD = "driftkeel_predictions_total", "driftkeel_consumer_lag_records", "driftkeel_bad_frames_total"


@dataclass
class _Worker:
    url: str
    up: bool = False
    at: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    per_second: float = 0.0


class Site(threading.Thread):
    """Asks every worker every two seconds."""

    def __init__(self, urls: list[str], stop: threading.Event) -> None:
        super().__init__(name="console-metrics", daemon=True)
        self._stop_event = stop
        self._workers = [_Worker(url) for url in urls]

    def run(self) -> None:
        while not self._stop_event.is_set():
            for worker in self._workers:
                _ask(worker)
            self._stop_event.wait(EVERY_S)

    def figures(self) -> dict[str, Any]:
        """Sums over the workers that answer."""
        up = [worker for worker in self._workers if worker.up]
        return {
            "workers": len(self._workers),
            "up": len(up),
            "per_second": sum(worker.per_second for worker in up),
            "lag": sum(worker.sums.get(LAG, 0.0) for worker in up),
            "bad": sum(worker.sums.get(BAD, 0.0) for worker in up),
        }


def _ask(worker: _Worker) -> None:
    try:
        with urllib.request.urlopen(worker.url, timeout=TIMEOUT_S) as answer:  # noqa: S310 - the configuration's URL
            text = answer.read(MAX_BYTES).decode(errors="replace")
        sums = read_sums(text)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError):
        worker.up, worker.at = False, 0.0
        return
    now = time.monotonic()
    if worker.at and sums[PREDICTIONS] >= worker.sums.get(PREDICTIONS, 0.0):
        worker.per_second = (sums[PREDICTIONS] - worker.sums[PREDICTIONS]) / (now - worker.at)
    worker.up, worker.at, worker.sums = True, now, sums


def read_sums(text: str) -> dict[str, float]:
    """Of the series wanted here, summed over their labels. Raises ValueError for text that is no exposition."""
    sums = dict.fromkeys((PREDICTIONS, LAG, BAD), 0.0)
    # The parser takes time for every line; most are of histograms.
    lines = [line for line in text.splitlines() if line.startswith(tuple(sums))]
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            if sample.name in sums:
                sums[sample.name] += sample.value
    return sums
