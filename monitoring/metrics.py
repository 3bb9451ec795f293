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


# Every counter and histogram would have another series with the time of its creation, which Prometheus does not read.
disable_created_metrics()


class WorkerMetrics:
    """All series of one worker, on a registry of its own.

    Fleet-wide series have no stream label. At most `max_streams` streams, those with the greatest need, have series of
    their own.
    """

    def __init__(self, max_streams: int, silent_after_s: float = 600.0) -> None:
        self.registry = r = CollectorRegistry()
        counter, gauge = partial(Counter, registry=r), partial(Gauge, registry=r)
        histogram = partial(Histogram, registry=r)
        self.build = Info(
            "driftkeel_build",
            "Labels: version of the worker, its name, its consumer group, and its bundle.",
            registry=r,
        )
        self.clean_accuracy = gauge(
            "driftkeel_clean_accuracy_ratio",
            "Accuracy of the bundle's source model without drift, measured when the bundle was made.",
        )
        self.frames = counter("driftkeel_frames", "Records that the worker has taken from the frames topic.")
        self.bad_frames = counter(
            "driftkeel_bad_frames",
            "Records that are not valid frames and became dead letters, by reason. They have no prediction.",
            ["kind"],
        )
        self.frames_again = counter(
            "driftkeel_frames_again",
            "Records read again whose stream had folded them in already, after a crash or a rebalance. Skipped.",
        )
        self.dropped = counter(
            "driftkeel_frames_dropped", "Frames dropped because their prediction would be too late (batch.drop_late)."
        )
        self.expired = counter(
            "driftkeel_records_expired",
            "Records that are lost: the topic's retention deleted them before the worker read them.",
        )
        self.forgotten = counter(
            "driftkeel_forgotten_partitions",
            "Partitions that the group had read before, but of which the store knew nothing: it lost its data, or is "
            "another one.",
        )
        self.predictions = counter(
            "driftkeel_predictions", "Predictions published. A frame that is read again may count again."
        )
        self.answers = counter(
            "driftkeel_answers", "Predictions published, by the parameters that made them.", ["parameters"]
        )
        self.updates = counter(
            "driftkeel_updates",
            "Update events: decisions of the guard or of a person, by decision and kind of reason.",
            ["decision", "reason"],
        )
        self.commands = counter(
            "driftkeel_commands",
            "Commands from people that the worker has carried out or refused, by action.",
            ["action", "outcome"],
        )
        self.estimated_frames = counter(
            "driftkeel_estimated_frames",
            "Frames for which the accuracy of the answer and that of source are both estimated.",
        )
        self.correct = counter(
            "driftkeel_estimated_correct_frames",
            "How many of driftkeel_estimated_frames_total are right, by estimate. by=answered: as answered; by=source: "
            "as source would answer.",
            ["by"],
        )
        self.left_out = counter(
            "driftkeel_adaptations_left_out",
            "Micro-batches that made no update on purpose, by reason. Their frames were predicted.",
            ["reason"],
        )
        self.fenced = counter(
            "driftkeel_fenced_writes", "Writes of states that the store refused because another worker has the stream."
        )
        self.store_errors = counter(
            "driftkeel_store_errors", "Calls that the store refused or did not answer. Each is tried again."
        )
        self.broker_errors = counter(
            "driftkeel_broker_errors",
            "Calls that the broker refused or did not answer, by operation. Each is tried again.",
            ["operation"],
        )
        self.step_seconds = histogram(
            "driftkeel_step_seconds",
            "Duration of a step, by stage; all: from beginning to end.",
            ["stage"],
            buckets=SECONDS,
        )
        self.store_seconds = histogram(
            "driftkeel_store_seconds", "Duration of calls to the store, by operation.", ["operation"], buckets=SECONDS
        )
        self.wait_seconds = FrameHistogram(
            "driftkeel_frame_wait_seconds",
            "Time from a frame's arrival at the worker to its prediction. Depends on no sender's clock.",
            SECONDS,
            r,
        )
        self.latency_seconds = FrameHistogram(
            "driftkeel_frame_latency_seconds",
            "Time from a record's timestamp to its prediction. Needs clocks of senders and workers that agree.",
            LATENCIES,
            r,
        )
        self.batch_frames = histogram(
            "driftkeel_batch_frames", "Number of frames in a micro-batch that was decided on.", buckets=FRAMES
        )
        self.pass_streams = histogram(
            "driftkeel_pass_streams", "Number of streams that share a pass of the model.", buckets=FRAMES
        )
        self.raw_norm = histogram(
            "driftkeel_raw_gradient_norm", "Norm of the unsupervised gradient of a proposed update.", buckets=NORMS
        )
        self.generated_norm = histogram(
            "driftkeel_generated_gradient_norm",
            "Norm of the gradient that the generator makes of the unsupervised one. This one moves the parameters.",
            buckets=NORMS,
        )
        self.confidence = FrameHistogram(
            "driftkeel_confidence_ratio", "Calibrated confidence of each prediction.", RATIOS, r
        )
        self.entropy = histogram(
            "driftkeel_entropy_nats",
            "Mean entropy of the predictions of a micro-batch. High: the model is unsure.",
            buckets=NATS,
        )
        self.state_bytes = histogram(
            "driftkeel_state_bytes", "Size of a stream's tensors as written to the store, compressed.", buckets=BYTES
        )
        self.lag = gauge(
            "driftkeel_consumer_lag_records",
            "Records of a partition that are not finished: not read yet, or in hand. Frames held for an update count "
            "too.",
            ["topic", "partition"],
        )
        self._lagging: set[tuple[str, str]] = set()
        self.partitions = gauge(
            "driftkeel_assigned_partitions", "Partitions of the frames topic that Kafka has assigned to the worker."
        )
        self.refused_partitions = gauge(
            "driftkeel_refused_partitions",
            "Assigned partitions that the worker does not read, because they are not those whose frames the store has.",
        )
        self.stuck_partitions = gauge(
            "driftkeel_stuck_partitions",
            "Partitions from which nothing has come for a minute, although they have records that were not read.",
        )
        self.buffered = gauge(
            "driftkeel_buffered_frames", "Decoded frames in memory that wait for a pass of the model."
        )
        self.resident = gauge("driftkeel_resident_streams", "Streams whose state is in the worker's memory.")
        self.homeless = gauge(
            "driftkeel_homeless_streams",
            "Streams that cannot be stored, because their key is taken or their position wrong. Source answers them.",
        )
        self.last_progress = gauge(
            "driftkeel_last_progress_timestamp_seconds",
            "When the worker's main loop last ran. It also counts as running while it is idle, or waits for broker or "
            "store, but not while a pass of the model hangs.",
        )
        self.broker_answered = gauge(
            "driftkeel_broker_last_answer_timestamp_seconds",
            "When the broker last answered anything. 0: not since the worker started; NaN: not asked yet.",
        )
        self.store_answered = gauge(
            "driftkeel_store_last_answer_timestamp_seconds",
            "When the store last did what was asked of it. 0: not since the worker started; NaN: not asked yet.",
        )
        # Not the present time: a worker that restarts over and over would seem to have just been answered.
        for answered in (self.broker_answered, self.store_answered):
            answered.set(math.nan)
        self.clock = gauge(
            "driftkeel_clock_timestamp_seconds",
            "The worker's clock. All its timestamps are by this clock: subtract them from this value to get ages.",
        )
        self.clock.set_function(time.time)
        ProcessCollector(registry=r)
        self.streams = StreamSeries(max_streams, silent_after_s)
        r.register(self.streams)
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """Create all series with known labels, so that `increase` sees the first one from zero."""
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
        """Count a call that the broker did not answer, or refused."""
        self.broker_errors.labels(operation).inc()

    def set_lag(self, lags: dict[tuple[str, int], int]) -> None:
        """Set the lag of the assigned partitions, and remove all others."""
        shown = {(topic, str(partition)): records for (topic, partition), records in lags.items()}
        for labels, records in shown.items():
            self.lag.labels(*labels).set(records)
        # Not cleared before: a scrape in between would see no partition.
        for gone in self._lagging - set(shown):
            self.lag.remove(*gone)
        self._lagging = set(shown)
