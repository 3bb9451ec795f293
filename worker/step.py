"""One step: predict, publish, adapt, judge, store. All guarantees (docs/guarantees.md) rest on this order.

1. Predictions are sent before their frames change anything, and are acknowledged before the state moves past them. So
   a frame at or before a stored position has its prediction in the topic, or was too late for one (`batch.drop_late`).
2. State, position and update event are written together. A crash before the write repeats the step; one after it does
   not. Several steps of a stream may share one write (see `worker.streams.pending`): a crash repeats all of them.
3. Offsets may be committed only for frames whose state is stored. Otherwise a crash would lose these frames for good.

A pass runs in a thread of its own or in the caller's (see `worker.flights`). While one step waits for broker or store,
the passes of others may run. A stream is in one step at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from monitoring import observe
from monitoring.metrics import WorkerMetrics
from worker.batch.batcher import MicroBatch, MicroBatcher
from worker.engine.device import use
from worker.engine.judge import Judgement, judge
from worker.engine.passes import BatchPrediction, Gathered, Pass, Proposal, Proposals
from worker.guard.guard import Guard
from worker.publish.event import update_event
from worker.publish.messages import PredictionWriter
from worker.publish.publisher import EncodedPrediction, Publisher
from worker.streams.pending import Folded, PendingWrites
from worker.streams.streams import Streams
from worker.trace import Span, Trace

Given = TypeVar("Given")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Timed:
    """When a part of a pass ended, how long it took, and how many of these seconds its thread had a processor."""

    done: float
    seconds: float
    processor: float


@dataclass(eq=False)
class Flight:
    """A step that has begun. Its `streams` must not be in another pass until `Step.finish` has returned.

    `here`: the pass runs in the caller's thread, and `Step.adapt` has to be called to compute its updates.
    """

    streams: frozenset[str]
    started: float
    predicted: Future[tuple[Pass, Timed]]
    adapted: Future[tuple[Proposals, Timed]]
    here: bool = False
    published: bool = False
    publishing: Span = (0.0, 0.0)

    @property
    def next(self) -> Future[Any]:
        """What the worker's loop waits for next."""
        return self.adapted if self.published or self.adapted.done() else self.predicted


class Step:
    """Takes micro-batches through engine, guard, store and topics: `start`, `publish` and `finish`; or, where the pass
    runs in the caller's thread, `start`, which publishes too, `adapt` and `finish`."""

    def __init__(
        self,
        streams: Streams,
        batcher: MicroBatcher,
        guard: Guard,
        publisher: Publisher,
        pending: PendingWrites,
        metrics: WorkerMetrics,
        worker: str,
        keep_alive: Callable[[], object],
        threads: int,
        drift_frames: int = 0,
        trace: Trace | None = None,
    ) -> None:
        """`drift_frames`: how many frames make one signal for drift detection; 0 switches it off."""
        self._streams, self._batcher, self._guard = streams, batcher, guard
        self._publisher, self._pending, self._metrics = publisher, pending, metrics
        self._worker, self._keep_alive = worker, keep_alive
        self._engine = engine = streams.engine
        self._drift_frames, self._trace = drift_frames, trace
        self._writer = PredictionWriter(engine.bundle.labels, engine.bundle_hash, worker)
        self._threads = ThreadPoolExecutor(threads, "pass", use, (engine.device,))

    def start(self, batches: list[MicroBatch], here: bool = False) -> Flight:
        """Begin a pass in a thread and return at once; or, `here`, predict and publish in the caller's thread.

        The latter is faster for short passes: one in a thread has to wait for the interpreter lock, which the loop
        holds, after each of its thousand operations.
        """
        gathered, streams = self._engine.gather(batches), frozenset(batch.stream for batch in batches)
        predicted: Future[tuple[Pass, Timed]] = Future()
        started = time.monotonic()
        if not here:
            return Flight(streams, started, predicted, self._threads.submit(self._pass, gathered, predicted))
        flight = Flight(streams, started, predicted, Future(), here)
        predicted.set_result(_timed(self._engine.forward, gathered))
        self.publish(flight)
        return flight

    def adapt(self, flight: Flight) -> None:
        """Compute the updates of a pass that began `here`, in the caller's thread."""
        flight.adapted.set_result(_timed(self._engine.adapt, flight.predicted.result()[0]))

    def publish(self, flight: Flight) -> None:
        """Hand the predictions to the producer. The thread computes the updates meanwhile."""
        if flight.adapted.done():
            flight.adapted.result()  # Raises the error of a pass that failed, which may have left no predictions.
        passed, timed = flight.predicted.result()
        flight.published = True
        started = time.monotonic()
        answers = observe.Answers(timed.done)
        for prediction in passed.predictions:
            self._publish(prediction, timed, answers)
        flight.publishing = started, time.monotonic()
        observe.answered(self._metrics, answers)
        observe.took(self._metrics, predict=timed.seconds, publish=flight.publishing[1] - started)

    def finish(self, flight: Flight) -> list[str]:
        """Judge the updates and store, once the predictions are acknowledged.

        Returns the streams that another worker has claimed. Their frames have changed nothing in the store.
        """
        if not flight.published:
            self.publish(flight)
        passed, _ = flight.predicted.result()
        proposals, adapted = flight.adapted.result()
        started = time.monotonic()
        self._publisher.settle(self._keep_alive)
        settled = time.monotonic()
        self._judge(passed.predictions, proposals)
        fenced = self._pending.flush_due()
        for prediction in passed.predictions:
            if not prediction.batch.fold and self._engine.holds(prediction.batch.stream, prediction.resident):
                self._batcher.hold(prediction.batch)
                prediction.resident.seen = prediction.seen
        done = time.monotonic()
        observe.took(
            self._metrics,
            adapt=adapted.seconds,
            settle=settled - started,
            store=done - settled,
            all=done - flight.started,
        )
        if self._trace is not None:
            self._export(self._trace, flight, {"settle": (started, settled), "store": (settled, done)})
        return fenced

    @staticmethod
    def _export(trace: Trace, flight: Flight, stages: dict[str, Span]) -> None:
        """Export the step as a trace."""
        passed, predicted = flight.predicted.result()
        _, adapted = flight.adapted.result()
        frames = [frame for prediction in passed.predictions for frame in prediction.batch.frames]
        stages = {
            "consume": (min(frame.received for frame in frames), flight.started),
            "predict": (predicted.done - predicted.seconds, predicted.done),
            "publish": flight.publishing,
            "adapt": (adapted.done - adapted.seconds, adapted.done),
            **stages,
        }
        about = {
            "driftkeel.frames": len(frames),
            "driftkeel.streams": sorted(flight.streams),
            "driftkeel.positions": [str(frame.position) for frame in frames],
        }
        trace.step(stages, (frame.traceparent for frame in frames), about)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _pass(self, gathered: Gathered, predicted: Future[tuple[Pass, Timed]]) -> tuple[Proposals, Timed]:
        predicted.set_result(_timed(self._engine.forward, gathered))
        return _timed(self._engine.adapt, predicted.result()[0])

    def _publish(self, prediction: BatchPrediction, timed: Timed, answers: observe.Answers) -> None:
        batch, proxies = prediction.batch, self._engine.estimate(prediction.resident.header)
        accuracy = proxies.estimated_accuracy
        if batch.answer == "source" and proxies.source_accuracy is not None:
            accuracy = proxies.source_accuracy
        shared = self._writer.shared(batch.stream, prediction.step, prediction.parameters, accuracy, timed.seconds)
        begun = timed.done - timed.seconds
        answered = prediction.top_index, prediction.top_confidence, prediction.source_index
        sent: list[EncodedPrediction] = []
        for frame, index, confidence, source in zip(batch.frames, *answered, strict=True):
            if frame.published:
                continue
            frame_id, moment = str(frame.position), frame.event_time.isoformat()
            waited = max(0.0, begun - frame.received)
            content = self._writer.frame(shared, frame_id, moment, index, confidence, waited, source)
            sent.append(EncodedPrediction(frame_id, moment, content, frame.traceparent))
            answers.add(frame.position, frame.received, frame.sent, confidence[0])
        answers.by[prediction.parameters] += len(sent)
        self._publisher.predictions(batch.stream.encode(), sent)

    def _judge(self, predictions: list[BatchPrediction], proposals: Proposals) -> None:
        """Decide on every micro-batch that this step folds in, and make the streams in memory what was decided."""
        proposed = {id(p.prediction): p for p in proposals.proposals}
        folded, accepted = [], []
        for prediction in predictions:
            resident, batch = prediction.resident, prediction.batch
            if not batch.fold or not self._engine.holds(batch.stream, resident):
                continue
            proposal = proposed.get(id(prediction))
            newest = self._streams.newest
            judgement = judge(self._engine, self._guard, prediction, proposals, proposal, self._drift_frames, newest)
            if not self._engine.holds(batch.stream, resident):
                continue  # Its partition was taken away while `judge` waited for a snapshot from the store.
            folded.append(self._folded(prediction, judgement, proposal))
            if judgement.kept is not None:
                accepted.append(judgement.kept)
        self._engine.accept(proposals, accepted)
        for one in folded:
            # A later `judge` may have waited for the store, so that streams judged before it have gone meanwhile.
            if self._engine.holds(one.header.stream, one.resident):
                self._pending.add(one)

    def _folded(self, prediction: BatchPrediction, judgement: Judgement, proposal: Proposal | None) -> Folded:
        """The judgement with its event, to be written."""
        resident, batch = prediction.resident, prediction.batch
        if judgement.ruling.apply:
            judgement.header.lately = judgement.header.lately.and_one(time.time())
        sealed = update_event(
            self._engine, self._streams.context.policies, self._worker, prediction, judgement, proposal
        )
        header = judgement.header.behind(sealed)
        return Folded(
            resident,
            header,
            sealed,
            moved=judgement.kept is not None,
            positions=[frame.position for frame in batch.frames],
            mean_entropy=prediction.mean_entropy,
            answered=prediction.parameters,
            snapshot=self._streams.snapshot(resident.header, header, sealed.event),
            patient=not batch.adapt,
            blind=judgement.blind,
        )


def _timed(part: Callable[[Given], Result], given: Given) -> tuple[Result, Timed]:
    started, processor = time.monotonic(), time.thread_time()
    result = part(given)
    done = time.monotonic()
    return result, Timed(done, done - started, time.thread_time() - processor)
