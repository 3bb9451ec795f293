"""The worker's Prometheus metrics. Every name, its help and its labels are here and nowhere else."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)

from monitoring.histogram import FrameHistogram
from monitoring.streams import StreamSeries
from schemas.command import Action
from schemas.prediction import Parameters

NORMS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1, 3, 10, 30, 100)
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
FRAMES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RATIOS = tuple(i / 20 for i in range(1, 21))
NATS = tuple(i / 5 for i in range(1, 16))
# Every counter and histogram would have one more series that says when it began, which Prometheus does not read.
disable_created_metrics()

LATENCIES = (*SECONDS[2:], 30, 60, 300)
BYTES = tuple(float(1 << i) for i in range(10, 27, 2))
STAGES = ("predict", "publish", "adapt", "settle", "store", "all")
STORE_OPERATIONS = ("claim", "write")
BROKER_OPERATIONS = ("publish", "poll", "commit")
OUTCOMES = ("done", "refused")
BAD_FRAMES = (
    "no_key",
    "bad_key",
    "empty",
    "too_large",
    "animated",
    "not_an_image",
    "damaged",
    "unreadable",
    "too_many_streams",
)
LEFT_OUT = ("policy", "settled", "resting", "overload")
DECISIONS = (
    ("applied", "within_limits"),
    ("partial", "shrunk"),
    *(("skipped", reason) for reason in ("not_finite", "gradient", "distance", "turned", "camera", "one_class")),
    *(("skipped", reason) for reason in ("resting", "few_frames", "policy", "settled", "overload")),
    *((decision, reason) for decision in ("rolled_back", "reset") for reason in ("collapse", "worse", "command")),
    ("reset", "stored_state"),
    ("reset", "bundle"),
    ("carried", "bundle"),
)


class WorkerMetrics:
    """All series of one worker, on a registry of its own.

    Fleet-wide series have no stream label. At most `max_streams` streams have series of their own, those that need
    it most. Several workers on one machine are several processes with a port each, and Prometheus adds them up.
    """

    def __init__(self, max_streams: int, silent_after_s: float = 600.0) -> None:
        self.registry = r = CollectorRegistry()
        counter, gauge = partial(Counter, registry=r), partial(Gauge, registry=r)
        histogram = partial(Histogram, registry=r)
        self.build = Info("driftkeel_build", "Version of the worker, its group, and the bundle it runs.", registry=r)
        self.clean_accuracy = gauge(
            "driftkeel_clean_accuracy_ratio", "Accuracy to expect without drift, of the bundle."
        )
        self.frames = counter("driftkeel_frames", "Records taken from the frames topic.")
        self.bad_frames = counter("driftkeel_bad_frames", "Records sent to the dead-letter topic, by reason.", ["kind"])
        self.frames_again = counter(
            "driftkeel_frames_again", "Records read again whose stream state had folded them in already."
        )
        self.dropped = counter(
            "driftkeel_frames_dropped", "Frames passed over as too late for a prediction (batch.drop_late)."
        )
        self.expired = counter(
            "driftkeel_records_expired",
            "Records that were lost, as the topic no longer had them when their turn came: its retention.",
        )
        self.forgotten = counter(
            "driftkeel_forgotten_partitions",
            "Partitions that the group had read and of which the store knew nothing when the worker began with them.",
        )
        self.predictions = counter(
            "driftkeel_predictions", "Predictions published; a frame that is read again counts again."
        )
        self.answers = counter("driftkeel_answers", "Predictions, by the parameters that made them.", ["parameters"])
        self.updates = counter(
            "driftkeel_updates",
            "Update events: what the guard or a person decided, by kind of reason.",
            ["decision", "reason"],
        )
        self.commands = counter(
            "driftkeel_commands", "Commands taken from the topic, by action and outcome.", ["action", "outcome"]
        )
        self.estimated_frames = counter(
            "driftkeel_estimated_frames", "Frames whose accuracy is estimated for answers and source both."
        )
        self.correct = counter(
            "driftkeel_estimated_correct_frames",
            "Of these, frames that are right by estimate: as answered, and as source would have answered.",
            ["by"],
        )
        self.left_out = counter(
            "driftkeel_adaptations_left_out", "Micro-batches folded in without an update.", ["reason"]
        )
        self.fenced = counter(
            "driftkeel_fenced_writes", "State writes refused because another worker holds the stream."
        )
        self.store_errors = counter("driftkeel_store_errors", "Calls that the store did not answer.")
        self.broker_errors = counter(
            "driftkeel_broker_errors", "Calls that the broker did not answer or refused.", ["operation"]
        )
        self.step_seconds = histogram(
            "driftkeel_step_seconds", "One step, by stage and in all.", ["stage"], buckets=SECONDS
        )
        self.store_seconds = histogram("driftkeel_store_seconds", "Calls to the store.", ["operation"], buckets=SECONDS)
        self.wait_seconds = FrameHistogram(
            "driftkeel_frame_wait_seconds", "From the arrival of a frame to its prediction.", SECONDS, r
        )
        self.latency_seconds = FrameHistogram(
            "driftkeel_frame_latency_seconds", "From a record's timestamp to its prediction.", LATENCIES, r
        )
        self.batch_frames = histogram("driftkeel_batch_frames", "Frames of a micro-batch.", buckets=FRAMES)
        self.pass_streams = histogram("driftkeel_pass_streams", "Streams in a pass.", buckets=FRAMES)
        self.raw_norm = histogram("driftkeel_raw_gradient_norm", "Norm of the unsupervised gradient.", buckets=NORMS)
        self.generated_norm = histogram(
            "driftkeel_generated_gradient_norm", "Norm of the generated gradient.", buckets=NORMS
        )
        self.confidence = FrameHistogram(
            "driftkeel_confidence_ratio", "Calibrated confidence of predictions.", RATIOS, r
        )
        self.entropy = histogram("driftkeel_entropy_nats", "Mean prediction entropy of micro-batches.", buckets=NATS)
        self.state_bytes = histogram(
            "driftkeel_state_bytes", "Bytes of a stream state written to the store.", buckets=BYTES
        )
        self.lag = gauge("driftkeel_consumer_lag_records", "Records not finished yet.", ["topic", "partition"])
        self._lagging: set[tuple[str, str]] = set()
        self.partitions = gauge("driftkeel_assigned_partitions", "Partitions that the worker reads.")
        self.refused_partitions = gauge(
            "driftkeel_refused_partitions",
            "Partitions that the worker has and does not read: their log is not the one whose frames the store has.",
        )
        self.stuck_partitions = gauge(
            "driftkeel_stuck_partitions", "Partitions of which nothing has come for a minute although they have more."
        )
        self.buffered = gauge("driftkeel_buffered_frames", "Decoded frames that wait for their pass.")
        self.resident = gauge("driftkeel_resident_streams", "Streams whose state is in memory.")
        self.homeless = gauge(
            "driftkeel_homeless_streams",
            "Streams that source answers: something else is under their key in the store, or their position is wrong.",
        )
        self.last_progress = gauge(
            "driftkeel_last_progress_timestamp_seconds",
            "When the loop last turned: a step ended, there was nothing to do, or it waits for broker or store. "
            "Not while a pass hangs.",
        )
        self.broker_answered = gauge(
            "driftkeel_broker_last_answer_timestamp_seconds",
            "When the broker last answered anything. 0: not since the worker started; NaN: not asked yet.",
        )
        self.store_answered = gauge(
            "driftkeel_store_last_answer_timestamp_seconds",
            "When the store last answered, and did what was asked of it. 0 and NaN as for the broker.",
        )
        # Not the present: a worker that starts again and again would seem to have just been answered.
        for answered in (self.broker_answered, self.store_answered):
            answered.set(math.nan)
        self.clock = gauge(
            "driftkeel_clock_timestamp_seconds", "What the worker's clock says, by which all its timestamps are."
        )
        self.clock.set_function(time.time)
        ProcessCollector(registry=r)
        self.streams = StreamSeries(max_streams, silent_after_s)
        r.register(self.streams)
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """A counter that is there from the start: its first increase counts, and shows."""
        for parameters in get_args(Parameters):
            self.answers.labels(parameters)
        for action in get_args(Action):
            for outcome in OUTCOMES:
                self.commands.labels(action, outcome)
        self.commands.labels("unreadable", "refused")
        for by in ("source", "answered"):
            self.correct.labels(by)
        for operation in BROKER_OPERATIONS:
            self.broker_errors.labels(operation)
        for kind in BAD_FRAMES:
            self.bad_frames.labels(kind)
        for decision, reason in DECISIONS:
            self.updates.labels(decision, reason)
        for reason in LEFT_OUT:
            self.left_out.labels(reason)
        for stage in STAGES:
            self.step_seconds.labels(stage)
        for operation in STORE_OPERATIONS:
            self.store_seconds.labels(operation)

    def broker_error(self, operation: str) -> None:
        """The broker did not answer a call, or refused it."""
        self.broker_errors.labels(operation).inc()

    def set_lag(self, lags: dict[tuple[str, int], int]) -> None:
        """Lag of the assigned partitions, and of no others."""
        shown = {(topic, str(partition)): records for (topic, partition), records in lags.items()}
        for labels, records in shown.items():
            self.lag.labels(*labels).set(records)
        # Not all at first: a scrape in between would see no partition.
        for gone in self._lagging - set(shown):
            self.lag.remove(*gone)
        self._lagging = set(shown)
