"""`mgg` with a few streams per pass, for models whose activations would not fit into memory otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meta.learned import LearnedOptimizer
from meta.method import Forward, State, Update
from meta.mgg import MGG
from meta.norms import AdaptableModel
from meta.objective import SourceStatistics
from meta.outputs import concatenated

PASS_PIXELS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class _Served(Forward):
    """A forward pass with the `ready` update, both computed group by group."""

    ready: Update


class PiecewiseMGG(MGG):
    """As MGG, but `serve` computes the forward pass and the update of one group of streams after the other.

    Results are the same, since those of a stream do not depend on which streams share its pass.
    """

    def __init__(
        self, model: AdaptableModel, source: SourceStatistics, learned: LearnedOptimizer, classes: int, frames: int
    ) -> None:
        """frames: the maximum in one pass, except that a stream's micro-batch is never divided."""
        super().__init__(model, source, learned, classes)
        self._frames = frames

    def serve(
        self,
        frames: Tensor,
        stream: Tensor,
        state: State,
        adapts: Sequence[bool] | None = None,
        asked: Tensor | None = None,
    ) -> Forward:
        """As `MGG.serve`, but `asked` is ignored: observers run the source model if `source_output` is None."""
        groups = _groups(torch.bincount(stream, minlength=len(state["affine"])).tolist(), self._frames)
        passed, updated = [], []
        for first, last in groups:
            chosen = (stream >= first) & (stream < last)
            part = {name: tensor[first:last] for name, tensor in state.items()}
            forward = super().serve(frames[chosen], stream[chosen] - first, part, adapts and adapts[first:last])
            updated.append(super().update(forward))
            passed.append(replace(forward, gradient_forward=None))  # Its graph would fill the memory.
        kept = {name: torch.cat([forward.kept[name] for forward in passed]) for name in passed[0].kept}
        output = concatenated([forward.output for forward in passed])
        return _Served(
            logits=output.logits,
            features=output.features,
            rows=None,
            stream=stream,
            counts=torch.cat([forward.counts for forward in passed]),
            state=state,
            kept=kept,
            head=output.head,
            ready=_joined(updated),
        )

    def update(self, forward: Forward) -> Update:
        """The update, which `serve` has computed already."""
        return forward.ready if isinstance(forward, _Served) else super().update(forward)


def frames_in_pass(height: int, width: int) -> int:
    """The batch size for images of this size in passes with a gradient."""
    return max(8, PASS_PIXELS // (height * width))


def _groups(counts: list[int], frames: int) -> list[tuple[int, int]]:
    """Ranges [first, last) of streams, each with at most `frames` frames, or with a single stream."""
    groups, first, total = [], 0, 0
    for number, count in enumerate(counts):
        if total and total + count > frames:
            groups.append((first, number))
            first, total = number, 0
        total += count
    return [*groups, (first, len(counts))]


def _joined(updates: list[Update]) -> Update:
    state = {name: torch.cat([update.state[name] for update in updates]) for name in updates[0].state}
    signals = {name: torch.cat([update.signals[name] for update in updates]) for name in updates[0].signals}
    return Update(state, signals)
