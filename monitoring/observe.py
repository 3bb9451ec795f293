"""Enters what happens in a step into the metrics."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from monitoring.metrics import WorkerMetrics
from monitoring.reasons import reason_kind
from monitoring.streams import next_view
from schemas.frame import Position
from schemas.prediction import Parameters
from schemas.state import StreamHeader
from schemas.update import UpdateEvent


@dataclass
class Answers:
    """The answers of one pass: times and confidence by frame. `done`: when they were ready, in monotonic seconds."""

    done: float
    waits: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    by: Counter[str] = field(default_factory=Counter)
    _slowest: tuple[float, Position] | None = None

    def __post_init__(self) -> None:
        self._done_at = time.time() - (time.monotonic() - self.done)

    def add(self, position: Position, received: float, sent: float, confidence: float) -> None:
        """Add a frame: when it was received (monotonic) and sent (since the epoch; 0 if its record does not say)."""
        self.waits.append(max(0.0, self.done - received))
        self.confidences.append(confidence)
        if sent > 0:
            latency = max(0.0, self._done_at - sent)
            self.latencies.append(latency)
            if self._slowest is None or latency > self._slowest[0]:
                self._slowest = latency, position

    @property
    def slowest(self) -> tuple[float, str] | None:
        """Latency and position of the slowest frame."""
        return (self._slowest[0], str(self._slowest[1])) if self._slowest else None


def answered(metrics: WorkerMetrics, answers: Answers) -> None:
    """A pass was published."""
    metrics.predictions.inc(len(answers.waits))
    for parameters, frames in answers.by.items():
        metrics.answers.labels(parameters).inc(frames)
    metrics.wait_seconds.observe_many(answers.waits)
    metrics.latency_seconds.observe_many(answers.latencies, answers.slowest)
    metrics.confidence.observe_many(answers.confidences)


def judged(metrics: WorkerMetrics, event: UpdateEvent, entropy: float, answered_by: Parameters) -> None:
    """A micro-batch was judged and stored. `entropy` is the mean of its predictions, which `answered_by` made."""
    frames = len(event.frames)
    metrics.batch_frames.observe(frames)
    metrics.entropy.observe(entropy)
    if event.raw_gradient_norm is not None:
        metrics.raw_norm.observe(event.raw_gradient_norm)
    if event.generated_gradient_norm is not None:
        metrics.generated_norm.observe(event.generated_gradient_norm)
    source, adapted = (event.after.source_accuracy, event.after.estimated_accuracy) if event.after else (None, None)
    if source is None or adapted is None or answered_by == "approved":
        return  # Both counters below must count the same frames.
    metrics.estimated_frames.inc(frames)
    metrics.correct.labels("source").inc(frames * source)
    metrics.correct.labels("answered").inc(frames * (source if answered_by == "source" else adapted))


def decided(metrics: WorkerMetrics, event: UpdateEvent, header: StreamHeader | None, blind: bool | None = None) -> None:
    """A decision about a stream was made, with or without frames.

    `header` is the stream's after it; None if the stream has left this worker meanwhile. `blind`: whether most frames
    were blank or repeated; None without frames.
    """
    metrics.updates.labels(event.decision, reason_kind(event)).inc()
    if header is not None:
        before = metrics.streams.get(event.stream)
        metrics.streams.put(event.stream, next_view(before, event, header, time.monotonic(), blind))


def took(metrics: WorkerMetrics, **stages: float) -> None:
    """Seconds that stages of a step took."""
    for stage, seconds in stages.items():
        metrics.step_seconds.labels(stage).observe(seconds)
