"""The steps under way: which passes begin, in which thread, and when their steps are finished."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from functools import partial
from typing import Any

from monitoring.metrics import WorkerMetrics
from schemas.config import WorkerConfig
from worker.parts import Parts
from worker.step import Flight

GLANCE_S = 0.01  # the longest wait for a pass before the loop does its other work
LATELY_S = 10.0  # how long the largest pass is taken as the measure of the next ones
HUNG_AFTER_S = 600.0  # no pass takes so long
HERE_S = 0.25  # the longest pass, in processor time, that may run in the loop's own thread, which stands still for it


class Flights:
    """Up to `threads` passes at a time, each in a thread. With a single thread, short passes run in the worker's loop
    itself. Belongs to the loop."""

    def __init__(
        self, config: WorkerConfig, parts: Parts, metrics: WorkerMetrics, threads: int, stop: threading.Event
    ) -> None:
        self._parts, self._metrics, self._stop = parts, metrics, stop
        self.threads, self._most = threads, config.batch.max_pass
        self._full = config.batch.max_pass - config.batch.max_batch  # frames above which no further micro-batch fits
        self._alone = threads == 1 and config.device == "cpu"
        self._under_way: list[Flight] = []
        self._span, self._frames = math.inf, 1  # processor time and frames of the largest pass lately
        self._measured = self._ended = 0.0  # when that pass ended, and when the newest one did

    def __bool__(self) -> bool:
        return bool(self._under_way)

    @property
    def streams(self) -> set[str]:
        """Streams in a step that is not finished."""
        return set().union(*(flight.streams for flight in self._under_way))

    @property
    def hang(self) -> bool:
        """Whether a pass in a thread takes longer than any does, as on a device that does not answer."""
        passes = (flight for flight in self._under_way if not (flight.here or flight.adapted.done()))
        return any(time.monotonic() - flight.started > HUNG_AFTER_S for flight in passes)

    @property
    def here(self) -> bool:
        """Whether passes run in the loop's own thread for now.

        Two threads that compute wait for each other's interpreter lock most of the time. Long passes hardly need the
        lock, and would hold up the loop; and the loop must not wait for a GPU.
        """
        return self._alone and self._span < HERE_S

    @property
    def takes_in(self) -> bool:
        """Whether the next pass waits until frames that came during the last one are decoded, which fills it better.
        It waits at most as long as a pass takes."""
        return self.here and self._parts.decoding.busy and time.monotonic() < self._ended + self._span

    def begin(self) -> None:
        """Begin passes of what is due, one for every idle thread; a full one may also wait for the next idle thread.
        In the loop's own thread a second one begins where the first was full.

        A pass that is not full does not wait for a thread: more frames may come until there is one, and a larger pass
        costs less per frame.
        """
        parts = self._parts
        while (idle := self.threads - sum(not flight.adapted.done() for flight in self._under_way)) >= 0:
            parts.intake.drop_late(parts.batcher)  # In every round: a pass in this thread takes time.
            busy, here = self.streams | parts.control.due, self.here and not self._thread_busy
            least = 1 if idle or here else self._most
            predicts_only = partial(parts.scheduler.predicts_only, now=time.time())
            due = parts.batcher.take(time.monotonic(), self._most, busy, max(1, idle), least, predicts_only)
            if not due:
                return
            frames = sum(len(batch.frames) for batch in due)
            here = here and self._expected(frames) < HERE_S
            self._metrics.pass_streams.observe(len(due))
            flight = parts.step.start(parts.scheduler.decide(due, time.time()), here)
            self._under_way.append(flight)
            if here:
                self._answered(flight)
                if frames <= self._full:
                    return

    def move_on(self, others: Sequence[Future[Any]]) -> Iterator[tuple[list[str], float]]:
        """Wait a moment for passes or `others`, unless updates are to be computed in this thread. Publish what is
        predicted, finish what is adapted.

        Yields for each finished step the streams that another worker has claimed, and how many seconds ago it began.
        """
        if not self._updates_due:
            wait_for([*(flight.next for flight in self._under_way), *others], GLANCE_S, FIRST_COMPLETED)
        for flight in list(self._under_way):
            if flight.here and not flight.adapted.done():
                self._parts.step.adapt(flight)
            if not flight.published and flight.next.done():
                self._parts.step.publish(flight)
                self._answered(flight)
            if flight.adapted.done():
                self._took(flight)
                if not (self.here or self._updates_due or self._stop.is_set()):
                    self.begin()
                fenced = self._parts.step.finish(flight)
                self._under_way.remove(flight)
                yield fenced, time.monotonic() - flight.started

    @property
    def _thread_busy(self) -> bool:
        """Whether a pass runs in a thread."""
        return any(not (flight.here or flight.adapted.done()) for flight in self._under_way)

    @property
    def _updates_due(self) -> bool:
        """Whether a pass in this thread has predicted and is still to compute its updates."""
        return any(flight.here and not flight.adapted.done() for flight in self._under_way)

    def _expected(self, frames: int) -> float:
        """An upper bound of a pass's seconds, in proportion to its frames: some of the cost does not grow with them."""
        return self._span * max(1.0, frames / self._frames)

    def _took(self, flight: Flight) -> None:
        # In this order: where a forward in a thread has failed, `adapted` has the error and `predicted` never ends.
        (_, adapted), (passed, predicted) = flight.adapted.result(), flight.predicted.result()
        frames = sum(len(prediction.batch.frames) for prediction in passed.predictions)
        span, self._ended = predicted.processor + adapted.processor, adapted.done
        if frames >= self._frames or span > self._span or self._ended - self._measured > LATELY_S:
            self._span, self._frames, self._measured = span, frames, self._ended

    def _answered(self, flight: Flight) -> None:
        self._parts.lateness.took(flight.publishing[1] - flight.started, time.time())
