"""The worker's Prometheus metrics. Every name, its help and its labels are here and nowhere else."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

NORMS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1, 3, 10, 30, 100)
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
FRAMES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RATIOS = tuple(i / 20 for i in range(1, 21))
NATS = tuple(i / 5 for i in range(1, 16))
BYTES = tuple(float(1 << i) for i in range(10, 27, 2))


class FrameHistogram(Collector):
    """A histogram that takes a whole pass at a time: the client's own costs more per value than a prediction."""

    def __init__(self, name: str, text: str, buckets: Sequence[float], registry: CollectorRegistry) -> None:
        self._name, self._text = name, text
        self._bounds = (*buckets, float("inf"))
        self._counts, self._sum = [0] * len(self._bounds), 0.0
        registry.register(self)

    def observe_many(self, values: Iterable[float]) -> None:
        """Finite values. Called from one thread only."""
        bounds, counts, total = self._bounds, self._counts, 0.0
        for value in values:
            counts[bisect_left(bounds, value)] += 1
            total += value
        self._sum += total

    def collect(self) -> Iterable[HistogramMetricFamily]:
        labels = [*(str(float(bound)) for bound in self._bounds[:-1]), "+Inf"]
        buckets = list(zip(labels, map(float, accumulate(self._counts)), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


class WorkerMetrics:
    """All series of one worker, on a registry of its own.

    Fleet-wide series have no stream label. At most `max_streams` streams have gauges of their own; which ones,
    the order of their arrival decides.
    """

    def __init__(self, max_streams: int) -> None:
        self.registry = CollectorRegistry()
        self._max_streams = max_streams
        self._labelled: set[str] = set()
        r = self.registry
        self.build = Info("driftkeel_build", "Version of the worker and the bundle it runs.", registry=r)
        self.frames = Counter("driftkeel_frames", "Records taken from the frames topic.", registry=r)
        self.bad_frames = Counter(
            "driftkeel_bad_frames", "Records sent to the dead-letter topic, by reason.", ["kind"], registry=r
        )
        self.frames_again = Counter(
            "driftkeel_frames_again", "Records read again whose stream state had folded them in already.", registry=r
        )
        self.predictions = Counter("driftkeel_predictions", "Predictions acknowledged by the broker.", registry=r)
        self.updates = Counter("driftkeel_updates", "Guard decisions.", ["decision"], registry=r)
        self.left_out = Counter(
            "driftkeel_adaptations_left_out", "Micro-batches folded in without an update.", ["reason"], registry=r
        )
        self.fenced = Counter(
            "driftkeel_fenced_writes", "State writes refused because another worker holds the stream.", registry=r
        )
        self.store_errors = Counter("driftkeel_store_errors", "Calls that the store did not answer.", registry=r)
        self.step_seconds = Histogram(
            "driftkeel_step_seconds", "One step, by stage and in all.", ["stage"], buckets=SECONDS, registry=r
        )
        self.store_seconds = Histogram(
            "driftkeel_store_seconds", "Calls to the store.", ["operation"], buckets=SECONDS, registry=r
        )
        self.wait_seconds = FrameHistogram(
            "driftkeel_frame_wait_seconds", "From the receipt of a frame to its prediction.", SECONDS, r
        )
        self.batch_frames = Histogram("driftkeel_batch_frames", "Frames of a micro-batch.", buckets=FRAMES, registry=r)
        self.pass_streams = Histogram("driftkeel_pass_streams", "Streams in a pass.", buckets=FRAMES, registry=r)
        self.raw_norm = Histogram(
            "driftkeel_raw_gradient_norm", "Norm of the unsupervised gradient.", buckets=NORMS, registry=r
        )
        self.generated_norm = Histogram(
            "driftkeel_generated_gradient_norm", "Norm of the generated gradient.", buckets=NORMS, registry=r
        )
        self.confidence = FrameHistogram(
            "driftkeel_confidence_ratio", "Calibrated confidence of predictions.", RATIOS, r
        )
        self.entropy = Histogram(
            "driftkeel_entropy_nats", "Mean prediction entropy of micro-batches.", buckets=NATS, registry=r
        )
        self.state_bytes = Histogram(
            "driftkeel_state_bytes", "Bytes of a stream state written to the store.", buckets=BYTES, registry=r
        )
        self.lag = Gauge(
            "driftkeel_consumer_lag_records", "Records not finished yet.", ["topic", "partition"], registry=r
        )
        self.buffered = Gauge("driftkeel_buffered_frames", "Decoded frames that wait for their pass.", registry=r)
        self.resident = Gauge("driftkeel_resident_streams", "Streams whose state is in memory.", registry=r)
        self.last_progress = Gauge(
            "driftkeel_last_progress_timestamp_seconds", "When the last step ended or found nothing to do.", registry=r
        )
        self.stream_accuracy = self._per_stream("estimated_accuracy_ratio", "Estimated accuracy, without labels.")
        self.stream_confidence = self._per_stream("confidence_ratio", "Mean calibrated confidence of recent frames.")
        self.stream_entropy = self._per_stream("entropy_nats", "Mean prediction entropy of recent frames.")
        self.stream_raw_norm = self._per_stream("raw_gradient_norm", "Norm of the last unsupervised gradient.")
        self.stream_generated_norm = self._per_stream("generated_gradient_norm", "Norm of the last generated gradient.")
        self.stream_distance = self._per_stream("source_distance", "Distance of the norm affine from source.")
        self.stream_step = self._per_stream("step", "Updates that the stream's parameters have seen.")

    def _per_stream(self, name: str, text: str) -> Gauge:
        return Gauge(f"driftkeel_stream_{name}", text, ["stream"], registry=self.registry)

    @property
    def _stream_gauges(self) -> list[Gauge]:
        return [
            self.stream_accuracy,
            self.stream_confidence,
            self.stream_entropy,
            self.stream_raw_norm,
            self.stream_generated_norm,
            self.stream_distance,
            self.stream_step,
        ]

    def labels_stream(self, stream: str) -> bool:
        """Whether this stream has series of its own."""
        if stream not in self._labelled and len(self._labelled) < self._max_streams:
            self._labelled.add(stream)
        return stream in self._labelled

    def forget_stream(self, stream: str) -> None:
        """Remove a stream's series when another worker has it, so that no stale value stays."""
        if stream in self._labelled:
            self._labelled.remove(stream)
            for gauge in self._stream_gauges:
                gauge.remove_by_labels({"stream": stream})

    def set_lag(self, lags: dict[tuple[str, int], int]) -> None:
        """Lag of the assigned partitions, and of no others."""
        self.lag.clear()
        for (topic, partition), records in lags.items():
            self.lag.labels(topic, str(partition)).set(records)
