"""Signals from a method's answers alone, for methods other than a bundle's generator.

The answers of a method and those of the source model show whether the method collapses to one class, or departs from
the source model. They do not tell the accuracy: the bundle's estimator is fitted to its own generator, and is wrong for
other methods (numbers in docs/trust.md). Names and meanings of the signals are those of `meta.proxies`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from meta.method import Forward, State, on_cpu
from meta.norms import AdaptableModel
from meta.objective import entropy, per_stream_mean
from meta.proxies import TINY, Observed, rank_among, said_to
from meta.threads import one_thread


class AnswerObserver:
    """Computes the signals of a method's answers. `entropies` as for `meta.proxies.Observer`."""

    def __init__(self, model: AdaptableModel, entropies: Sequence[float] = ()) -> None:
        self._model, self._entropies = model, torch.tensor(list(entropies))

    @torch.no_grad()
    def observe(self, frames: Tensor, forward: Forward, chosen: Tensor) -> tuple[list[Observed], Tensor | None]:
        """As `Observer.observe`; the source model always runs now."""
        source = self._model(frames.index_select(0, chosen)) if len(chosen) else None
        passed = {"answer": forward.answer, "stream": forward.stream, "counts": forward.counts, "chosen": chosen}
        passed = on_cpu(passed if source is None else passed | {"source": source})
        with one_thread():
            return _observed(passed, self._entropies), source


def _observed(passed: State, entropies: Tensor) -> list[Observed]:
    answer, stream, counts = passed["answer"], passed["stream"], passed["counts"]
    frames = counts.long().tolist()
    own = _own(answer, stream, counts)
    if "source" not in passed:
        return [Observed(count, mine, 0, {}) for count, mine in zip(frames, own, strict=True)]
    stream, source = stream.index_select(0, passed["chosen"]), passed["source"]
    asked = torch.bincount(stream, minlength=len(frames)).float()
    moved = (answer.index_select(0, passed["chosen"]).argmax(1) != source.argmax(1)).float()
    surprise = entropy(source) / math.log(source.shape[1])
    each = {"source_entropy": surprise, "source_rank": rank_among(entropies, surprise), "flips": moved, "moved": moved}
    shadow = _means(each, stream, asked)
    said = said_to(stream, source.argmax(1).tolist(), len(frames))
    rows = zip(frames, own, asked.long().tolist(), shadow, said, strict=True)
    return [Observed(*row) for row in rows]


def _own(answer: Tensor, stream: Tensor, counts: Tensor) -> list[dict[str, float]]:
    """Signals of the answers (B, K). `marginal` is in units of its maximum for as many frames; one frame has none."""
    classes = answer.shape[1]
    own = _means({"entropy": entropy(answer) / math.log(classes)}, stream, counts)
    mixed = per_stream_mean(answer.softmax(1), stream, counts.clamp_min(1))
    marginal = -(mixed * mixed.clamp_min(TINY).log()).sum(1).nan_to_num()
    for mine, count, nats in zip(own, counts.tolist(), marginal.tolist(), strict=True):
        if count > 1:
            mine["marginal"] = min(1.0, nats / math.log(min(count, classes)))
    return own


def _means(frames: dict[str, Tensor], stream: Tensor, counts: Tensor) -> list[dict[str, float]]:
    """Means of signals (B,) over each stream's frames. Values that are not finite become 0: other signals show them."""
    table = per_stream_mean(torch.stack(list(frames.values()), 1), stream, counts.clamp_min(1))
    return [dict(zip(frames, row, strict=True)) for row in table.nan_to_num(posinf=0.0, neginf=0.0).tolist()]
