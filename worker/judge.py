"""From what a pass proposes to what becomes of a stream: header, parameters, and why. Without broker and store."""

from __future__ import annotations

from dataclasses import dataclass, replace

from meta.proxies import as_source
from schemas.state import StreamHeader
from worker.engine import Engine, Outlook, Proposal, Proposals, next_header, next_proxies
from worker.guard import Guard, Verdict


@dataclass(frozen=True)
class Judgement:
    """A verdict, the header after it, and the proposal whose tensors become the stream's; None: they stay."""

    verdict: Verdict
    header: StreamHeader
    kept: Proposal | None


def judge(
    engine: Engine, guard: Guard, outlook: Outlook, proposals: Proposals, proposal: Proposal | None, watch: bool
) -> Judgement:
    """Judge one micro-batch. Where less than the whole update is accepted, its row in `proposals` changes.

    A stream goes back to source here; who keeps snapshots may do better for a verdict that says `rolled_back`.
    """
    before = outlook.resident.header
    update = proposal is not None and proposal.update
    signals = proposal.signals if proposal is not None else {}
    estimator = engine.bundle.manifest.calibration.estimator
    proxies = next_proxies(before.proxies, outlook, signals, estimator)
    state = guard.observe(before.guard, outlook.sight, proxies)
    verdict = Verdict("skipped", outlook.batch.reason)
    if proposal is not None and update:
        verdict = guard.judge(before.guard, state, outlook.sight, proxies, signals, proposal.finite)
        if verdict.back:
            verdict = replace(verdict, decision="reset")
            proposals.replace(proposal, engine.like)
            proxies = as_source(proxies)
        elif verdict.share < 1:
            proposals.shrink(proposal, verdict.share, engine.tensors(outlook.batch.stream))
    header = next_header(before, outlook, verdict.apply, watch, proxies, state)
    if verdict.back:
        header.step = 0
    taken = verdict.apply or verdict.back if update else proposal is not None and proposal.finite
    return Judgement(verdict, header, proposal if taken else None)
