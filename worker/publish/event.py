"""What the update event of a micro-batch says: the audit trail."""

from __future__ import annotations

import math

from schemas.update import SealedEvent, UpdateEvent, seal
from worker.engine.engine import Engine
from worker.engine.judge import Judgement
from worker.engine.passes import BatchPrediction, Proposal
from worker.guard.answer import Policies, answering, named


def update_event(
    engine: Engine,
    policies: Policies,
    worker: str,
    prediction: BatchPrediction,
    judgement: Judgement,
    proposal: Proposal | None,
) -> SealedEvent:
    """The event of a micro-batch that is folded in with this judgement; `proposal` is None where nothing was computed
    for it beyond its predictions."""
    ruling, before, after = judgement.ruling, prediction.resident.header, judgement.header
    signals = proposal.signals if proposal else {}

    def signal(name: str) -> float | None:
        value = signals.get(name)
        return value if value is not None and math.isfinite(value) else None

    reason, (distance, layers) = ruling.reason, _moved(engine, judgement, proposal)
    if judgement.went_back_to is not None:
        reason = f"{reason}; to the snapshot of step {judgement.went_back_to[0].header.step}"
    return seal(
        UpdateEvent(
            **before.next_in_chain(),
            decision=ruling.decision,
            reason=reason,
            frames=[str(frame.position) for frame in prediction.batch.frames],
            step=after.step,
            loss=signal("loss"),
            entropy=signal("entropy"),
            discrepancy=signal("discrepancy"),
            raw_gradient_norm=signal("raw_gradient_norm"),
            generated_gradient_norm=signal("generated_gradient_norm"),
            cosine=signal("cosine"),
            source_distance=distance,
            layers=layers,
            flipped=prediction.observed.flipped if prediction.observed is not None else None,
            parameters=named(answering(policies.of(after), after), after),
            before=engine.estimate(before),
            after=engine.estimate(after),
            token=prediction.resident.token,
            bundle=engine.bundle_hash,
            worker=worker,
        )
    )


def _moved(engine: Engine, judgement: Judgement, proposal: Proposal | None) -> tuple[float | None, dict[str, float]]:
    """The norm affine's distance from source after the decision, and how far the decision moved each norm layer."""
    share, source = judgement.ruling.share, engine.like["affine"]
    if judgement.ruling.back:
        affine = source if judgement.went_back_to is None else judgement.went_back_to[1]["affine"]
        present = engine.tensors(judgement.header.stream)["affine"]
        return float((affine - source).norm()), engine.distances(present[None], affine[None])[0]
    if proposal is None or not judgement.ruling.apply:
        return None, {}
    layers = {layer: float(f"{share * moved:.4g}") for layer, moved in proposal.layers.items()}
    # An update that is accepted in part ends `share` of the way along one side of a triangle: source, the parameters
    # before, the whole update. Its distance from source follows from the lengths of the three sides.
    whole, before = proposal.signals["source_distance"], proposal.signals["present_distance"]
    way = sum(moved**2 for moved in proposal.layers.values())
    return math.sqrt(max(0.0, (1 - share) * before**2 + share * whole**2 - share * (1 - share) * way)), layers
