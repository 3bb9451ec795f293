"""Series of single streams, for those with the greatest need, and of all streams together.

A site may have thousands of streams, and Prometheus pays for each series. So the newest values of all streams are kept
in memory, and each scrape shows those of some: streams in trouble first, then those that drift, the newest, and then
those with the lowest estimated accuracy. All streams count in the distributions and numbers of the fleet.
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

CHOICE_S = 30.0  # between two choices of streams, so that series do not come and go with every scrape
NEW_S = 600.0  # age up to which a stream counts as new
STAY = 0.05  # estimated accuracy by which another stream must be worse to take a shown one's place
TROUBLED_S = 300.0  # time that a stream counts as in trouble after its last refused or undone update
EVIDENCE = -math.log(Guard().false_alarm)  # log wealth at which the guard's test alarms, by default
DRIFTING = 0.5  # of the drift score, which is 1 at the alarm
RATIOS = tuple(i / 20 for i in range(1, 20))
STEP_S = 1.0  # a larger jump means that the clock was set; a clock that is slewed jumps less


class StreamView(NamedTuple):
    """What is shown of a stream; None is not shown. Times are monotonic, so ages stay right if the clock is set."""

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
    estimated_accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    source_accuracy: float | None = None
    confidence: float | None = None
    entropy: float | None = None
    marginal_entropy: float | None = None
    flip_rate: float | None = None
    raw_gradient_norm: float | None = None
    generated_gradient_norm: float | None = None
    cosine: float | None = None
    source_distance: float | None = None
    drift: float | None = None
    adapting: float | None = None

    def in_trouble(self, now: float) -> bool:
        """Whether an update was refused or undone lately, the guard distrusts the adapted parameters, or the camera is
        blind."""
        return not self.trusted or self.blind == 1.0 or (self.troubled or 0.0) > now - TROUBLED_S

    @property
    def drifting(self) -> bool:
        return (self.drift or 0.0) > DRIFTING


DECISIONS = get_args(Decision)
# Field of the view, name behind driftkeel_stream_, help.
GAUGES = (
    (
        "estimated_accuracy",
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
    ("raw_gradient_norm", "raw_gradient_norm", "Norm of the newest unsupervised gradient."),
    ("generated_gradient_norm", "generated_gradient_norm", "Norm of the newest gradient that the generator made."),
    (
        "cosine",
        "gradient_cosine",
        "Cosine between the newest unsupervised and generated gradients: 1 same direction, below 0 opposite.",
    ),
    ("source_distance", "source_distance", "How far the newest update left the adapted parameters from source."),
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
        "estimated_accuracy",
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
# Fields that are those of an event, and of its estimates.
_GRADIENTS = ("raw_gradient_norm", "generated_gradient_norm", "cosine", "source_distance")
_ESTIMATES = (
    *("estimated_accuracy", "low", "high", "source_accuracy"),
    *("confidence", "entropy", "marginal_entropy", "flip_rate"),
)


def next_view(
    before: StreamView | None, event: UpdateEvent, header: StreamHeader, now: float, blind: bool | None = None
) -> StreamView:
    """The view after one more event; `now` is monotonic seconds.

    What an event does not say stays as it was: its gradients, its estimates and, for an event without frames, whether
    the camera is `blind` or held back.
    """
    view = before or StreamView(now, now, 0.0, 0.0, 0.0, 0.0)
    kind = reason_kind(event)
    changes: dict[str, float | None] = {
        "decision": float(DECISIONS.index(event.decision)),
        "step": float(event.step),
        "answers_source": float(event.parameters == "source"),
        "frozen": float(bool(header.policy and header.policy.frozen)),
        "trusted": float(header.guard.trusted),
        "shifted": float(header.guard.shifted),
        "drift": _drift(header),
        "adapting": float(header.drift.adapting) if header.drift else None,
    }
    if event.frames:
        changes |= {"last_decision": now, "held_back": float(kind in HELD_BACK)}
    if blind is not None:
        changes["blind"] = float(blind)
    if event.decision in ("applied", "partial"):
        changes["last_update"] = now
    if kind in TROUBLE:
        changes["troubled"] = now
    if event.after is not None:
        changes |= {name: getattr(event.after, name) for name in _ESTIMATES}
    for name in _GRADIENTS:
        value = getattr(event, name)
        if value is not None or event.decision in _BACK:
            changes[name] = value
    return view._replace(**changes)  # type: ignore[arg-type]


def _drift(header: StreamHeader) -> float:
    """Of the cumulative sums and the guard's test, how near the nearer one is to its alarm."""
    sums = max((0.0, *header.drift.rise, *header.drift.fall)) if header.drift else 0.0
    return max(sums / ALARM, header.guard.wealth / EVIDENCE)


class StreamSeries(Collector):
    """Has the newest view of every resident stream, and gives a scrape the series of the chosen ones.

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
        """Drop a stream that has left this worker: no stale value stays."""
        self._views.pop(stream, None)

    def describe(self) -> Iterable[Metric]:
        return self._families({}, [], 0.0)

    def collect(self) -> Iterable[Metric]:
        now, views = monotonic(), dict(self._views)
        return self._families(views, self._choose(views, now), now)

    def _families(
        self, views: dict[str, StreamView], chosen: list[tuple[str, StreamView]], now: float
    ) -> Iterable[Metric]:
        epoch = self._epoch_now()
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

    def _epoch_now(self) -> float:
        """Time since the epoch at which monotonic seconds began; the same at each scrape until the clock is set."""
        epoch = time() - monotonic()
        if abs(epoch - self._epoch) > STEP_S:
            self._epoch = epoch
        return self._epoch

    def _choose(self, views: dict[str, StreamView], now: float) -> list[tuple[str, StreamView]]:
        self._chosen &= set(views)
        places_free = len(self._chosen) < min(self._most, len(views))
        if places_free or now - self._chosen_at > CHOICE_S:
            self._chosen_at = now
            self._chosen = set(heapq.nlargest(self._most, views, key=lambda s: self._need(s, views[s], now)))
        return [(stream, views[stream]) for stream in sorted(self._chosen)]

    def _need(self, stream: str, view: StreamView, now: float) -> tuple[bool, bool, bool, float]:
        """Sort key: the larger, the more the stream should be shown. Of nearly equal streams the shown one stays."""
        new = view.first_seen > now - NEW_S
        accuracy = 1.0 if view.estimated_accuracy is None else view.estimated_accuracy
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
