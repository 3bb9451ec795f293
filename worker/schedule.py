"""Which micro-batches adapt: not those of settled streams, and under overload none that are late.

Under overload the worker so saves time on adaptation before it lets predictions be late.
"""

from __future__ import annotations

from dataclasses import replace

from monitoring.drift import wants_update
from monitoring.metrics import WorkerMetrics
from monitoring.proxies import estimate
from schemas.config import Adapt, Batch
from worker.batcher import MicroBatch
from worker.engine import Engine

SHED_AFTER = 0.5  # of the latency budget; the rest is for the pass
SETTLED = "settled: drift detection sees no move (adapt.mode is on_demand)"


class Scheduler:
    """Decides for every micro-batch of a pass whether its backward pass is worth it now."""

    def __init__(self, batch: Batch, adapt: Adapt, engine: Engine, metrics: WorkerMetrics) -> None:
        self._patience = SHED_AFTER * batch.latency_budget_ms / 1000
        self._overload = f"overload: frames had used half of batch.latency_budget_ms = {batch.latency_budget_ms}"
        self._on_demand = adapt.mode == "on_demand"
        self._engine, self._metrics = engine, metrics

    def decide(self, batches: list[MicroBatch], now: float) -> list[MicroBatch]:
        """The same micro-batches, those that shall not adapt marked and counted. `now` is seconds since the epoch."""
        return [self._decided(batch, now) if batch.adapt else batch for batch in batches]

    def _decided(self, batch: MicroBatch, now: float) -> MicroBatch:
        if self._on_demand and not self._wanted(batch.stream):
            self._metrics.left_out.labels("settled").inc()
            return replace(batch, adapt=False, reason=SETTLED)
        if self._late(batch, now):
            self._metrics.left_out.labels("overload").inc()
            return replace(batch, adapt=False, reason=self._overload)
        return batch

    def _wanted(self, stream: str) -> bool:
        manifest, header = self._engine.bundle.manifest, self._engine.resident(stream).header
        clean = manifest.model.clean_accuracy
        accuracy = estimate(header.proxies, manifest.calibration, clean).estimated_accuracy
        return wants_update(header.drift, accuracy, clean)

    def _late(self, batch: MicroBatch, now: float) -> bool:
        fresh = batch.unpublished
        return self._patience > 0 and bool(fresh) and now - fresh[0].sent > self._patience
