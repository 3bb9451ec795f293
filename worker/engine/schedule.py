"""Which micro-batches make an update, and whose parameters answer them.

These make none: streams whose policy says so, settled ones, those that rest after the guard took them back, and late
frames. So an overloaded worker saves time on updates before it lets predictions be late.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from monitoring.drift import wants_update
from monitoring.metrics import WorkerMetrics
from schemas.config import Adapt
from schemas.policy import Policy
from schemas.state import StreamHeader
from worker.batch.batcher import MicroBatch
from worker.batch.lateness import Lateness
from worker.decode.image import DecodedFrame
from worker.engine.engine import Engine
from worker.guard.answer import Policies, answering
from worker.guard.guard import resting

HOMELESS = "something else lies under the stream's key in the store, or its position is wrong"
CONTESTED = "too few frames, and another worker has frames of the stream, too"
NARROW = 8  # micro-batches in a pass; among more, some make an update anyway
SETTLED = "settled: drift detection sees no move (adapt.mode is on_demand)"


class Scheduler:
    """Decides for every micro-batch of a pass who answers, and whether it makes an update."""

    def __init__(
        self, lateness: Lateness, most: int, adapt: Adapt, policies: Policies, engine: Engine, metrics: WorkerMetrics
    ) -> None:
        """`most`: batch.max_batch. Only a stream that makes no update may have a micro-batch of more frames."""
        self._lateness, self._most = lateness, most
        self._overload = f"overload: frames had used half of batch.latency_budget_ms = {lateness.budget_ms}"
        self._spared = (
            f"overload: frames had waited for {lateness.spared_after_ms} ms, on the way to half of the budget"
        )
        self._on_demand = adapt.mode == "on_demand"
        self._policies, self._engine, self._metrics = policies, engine, metrics

    def decide(self, batches: list[MicroBatch], now: float) -> list[MicroBatch]:
        """The same micro-batches, with those that make no update marked and counted. `now` is seconds since the epoch.

        In a small pass, settled streams may join in where another stream makes an update (see `wants_update`).
        """
        decided = [self._decided(batch, now) for batch in batches]
        if len(batches) <= NARROW and any(batch.adapt for batch in decided):
            decided = [replace(batch, adapt=True, reason="") if self._joins(batch) else batch for batch in decided]
        self._metrics.left_out.labels("settled").inc(sum(batch.reason == SETTLED for batch in decided))
        return decided

    def predicts_only(self, stream: str, oldest: DecodedFrame, now: float) -> bool:
        """Whether the stream's next micro-batch is known to make no update; `oldest` is its first frame that is not
        predicted yet. `now` is seconds since the epoch."""
        header = self._engine.resident(stream).header
        return (
            self._spares(oldest, now)
            or bool(held_back(self._policies.of(header), header, now))
            or self._settled(stream)
        )

    def _decided(self, batch: MicroBatch, now: float) -> MicroBatch:
        resident = self._engine.resident(batch.stream)
        if resident.homeless:
            return replace(batch, adapt=False, answer="source", hurried=True, reason=HOMELESS)
        if resident.contested and not batch.fold:
            batch = replace(batch, fold=True, reason=CONTESTED)
        header = resident.header
        policy = self._policies.of(header)
        batch = replace(batch, answer=answering(policy, header))
        fresh = batch.unpublished
        oldest = fresh[0] if fresh else None
        late = oldest is not None and self._lateness.hurried(oldest.sent, oldest.received, now)
        # Before the reason "too few frames": a slow camera that its policy holds back is not short of frames.
        if batch.fold and (reason := held_back(policy, header, now)):
            self._metrics.left_out.labels("policy").inc()
            return replace(batch, adapt=False, hurried=late, reason=reason)
        if batch.fold and not batch.adapt:
            return replace(batch, hurried=late)
        if late:  # Folded in now: if they were held for an update, they would have to be predicted once more.
            self._metrics.left_out.labels("overload").inc()
            return replace(batch, adapt=False, fold=True, hurried=True, reason=self._overload)
        if batch.adapt and self._spares(oldest, now):
            self._metrics.left_out.labels("overload").inc()
            return replace(batch, adapt=False, reason=self._spared)
        if batch.adapt and (reason := resting(header.guard, len(batch.frames))):  # The guard would refuse its update.
            self._metrics.left_out.labels("resting").inc()
            return replace(batch, adapt=False, reason=reason)
        if batch.adapt and self._settled(batch.stream):
            return replace(batch, adapt=False, reason=SETTLED)
        return batch

    def _joins(self, batch: MicroBatch) -> bool:
        """Whether a settled stream makes an update because another one of its pass does. A micro-batch that is larger
        than usual does not: it was taken that large because it would make no update."""
        usual = len(batch.frames) <= self._most
        return batch.reason == SETTLED and usual and not self._settled(batch.stream, company=True)

    def _settled(self, stream: str, company: bool = False) -> bool:
        """Whether drift detection sees no need for the stream's next update."""
        if not self._on_demand:
            return False
        header, clean = self._engine.resident(stream).header, self._engine.bundle.manifest.model.clean_accuracy
        return not wants_update(header.drift, self._engine.estimate(header).estimated_accuracy, clean, company)

    def _spares(self, oldest: DecodedFrame | None, now: float) -> bool:
        return oldest is not None and self._lateness.spared(oldest.sent, oldest.received, now)


def held_back(policy: Policy, header: StreamHeader, now: float) -> str:
    """Why the policy allows no update at `now` (seconds since the epoch); empty where it does."""
    if policy.frozen:
        return "policy: frozen"
    if policy.is_quiet(datetime.fromtimestamp(now, UTC)):
        return f"policy: quiet hours {', '.join(policy.quiet_hours)}"
    most = policy.max_updates_per_hour
    if most and header.lately.within(now) >= most:
        return f"policy: {most} updates in this hour"
    return ""
