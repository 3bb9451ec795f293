"""One step: predict, publish, adapt, judge, store. The order is the promise; each line below relies on it.

1. Predictions leave before their frames change anything, and are acknowledged before the state moves past them:
   a frame at or before a stored position has been predicted for certain.
2. State, position and update event are written together; a crash before that repeats the step, one after it does not.
3. Offsets may be committed only for frames whose state is stored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from monitoring.metrics import WorkerMetrics
from monitoring.proxies import estimate
from schemas.prediction import ClassScore, Prediction
from schemas.state import StreamHeader
from schemas.update import UpdateEvent
from worker.batcher import MicroBatch, MicroBatcher
from worker.engine import Outlook, Proposal, Proposals, next_header
from worker.guard import Guard, Verdict
from worker.offsets import Offsets
from worker.publish import Publisher
from worker.streams import Streams


@dataclass(frozen=True)
class _Judged:
    outlook: Outlook
    verdict: Verdict
    proposal: Proposal | None
    header: StreamHeader
    event: UpdateEvent


class Step:
    """Runs micro-batches through engine, guard, store and topics."""

    def __init__(
        self,
        streams: Streams,
        batcher: MicroBatcher,
        guard: Guard,
        publisher: Publisher,
        offsets: Offsets,
        metrics: WorkerMetrics,
        worker: str,
        keep_alive: Callable[[], object],
    ) -> None:
        self._streams, self._batcher, self._guard = streams, batcher, guard
        self._publisher, self._offsets, self._metrics = publisher, offsets, metrics
        self._worker, self._keep_alive = worker, keep_alive
        self._engine = streams.engine

    def run(self, batches: list[MicroBatch]) -> list[str]:
        """Returns the streams that another worker has claimed; their frames have changed nothing."""
        started = time.monotonic()
        passed = self._engine.predict(batches)
        predicted = time.monotonic()
        for outlook in passed.outlooks:
            self._publish(outlook, started, predicted)
        published = time.monotonic()
        proposals = self._engine.adapt(passed)
        adapted = time.monotonic()
        self._publisher.settle(self._keep_alive)
        settled = time.monotonic()
        judged = self._judge(passed.outlooks, proposals)
        fenced = self._store(judged, proposals)
        for outlook in passed.outlooks:
            if not outlook.batch.fold and outlook.batch.stream in self._engine:
                self._batcher.hold(outlook.batch)
        done = time.monotonic()
        times = {
            "predict": predicted - started,
            "publish": published - predicted + settled - adapted,
            "adapt": adapted - published,
            "store": done - settled,
            "all": done - started,
        }
        for stage, seconds in times.items():
            self._metrics.step_seconds.labels(stage).observe(seconds)
        return fenced

    def _publish(self, outlook: Outlook, started: float, predicted: float) -> None:
        bundle, header = self._engine.bundle, self._engine.resident(outlook.batch.stream).header
        manifest = bundle.manifest
        accuracy = estimate(header.proxies, manifest.calibration, manifest.model.clean_accuracy).estimated_accuracy
        rows = zip(outlook.batch.frames, outlook.top_index, outlook.top_confidence, strict=True)
        for frame, index, confidence in rows:
            if frame.published:
                continue
            top = [
                ClassScore(index=i, label=bundle.labels[i], confidence=min(1.0, c))
                for i, c in zip(index, confidence, strict=True)
            ]
            prediction = Prediction(
                id=str(frame.position),
                stream=frame.stream,
                event_time=frame.event_time,
                index=top[0].index,
                label=top[0].label,
                confidence=top[0].confidence,
                top=top,
                bundle=bundle.hash,
                step=outlook.step,
                parameters="adapted" if outlook.step else "source",
                estimated_accuracy=accuracy,
                worker=self._worker,
                wait_seconds=max(0.0, started - frame.received),
                pass_seconds=predicted - started,
            )
            self._publisher.prediction(prediction, frame.traceparent)
            self._metrics.predictions.inc()
            self._metrics.wait_seconds.observe(max(0.0, predicted - frame.received))
            self._metrics.confidence.observe(top[0].confidence)

    def _judge(self, outlooks: list[Outlook], proposals: Proposals) -> list[_Judged]:
        """A decision for every micro-batch that counts as done with this step."""
        proposed = {id(p.outlook): p for p in proposals.proposals}
        judged = []
        for outlook in outlooks:
            if not outlook.batch.fold or outlook.batch.stream not in self._engine:
                continue
            proposal = proposed.get(id(outlook))
            if proposal is not None:
                verdict = self._guard.judge(proposal.signals, proposal.finite)
            else:
                verdict = Verdict(False, outlook.batch.reason)
            resident = self._engine.resident(outlook.batch.stream)
            header = next_header(resident.header, outlook, verdict.apply)
            event = self._event(outlook, verdict, proposal, resident.header, header, resident.token)
            judged.append(_Judged(outlook, verdict, proposal, header, event))
        return judged

    def _store(self, judged: list[_Judged], proposals: Proposals) -> list[str]:
        if not judged:
            return []
        entries = [
            (j.header, j.event, j.proposal.row if j.proposal is not None and j.verdict.apply else None) for j in judged
        ]
        accepted = self._streams.write(entries, proposals)
        kept = [j for j, good in zip(judged, accepted, strict=True) if good]
        self._engine.accept(proposals, [j.proposal for j in kept if j.proposal is not None and j.verdict.apply])
        for j in kept:
            self._publisher.update(j.event)
            self._offsets.finished(frame.position for frame in j.outlook.batch.frames)
            self._observe(j)
        fenced = [j.header.stream for j, good in zip(judged, accepted, strict=True) if not good]
        self._metrics.fenced.inc(len(fenced))
        return fenced

    def _event(
        self,
        outlook: Outlook,
        verdict: Verdict,
        proposal: Proposal | None,
        before: StreamHeader,
        after: StreamHeader,
        token: int,
    ) -> UpdateEvent:
        manifest = self._engine.bundle.manifest
        clean = manifest.model.clean_accuracy
        signals = proposal.signals if proposal else {}

        def signal(name: str) -> float | None:
            value = signals.get(name)
            return value if value is not None and math.isfinite(value) else None

        return UpdateEvent(
            id=f"{after.stream}@{after.events}",
            stream=after.stream,
            time=datetime.now(UTC),
            decision="applied" if verdict.apply else "skipped",
            reason=verdict.reason,
            frames=[str(frame.position) for frame in outlook.batch.frames],
            step=after.step,
            loss=signal("loss"),
            entropy=signal("entropy"),
            discrepancy=signal("discrepancy"),
            raw_gradient_norm=signal("raw_gradient_norm"),
            generated_gradient_norm=signal("generated_gradient_norm"),
            cosine=signal("cosine"),
            source_distance=signal("source_distance") if verdict.apply else None,
            before=estimate(before.proxies, manifest.calibration, clean),
            after=estimate(after.proxies, manifest.calibration, clean),
            token=token,
            bundle=self._engine.bundle.hash,
            worker=self._worker,
        )

    def _observe(self, judged: _Judged) -> None:
        metrics, event, stream = self._metrics, judged.event, judged.header.stream
        metrics.updates.labels(event.decision).inc()
        metrics.batch_frames.observe(len(judged.outlook.batch.frames))
        metrics.entropy.observe(judged.outlook.mean_entropy)
        if event.raw_gradient_norm is not None:
            metrics.raw_norm.observe(event.raw_gradient_norm)
        if event.generated_gradient_norm is not None:
            metrics.generated_norm.observe(event.generated_gradient_norm)
        if not metrics.labels_stream(stream):
            return
        gauges = [
            (metrics.stream_raw_norm, event.raw_gradient_norm),
            (metrics.stream_generated_norm, event.generated_gradient_norm),
            (metrics.stream_distance, event.source_distance),
            (metrics.stream_step, float(event.step)),
        ]
        if event.after is not None:
            gauges += [
                (metrics.stream_accuracy, event.after.estimated_accuracy),
                (metrics.stream_confidence, event.after.confidence),
                (metrics.stream_entropy, event.after.entropy),
            ]
        for gauge, value in gauges:
            if value is not None:
                gauge.labels(stream).set(value)
