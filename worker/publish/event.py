"""What the update event of a micro-batch says: the audit trail."""

from __future__ import annotations

import math
from typing import Any

from schemas.update import SealedEvent
from worker.engine.engine import Engine
from worker.engine.judge import Judgement
from worker.engine.passes import Outlook, Proposal
from worker.guard.answer import named


def update_event(
    engine: Engine, worker: str, outlook: Outlook, judgement: Judgement, proposal: Proposal | None
) -> SealedEvent:
    """Of a micro-batch that counts as done with what the judgement leaves; `proposal` where an update was computed."""
    ruling, before, after = judgement.ruling, outlook.resident.header, judgement.header
    signals = proposal.signals if proposal else {}

    def signal(name: str) -> float | None:
        value = signals.get(name)
        return value if value is not None and math.isfinite(value) else None

    said: dict[str, Any] = {"reason": ruling.reason, "layers": _moved(judgement, proposal)}
    said["source_distance"] = _distance(judgement, proposal)
    if ruling.back:
        said |= _way_back(engine, judgement)
    return before.next_event(
        decision=ruling.decision,
        frames=[str(frame.position) for frame in outlook.batch.frames],
        step=after.step,
        loss=signal("loss"),
        entropy=signal("entropy"),
        discrepancy=signal("discrepancy"),
        raw_gradient_norm=signal("raw_gradient_norm"),
        generated_gradient_norm=signal("generated_gradient_norm"),
        cosine=signal("cosine"),
        flipped=outlook.observed.flipped if outlook.observed is not None else None,
        parameters=named(outlook.batch.answer if after.guard.trusted else "source", after),
        before=engine.estimate(before),
        after=engine.estimate(after),
        token=outlook.resident.token,
        bundle=engine.bundle_hash,
        worker=worker,
        **said,
    )


def _distance(judgement: Judgement, proposal: Proposal | None) -> float | None:
    """From source after an update that was accepted, whole or in part: of the point that lies `share` of the way from
    where the stream was to where the update leads, by the lengths of that triangle's sides."""
    share = judgement.ruling.share
    if proposal is None or not judgement.ruling.apply:
        return None
    whole, present = proposal.signals["source_distance"], proposal.signals["present_distance"]
    way = sum(moved**2 for moved in proposal.layers.values())
    return math.sqrt(max(0.0, (1 - share) * present**2 + share * whole**2 - share * (1 - share) * way))


def _moved(judgement: Judgement, proposal: Proposal | None) -> dict[str, float]:
    """How far each layer moved by an update that was accepted, whole or in part."""
    ruling = judgement.ruling
    if proposal is None or not ruling.apply:
        return {}
    return {layer: float(f"{ruling.share * moved:.4g}") for layer, moved in proposal.layers.items()}


def _way_back(engine: Engine, judgement: Judgement) -> dict[str, Any]:
    """What the event says of going back: where to, and how far each layer moves by it."""
    source, restored = engine.like["affine"], judgement.went_back_to
    affine = source if restored is None else restored[1]["affine"]
    now = engine.tensors(judgement.header.stream)["affine"]
    said: dict[str, Any] = {
        "source_distance": float((affine - source).norm()),
        "layers": engine.distances(now[None], affine[None])[0],
    }
    if restored is not None:
        said["reason"] = f"{judgement.ruling.reason}; to the snapshot of step {restored[0].header.step}"
    return said
