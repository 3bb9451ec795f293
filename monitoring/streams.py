"""Series of single streams, for those that need to be looked at, and of all streams together.

A site may have thousands of streams, and Prometheus pays for each series. So a stream's newest values are kept in
memory, and only at a scrape becomes clear which streams show theirs: those in trouble first, then those that drift,
the newest, and then those with the lowest estimated accuracy. All streams count in the distributions and numbers of
the fleet.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate
from time import monotonic, time
from typing import NamedTuple, get_args

from prometheus_client.core import GaugeHistogramMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from monitoring.drift import ALARM
from monitoring.reasons import HELD_BACK, TROUBLE, reason_kind
from schemas.config import Guard
from schemas.state import StreamHeader
from schemas.update import Decision, UpdateEvent

CHOICE_S = 30.0  # a choice of streams stands for so long, so that series do not come and go with every scrape
NEW_S = 600.0  # a stream counts as new for so long
STAY = 0.05  # estimated accuracy by which another stream must be worse to take a shown one's place
TROUBLED_S = 300.0  # and as in trouble for so long after the last refused or undone update
EVIDENCE = -math.log(Guard().false_alarm)  # at which the guard's bet is won, with the default of that setting
DRIFTING = 0.5  # of the drift score, which is 1 at the alarm
RATIOS = tuple(i / 20 for i in range(1, 20))
STEP_S = 1.0  # by which a clock is set anew; what it is slowed down or hastened by is less


class StreamView(NamedTuple):
    """What is shown of a stream; None is not shown. Times are monotonic seconds: ages stay what they are when somebody
    sets the clock."""

    first_seen: float
    last_decision: float
    decision: float
    step: float
    answers_source: float
    frozen: float
    trusted: float = 1.0
    shifted: float = 0.0
    blind: float = 0.0
    held_back: float = 0.0
    last_update: float | None = None
    troubled: float | None = None
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    source_accuracy: float | None = None
    confidence: float | None = None
    entropy: float | None = None
    marginal_entropy: float | None = None
    flip_rate: float | None = None
    raw_norm: float | None = None
    generated_norm: float | None = None
    cosine: float | None = None
    distance: float | None = None
    drift: float | None = None
    adapting: float | None = None

    def in_trouble(self, now: float) -> bool:
        """Whether an update was refused or undone lately, the guard does not trust the adapted parameters, or most
        frames are blank or repeat."""
        return not self.trusted or self.blind == 1.0 or (self.troubled or 0.0) > now - TROUBLED_S

    @property
    def drifting(self) -> bool:
        return (self.drift or 0.0) > DRIFTING


DECISIONS = get_args(Decision)
# Field of the view, name behind driftkeel_stream_, help.
GAUGES = (
    (
        "accuracy",
        "estimated_accuracy_ratio",
        "Accuracy of the adapted parameters now, estimated without labels. Only with adapt.method mgg.",
    ),
    ("low", "estimated_accuracy_low_ratio", "Lower end of the 90% interval of the estimated accuracy."),
    ("high", "estimated_accuracy_high_ratio", "Upper end of the 90% interval of the estimated accuracy."),
    ("source_accuracy", "source_accuracy_ratio", "Accuracy of the source model on the same frames, estimated."),
    ("confidence", "confidence_ratio", "Mean calibrated confidence of recent predictions."),
    ("entropy", "entropy_nats", "Mean entropy of recent predictions. High: the model is unsure."),
    (
        "marginal_entropy",
        "marginal_entropy_nats",
        "Entropy of the mean of recent predictions. Near 0: nearly all answers are of one class.",
    ),
    ("flip_rate", "flip_ratio", "Share of recent predictions for which the source model gives another class."),
    ("raw_norm", "raw_gradient_norm", "Norm of the newest unsupervised gradient."),
    ("generated_norm", "generated_gradient_norm", "Norm of the newest gradient that the generator made."),
    (
        "cosine",
        "gradient_cosine",
        "Cosine between the newest unsupervised and generated gradients: 1 same direction, below 0 opposite.",
    ),
    ("distance", "source_distance", "How far the newest update left the adapted parameters from source."),
    (
        "drift",
        "drift_score",
        "Evidence that the stream is drifting now. At 1 drift is detected, and the score begins again.",
    ),
    (
        "adapting",
        "adapting",
        "With adapt.mode on_demand, 1 while the stream adapts, 0 while it has settled and is only checked now and "
        "then.",
    ),
    ("step", "step", "Updates that the stream's parameters have seen since the source model."),
    ("answers_source", "answers_source", "1 if the source model answers, 0 if adapted or approved parameters do."),
    ("frozen", "frozen", "1 if a command has frozen the stream: no updates."),
    ("shifted", "shifted", "1 while the guard is sure that the frames are unlike those that source was trained for."),
    ("trusted", "trusted", "0 while the guard lets source answer, because it believes that source does better."),
    ("blind", "blind", "1 while most frames are blank or repeat earlier ones: a covered or frozen camera."),
    (
        "held_back",
        "held_back",
        "1 while updates are held back on purpose: adaptation is off, the stream is frozen, it is a quiet hour, the "
        "hour's updates are used up, or nearly all frames are of one class.",
    ),
    ("decision", "decision", f"The newest decision: {', '.join(f'{i} {d}' for i, d in enumerate(DECISIONS))}."),
    ("last_decision", "last_decision_timestamp_seconds", "When the stream's newest frames were decided on."),
    ("last_update", "last_update_timestamp_seconds", "When this worker last applied an update to the stream."),
    (
        "troubled",
        "last_trouble_timestamp_seconds",
        "When an update of the stream was last refused because it might do harm, or undone.",
    ),
)
# Field of the view, name behind driftkeel_fleet_, help.
DISTRIBUTIONS = (
    (
        "accuracy",
        "estimated_accuracy_ratio",
        "Estimated accuracy of the adapted parameters, all streams of the worker now.",
    ),
    (
        "source_accuracy",
        "source_accuracy_ratio",
        "Estimated accuracy of the source model, all streams of the worker now.",
    ),
)
_TIMES = frozenset({"last_decision", "last_update", "troubled"})
_BACK = ("rolled_back", "reset", "imported", "carried")


def next_view(
    before: StreamView | None, event: UpdateEvent, header: StreamHeader, now: float, blind: bool | None = None
) -> StreamView:
    """The view after one more event. What an event does not say of its gradients stays as it was, and so does what an
    event without frames does not say of the camera: whether it is `blind`, or held back. `now` is monotonic seconds."""
    if before is None:
        before = StreamView(now, now, 0.0, 0.0, 0.0, 0.0)
    kept: dict[str, float | None] = {
        "raw_norm": before.raw_norm,
        "generated_norm": before.generated_norm,
        "cosine": before.cosine,
        "distance": before.distance,
    }
    if event.decision in _BACK:
        kept = dict.fromkeys(kept)
    for field, value in (
        ("raw_norm", event.raw_gradient_norm),
        ("generated_norm", event.generated_gradient_norm),
        ("cosine", event.cosine),
        ("distance", event.source_distance),
    ):
        if value is not None:
            kept[field] = value
    after, watch = event.after, header.drift
    kind = reason_kind(event)
    return StreamView(
        first_seen=before.first_seen,
        last_decision=now if event.frames else before.last_decision,
        decision=float(DECISIONS.index(event.decision)),
        step=float(event.step),
        answers_source=float(event.parameters == "source"),
        frozen=float(bool(header.policy and header.policy.frozen)),
        last_update=now if event.decision in ("applied", "partial") else before.last_update,
        troubled=now if kind in TROUBLE else before.troubled,
        blind=before.blind if blind is None else float(blind),
        held_back=float(kind in HELD_BACK) if event.frames else before.held_back,
        accuracy=after.estimated_accuracy if after else before.accuracy,
        low=after.low if after else before.low,
        high=after.high if after else before.high,
        source_accuracy=after.source_accuracy if after else before.source_accuracy,
        confidence=after.confidence if after else before.confidence,
        entropy=after.entropy if after else before.entropy,
        marginal_entropy=after.marginal_entropy if after else before.marginal_entropy,
        flip_rate=after.flip_rate if after else before.flip_rate,
        drift=_drift(header),
        trusted=float(header.guard.trusted),
        shifted=float(header.guard.shifted),
        adapting=float(watch.adapting) if watch else None,
        **kept,
    )


def _drift(header: StreamHeader) -> float:
    """Of the cumulative sums and of the guard's bet, the one that is nearer to its alarm."""
    sums = max((0.0, *header.drift.rise, *header.drift.fall)) if header.drift else 0.0
    return max(sums / ALARM, header.guard.wealth / EVIDENCE)


class StreamSeries(Collector):
    """The newest view of every resident stream, and at a scrape the series of those that are chosen.

    The worker's loop calls `put` and `forget`; a scrape comes from another thread and sees whole views.
    """

    def __init__(self, most: int, silent_after_s: float) -> None:
        """At most `most` streams have series; one without frames for `silent_after_s` counts as silent."""
        self._most, self._silent_after_s = most, silent_after_s
        self._views: dict[str, StreamView] = {}
        self._chosen: set[str] = set()
        self._chosen_at = -math.inf
        self._epoch = time() - monotonic()

    def get(self, stream: str) -> StreamView | None:
        return self._views.get(stream)

    def put(self, stream: str, view: StreamView) -> None:
        self._views[stream] = view

    def forget(self, stream: str) -> None:
        """Another worker has it: no stale value stays."""
        self._views.pop(stream, None)

    def describe(self) -> Iterable[Metric]:
        return self._families({}, [], 0.0)

    def collect(self) -> Iterable[Metric]:
        now, views = monotonic(), dict(self._views)
        return self._families(views, self._choice(views, now), now)

    def _families(
        self, views: dict[str, StreamView], chosen: list[tuple[str, StreamView]], now: float
    ) -> Iterable[Metric]:
        epoch = self._began()
        for field, name, text in GAUGES:
            family = GaugeMetricFamily(f"driftkeel_stream_{name}", text, labels=["stream"])
            for stream, view in chosen:
                value = getattr(view, field)
                if value is not None:
                    family.add_metric([stream], value + epoch if field in _TIMES else value)
            yield family
        for field, name, text in DISTRIBUTIONS:
            values = [value for view in views.values() if (value := getattr(view, field)) is not None]
            yield _distribution(f"driftkeel_fleet_{name}", text, values)
        yield self._conditions(list(views.values()), len(chosen), now)

    def _began(self) -> float:
        """What the clock says of when monotonic seconds began; the same at each scrape, until it is set anew."""
        epoch = time() - monotonic()
        if abs(epoch - self._epoch) > STEP_S:
            self._epoch = epoch
        return self._epoch

    def _choice(self, views: dict[str, StreamView], now: float) -> list[tuple[str, StreamView]]:
        self._chosen &= set(views)
        places_free = len(self._chosen) < min(self._most, len(views))
        if places_free or now - self._chosen_at > CHOICE_S:
            self._chosen_at = now
            self._chosen = set(heapq.nlargest(self._most, views, key=lambda s: self._need(s, views[s], now)))
        return [(stream, views[stream]) for stream in sorted(self._chosen)]

    def _need(self, stream: str, view: StreamView, now: float) -> tuple[bool, bool, bool, float]:
        """The larger, the more it should be seen; of nearly equal need, those that are seen stay."""
        new = view.first_seen > now - NEW_S
        accuracy = 1.0 if view.accuracy is None else view.accuracy
        return view.in_trouble(now), view.drifting, new, STAY * (stream in self._chosen) - accuracy

    def _conditions(self, every: list[StreamView], shown: int, now: float) -> GaugeMetricFamily:
        counts = {
            "any": len(every),
            "shown": shown,
            "in_trouble": sum(view.in_trouble(now) for view in every),
            "drifting": sum(view.drifting for view in every),
            "shifted": sum(view.shifted == 1.0 for view in every),
            "adapting": sum(view.adapting == 1.0 for view in every),
            "answered_by_source": sum(view.answers_source == 1.0 for view in every),
            "frozen": sum(view.frozen == 1.0 for view in every),
            "silent": sum(now - view.last_decision > self._silent_after_s for view in every),
        }
        text = (
            "Number of the worker's streams in each condition. any: all of them; shown: with series of their own; "
            "silent: without a frame for metrics.silent_after_s."
        )
        family = GaugeMetricFamily("driftkeel_fleet_streams", text, labels=["condition"])
        for condition, count in counts.items():
            family.add_metric([condition], count)
        return family


def _distribution(name: str, text: str, values: list[float]) -> GaugeHistogramMetricFamily:
    counts = [0] * (len(RATIOS) + 1)
    for value in values:
        counts[bisect_left(RATIOS, value)] += 1
    labels = [*map(str, RATIOS), "+Inf"]
    buckets = list(zip(labels, map(float, accumulate(counts)), strict=True))
    return GaugeHistogramMetricFamily(name, text, buckets=buckets, gsum_value=sum(values))
