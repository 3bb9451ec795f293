"""What becomes of a stream after a pass: its header, its parameters, and why. Knows neither broker nor store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from meta.method import State
from meta.proxies import as_source
from schemas.state import Snapshot, StreamHeader
from worker.engine.engine import Engine
from worker.engine.header import next_header, next_proxies
from worker.engine.passes import BatchPrediction, Proposal, Proposals
from worker.guard.guard import Guard, Ruling

Earlier = tuple[Snapshot, State]


@dataclass(frozen=True)
class Judgement:
    """A ruling and the header after it. `kept`: the proposal whose tensors become the stream's; None: they stay as they
    are. `went_back_to`: the snapshot that the stream was rolled back to. `blind`: the camera seems to see nothing.
    """

    ruling: Ruling
    header: StreamHeader
    kept: Proposal | None
    went_back_to: Earlier | None = None
    blind: bool = False


def judge(
    engine: Engine,
    guard: Guard,
    prediction: BatchPrediction,
    proposals: Proposals,
    proposal: Proposal | None,
    drift_frames: int = 0,
    newest: Callable[[str], Earlier | None] = lambda stream: None,
) -> Judgement:
    """Judge one micro-batch. Where an update is not accepted as a whole, its row in `proposals` is changed.

    The ruling `rolled_back` leads to the stream's `newest` snapshot, and becomes a `reset` to source where it has none.
    `drift_frames`: how many frames make one signal for drift detection; 0 switches it off.
    """
    before = prediction.resident.header
    update = proposal is not None and proposal.update
    signals = proposal.signals if proposal is not None else {}
    # Hurried frames leave the proxies as they are: what these frames show depends on whose parameters answered them.
    proxies = before.proxies
    if not prediction.batch.hurried:
        proxies = next_proxies(before.proxies, prediction, signals, engine.accuracy_model)
    state = guard.observe(before.guard, prediction.sight, proxies)
    blind = bool(guard.blinded(before.guard, prediction.sight))
    ruling, earlier = Ruling("skipped", prediction.batch.reason), None
    if proposal is not None and update:
        ruling = guard.judge(before.guard, state, prediction.sight, proxies, signals, proposal.finite)
        if ruling.back:
            earlier = newest(prediction.batch.stream) if ruling.decision == "rolled_back" else None
            if earlier is None:
                ruling = replace(ruling, decision="reset")
            proposals.replace(proposal, earlier[1] if earlier else engine.like)
            proxies = as_source(proxies)
        elif ruling.share < 1:
            proposals.shrink(proposal, ruling.share)
    # Drift detection is off for a stream that rests after going back. It would find the stream settled, and the stream
    # would not adapt when it may again.
    header = next_header(before, prediction, ruling.apply, 0 if state.rest else drift_frames, proxies, state)
    if ruling.back:
        header.step = header.snapshot = earlier[0].header.step if earlier else 0
        header.drift = None  # It was learnt under the parameters that are gone.
    taken = ruling.apply or ruling.back if update else proposal is not None and proposal.finite
    return Judgement(ruling, header, proposal if taken else None, earlier, blind)
