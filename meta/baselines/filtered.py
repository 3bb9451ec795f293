"""Baselines with the class filter of `meta.temporal`: what the filter alone brings, whatever adapts beside it.

They are no baselines of the benchmark's own list; a plan names them under `own_methods`.
"""

from __future__ import annotations

from torch import Tensor

from meta.baselines.base import Baseline
from meta.baselines.entropy import Tent
from meta.baselines.own import OwnSgd
from meta.baselines.plain import Source
from meta.method import Forward, State, Update
from meta.temporal import BELIEF, filter_classes, fresh_belief


class Filtered(Baseline):
    """Put before a baseline: its answers pass the filter; its loss and its updates see its own logits as before."""

    def fresh(self, streams: int) -> State:
        return super().fresh(streams) | fresh_belief(streams, self.classes, self.device)

    def predict(self, frames: Tensor, stream: Tensor, state: State) -> Forward:
        forward = super().predict(frames, stream, state)
        probability, belief = filter_classes(forward.logits.detach(), stream, forward.counts, state)
        forward.kept.update(belief, probability=probability)
        return forward

    def update(self, forward: Forward) -> Update:
        update = super().update(forward)
        return Update(update.state | _belief(forward), update.signals)

    def observe(self, forward: Forward) -> State:
        return super().observe(forward) | _belief(forward)


def _belief(forward: Forward) -> State:
    return {name: forward.kept[name] for name in BELIEF}


class FilteredSource(Filtered, Source):
    """The source model with the class filter."""

    name = "filtered-source"


class FilteredSgd(Filtered, OwnSgd):
    """Descent on our own objective with the class filter."""

    name = "filtered-sgd"


class FilteredTent(Filtered, Tent):
    """Tent with the class filter."""

    name = "filtered-tent"
