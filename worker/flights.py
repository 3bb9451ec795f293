"""The steps whose passes are under way: which begin, in which thread, and when they are finished."""

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

GLANCE_S = 0.01  # between looks at the rest of the loop while passes run
LATELY_S = 10.0  # for which the largest pass tells what the next ones take
HUNG_AFTER_S = 600.0  # no pass takes so long
HERE_S = 0.25  # of processor time, of a pass in the loop's own thread; the loop stands still meanwhile


class Flights:
    """Up to `threads` passes at a time, each in a thread; of a single lane short ones run in the caller's, the worker's
    loop, to which this belongs."""

    def __init__(
        self, config: WorkerConfig, parts: Parts, metrics: WorkerMetrics, threads: int, stop: threading.Event
    ) -> None:
        self._parts, self._metrics, self._stop = parts, metrics, stop
        self.threads, self._most = threads, config.batch.max_pass
        self._full = config.batch.max_pass - config.batch.max_batch  # frames above which no further micro-batch fits
        self._alone = threads == 1 and config.device == "cpu"
        self._under_way: list[Flight] = []
        self._span, self._frames = math.inf, 1  # of the largest pass lately: processor time, and how many frames it had
        self._measured = self._ended = 0.0  # when that one ended, and the last

    def __bool__(self) -> bool:
        return bool(self._under_way)

    @property
    def streams(self) -> set[str]:
        """Streams in a step that is not finished."""
        return set().union(*(flight.streams for flight in self._under_way))

    @property
    def hang(self) -> bool:
        """Whether a thread has been at a pass for longer than any takes: on a device that does not answer, say."""
        passes = (flight for flight in self._under_way if not (flight.here or flight.adapted.done()))
        return any(time.monotonic() - flight.started > HUNG_AFTER_S for flight in passes)

    @property
    def here(self) -> bool:
        """Whether passes run in the loop's own thread for now.

        Of two threads that compute, each waits for the interpreter most of the time. Long passes hardly need it, and
        would hold up the loop; nor does the loop wait for a GPU.
        """
        return self._alone and self._span < HERE_S

    @property
    def takes_in(self) -> bool:
        """Whether the next pass waits for what came during the last one to be decoded; as long as a pass computes."""
        return self.here and self._parts.decoding.busy and time.monotonic() < self._ended + self._span

    def begin(self) -> None:
        """Begin passes of what is due, as many as there are threads for, and a full one that waits for the next thread;
        a stream is in one at a time. In the loop's own thread, a second one where the first was full.

        A small pass that waited for a thread would cost more a frame than the larger one that could begin in its place.
        """
        parts = self._parts
        while (idle := self.threads - sum(not flight.adapted.done() for flight in self._under_way)) >= 0:
            parts.intake.drop_late(parts.batcher)  # again, after a pass here
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
        """Wait a moment for passes or `others`, or compute the updates of passes in this thread; publish what is
        predicted, finish what is adapted.

        Of each finished step: streams that another worker has claimed, and how many seconds ago it began.
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
        """Whether a thread is at a pass."""
        return any(not (flight.here or flight.adapted.done()) for flight in self._under_way)

    @property
    def _updates_due(self) -> bool:
        """Whether a pass here is still to make its updates."""
        return any(flight.here and not flight.adapted.done() for flight in self._under_way)

    def _expected(self, frames: int) -> float:
        """Seconds of a pass of so many frames, at most: a part of what one takes does not grow with them."""
        return self._span * max(1.0, frames / self._frames)

    def _took(self, flight: Flight) -> None:
        # In this order: where a thread's forward has failed nobody says so but `adapted`.
        (_, adapted), (passed, predicted) = flight.adapted.result(), flight.predicted.result()
        frames = sum(len(prediction.batch.frames) for prediction in passed.predictions)
        span, self._ended = predicted.processor + adapted.processor, adapted.done
        if frames >= self._frames or span > self._span or self._ended - self._measured > LATELY_S:
            self._span, self._frames, self._measured = span, frames, self._ended

    def _answered(self, flight: Flight) -> None:
        self._parts.lateness.took(flight.publishing[1] - flight.started, time.time())
