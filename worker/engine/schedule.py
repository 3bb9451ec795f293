"""Which micro-batches adapt, and whose parameters answer them.

No updates where the stream's policy says so, none of settled streams nor of those that rest after going back, and
under overload none of those that are late: under overload the worker so saves time on adaptation before it lets
predictions be late.
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
NARROW = 8  # streams in a pass; of more, some are due for an update anyway
SETTLED = "settled: drift detection sees no move (adapt.mode is on_demand)"


class Scheduler:
    """Decides for every micro-batch of a pass who answers, and whether its backward pass is worth it now."""

    def __init__(
        self, lateness: Lateness, most: int, adapt: Adapt, policies: Policies, engine: Engine, metrics: WorkerMetrics
    ) -> None:
        """`most`: frames that a micro-batch has where it is no backlog of a stream at rest."""
        self._lateness, self._most = lateness, most
        self._overload = f"overload: frames had used half of batch.latency_budget_ms = {lateness.budget_ms}"
        self._spared = (
            f"overload: frames had waited for {lateness.spared_after_ms} ms, on the way to half of the budget"
        )
        self._on_demand = adapt.mode == "on_demand"
        self._policies, self._engine, self._metrics = policies, engine, metrics

    def decide(self, batches: list[MicroBatch], now: float) -> list[MicroBatch]:
        """The same micro-batches, those that shall not adapt marked and counted. `now` is seconds since the epoch."""
        decided = [self._decided(batch, now) for batch in batches]
        if len(batches) <= NARROW and any(batch.adapt for batch in decided):
            decided = [replace(batch, adapt=True, reason="") if self._joins(batch) else batch for batch in decided]
        self._metrics.left_out.labels("settled").inc(sum(batch.reason == SETTLED for batch in decided))
        return decided

    def predicts_only(self, stream: str, oldest: DecodedFrame, now: float) -> bool:
        """Whether the stream's next micro-batch, `oldest` being the first of its frames to predict, is known to make no
        update. `now` is seconds since the epoch."""
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
        batch = replace(batch, answer=answering(policy, header, header.guard.trusted))
        fresh = batch.unpublished
        oldest = fresh[0] if fresh else None
        late = oldest is not None and self._lateness.hurried(oldest.sent, oldest.received, now)
        # Before too few frames: a slow camera that is held back on purpose is not stuck.
        if batch.fold and (reason := held_back(policy, header, now)):
            self._metrics.left_out.labels("policy").inc()
            return replace(batch, adapt=False, hurried=late, reason=reason)
        if batch.fold and not batch.adapt:
            return replace(batch, hurried=late)
        if late:  # Nor do these wait for an update, for which they would be predicted once more.
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
        """Whether a settled stream makes an update as another of its pass does. Micro-batches of a backlog are large
        because they were to make none."""
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
