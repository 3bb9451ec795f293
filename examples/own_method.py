"""A method of your own for the benchmark (`own_method.yaml`): Tent, only on frames that the model is sure of."""

import math
from typing import ClassVar

from torch import Tensor

from meta.baselines import Baseline
from meta.baselines.base import Options
from meta.method import Forward, State
from meta.objective import entropy, per_stream_mean


class SureTent(Baseline):
    """One gradient step down the mean entropy of the frames below 0.4 of its largest."""

    name = "sure-tent"
    published: ClassVar[Options] = {"step_size": 1e-3, "statistics": "source"}

    def loss(self, forward: Forward) -> tuple[Tensor, Tensor, State]:
        """Loss per stream (S,), whether each takes a step (S,) bool, and changes to what the method remembers."""
        each = entropy(forward.logits)
        sure = (each.detach() < 0.4 * math.log(self.classes)).float()
        loss = per_stream_mean(sure * each, forward.stream, forward.counts.clamp_min(1))
        return loss, loss.detach() > 0, {}
