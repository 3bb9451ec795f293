"""Reads the workers' metrics: which workers answer, their throughput and their lag."""

from __future__ import annotations

import http.client
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

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


class WorkerScrape(threading.Thread):
    """A thread that scrapes every worker every two seconds."""

    def __init__(self, urls: list[str], stop: threading.Event) -> None:
        super().__init__(name="console-metrics", daemon=True)
        self._stop_event = stop
        self._urls = urls
        self._workers: dict[str, _Worker] = {}

    def run(self) -> None:
        while not self._stop_event.is_set():
            urls = [address for url in self._urls for address in every_address(url)]
            workers = {url: self._workers.get(url) or _Worker(url) for url in urls}
            self._workers = workers
            for worker in workers.values():
                _ask(worker)
            self._stop_event.wait(EVERY_S)

    def figures(self) -> dict[str, Any]:
        """Totals of the workers that answer."""
        workers = list(self._workers.values())
        up = [worker for worker in workers if worker.up]
        return {
            "workers": len(workers),
            "up": len(up),
            "per_second": sum(worker.per_second for worker in up),
            "lag": sum(worker.sums.get(LAG, 0.0) for worker in up),
            "bad": sum(worker.sums.get(BAD, 0.0) for worker in up),
        }


def every_address(url: str) -> list[str]:
    """A URL for each address of the host: the name of a headless service stands for several workers."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:  # A certificate is for the name, not for addresses.
        return [url]
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except OSError:
        return [url]
    hosts = sorted({str(address[0]) for _, _, _, _, address in found})
    # A worker may have an IPv4 and an IPv6 address: count it once.
    chosen = [host for host in hosts if ":" not in host] or [f"[{host}]" for host in hosts]
    return [parts._replace(netloc=f"{host}:{parts.port or 80}").geturl() for host in chosen]


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
    """The three metrics shown here, summed over their labels. Raises ValueError if the text is no exposition."""
    sums = dict.fromkeys((PREDICTIONS, LAG, BAD), 0.0)
    # Parsing is slow, and most lines are of histograms.
    lines = [line for line in text.splitlines() if line.startswith(tuple(sums))]
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            if sample.name in sums:
                sums[sample.name] += sample.value
    return sums
