"""Accuracy without labels: what a stream's frames show of it, per micro-batch and over recent frames.

Every signal is a mean over frames, so that it can be averaged on. Those in `OWN` come from the answers and the
parameters that adapt; those in `SHADOW` from a sample of the same frames under the source affine. Sources: mean
confidence (Hendrycks and Gimpel, ICLR 2017); the share above a threshold (ATC, Garg et al., ICLR 2022); disagreement
under dropout before the last layer (after AETTA, Lee et al., CVPR 2024, which drops in every block); disagreement
with the source model (after ASR's flip rate); discrepancy of features and the generator's own signals (ours).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from meta.estimator import AccuracyModel
from meta.method import Forward, State
from meta.norms import AdaptableModel
from meta.objective import SourceStatistics, per_stream_mean
from schemas.state import RunningProxies

OWN = (
    *("confidence", "answer_confidence", "entropy", "above", "dropout", "marginal", "changed", "stay"),
    *("discrepancy", "distance", "odd", "odd_last", "off_prototype"),
)
GENERATED = ("novelty", "dose")  # by methods that have them, where they update
SHADOW = (
    *("source_confidence", "source_entropy", "source_above", "source_dropout", "source_rank"),
    *("flips", "moved", "source_backing", "gap", "source_odd", "source_odd_last", "source_off_prototype"),
)
SIGNALS = OWN + GENERATED + SHADOW
WINDOW = 128  # frames over which signals are averaged, exponentially once there are so many
DROPPED, MASKS = 0.4, 4
TINY = 1e-12


@dataclass(frozen=True)
class Observed:
    """The signals of one micro-batch: means over `frames`, of those in `SHADOW` over `shadowed` of them, and the
    classes that source gives these."""

    frames: int
    own: dict[str, float]
    shadowed: int
    shadow: dict[str, float]
    source: tuple[int, ...] = ()

    @property
    def rank(self) -> float | None:
        """For the guard's bet."""
        return self.shadow["source_rank"] if self.shadowed else None

    @property
    def flipped(self) -> int | None:
        """How many of the shadowed frames source calls otherwise."""
        return round(self.shadow["flips"] * self.shadowed) if self.shadowed else None


class Observer:
    """Measures the signals of one model's passes.

    `threshold` is ATC's, of the highest probability; `entropies` are quantiles of the source model's entropy on clean
    frames.
    """

    def __init__(
        self, model: AdaptableModel, source: SourceStatistics, threshold: float, entropies: Sequence[float] = ()
    ) -> None:
        self.model, self.source, self.threshold = model, source, threshold
        self._entropies = torch.tensor(list(entropies))
        self._dropped = _dropped_heads(model)
        self._last = slice(model.feature_count - model.layers[-1].feature_count, model.feature_count)
        self._class_mean = source.class_mean
        if source.class_mean is not None and source.class_square is not None:
            spread = source.class_square - source.class_mean**2
            self._class_weight = 1 / spread.clamp_min(1e-4 * source.scale**2)
            # The nearest class mean in the last layer, each feature in source deviations: |m|^2 / 2 - x m is smallest.
            means = source.class_mean[:, self._last] / source.scale[self._last]
            self._class_way = (means / source.scale[self._last]).T.contiguous()
            self._class_bias = -(means**2).sum(1) / 2

    @torch.no_grad()
    def observe(self, frames: Tensor, forward: Forward, chosen: Tensor) -> list[Observed]:
        """What a pass shows, stream by stream; `chosen` (n,) are the places of the frames that source answers too.

        To be called directly after the pass, in the same thread.
        """
        own = _rows(self.own(forward))
        counts = forward.counts.long().tolist()
        if not len(chosen):
            return [Observed(count, mine, 0, {}) for count, mine in zip(counts, own, strict=True)]
        some = frames.index_select(0, chosen).contiguous(memory_format=torch.channels_last)
        signals, shadowed, logits = self.shadow(some, chosen, forward)
        said: list[list[int]] = [[] for _ in counts]
        for row, index in zip(forward.stream.index_select(0, chosen).tolist(), logits.argmax(1).tolist(), strict=True):
            said[row].append(index)
        each = zip(counts, own, shadowed.long().tolist(), _rows(signals), map(tuple, said), strict=True)
        return [Observed(*one) for one in each]

    def own(self, forward: Forward) -> State:
        """Signals (S,) of the frames of `forward`; directly after its pass, in the same thread."""
        head = self.model.frame_affine.head
        logits, answer = forward.logits.detach(), forward.answer
        frames, log_mix = self._frame_signals(logits, head), _marginal(forward, logits)
        frames["answer_confidence"] = answer.log_softmax(1).amax(1).exp()
        features = forward.features.detach()[:, : self.source.mean.numel()]
        frames |= self._oddness(features, logits)
        frames["changed"] = (answer.argmax(1) != logits.argmax(1)).float()
        means = self._means(frames, forward.stream, forward.counts)
        gap = (
            per_stream_mean(features, forward.stream, forward.counts.clamp_min(1)) - self.source.mean
        ) / self.source.scale
        stay = forward.kept.get("class_stay")
        return means | {
            "marginal": log_mix,
            "stay": torch.zeros_like(log_mix) if stay is None else stay,
            "discrepancy": torch.log1p((gap**2).mean(1)),
            "distance": torch.log1p((forward.state["affine"] - self.model.source_affine).norm(dim=1)),
        }

    @torch.no_grad()
    def shadow(self, frames: Tensor, chosen: Tensor, forward: Forward) -> tuple[State, Tensor, Tensor]:
        """The source model on frames (n, ch, h, w) that lie at `chosen` (n,) in `forward`.

        Returns signals (S,), zero where a stream has no such frame; how many it has (S,); and the logits (n, K).
        """
        streams = len(forward.counts)
        logits, features = self.model.forward_with_features(frames)
        stream = forward.stream.index_select(0, chosen)
        counts = torch.bincount(stream, minlength=streams).float()
        answer = forward.answer.index_select(0, chosen)
        adapted = forward.logits.detach().index_select(0, chosen)
        found = self._frame_signals(logits, self.model.frame_affine.head) | self._oddness(features, logits)
        measured = {f"source_{name}": values for name, values in found.items()}
        said = answer.argmax(1)
        probability = logits.softmax(1)
        measured["flips"] = (said != logits.argmax(1)).float()
        measured["moved"] = (adapted.argmax(1) != logits.argmax(1)).float()
        measured["source_backing"] = probability.gather(1, said.unsqueeze(1)).squeeze(1)
        measured["source_rank"] = self._rank(measured["source_entropy"])
        measured["gap"] = adapted.softmax(1).amax(1) - probability.amax(1)
        return self._means(measured, stream, counts), counts, logits

    def _frame_signals(self, logits: Tensor, head: Tensor | None) -> State:
        log_p = logits.log_softmax(1)
        highest = log_p.amax(1).exp()
        found = {
            "confidence": highest,
            "entropy": -(log_p.exp() * log_p).sum(1) / math.log(logits.shape[1]),
            "above": (highest >= self.threshold).float(),
        }
        if head is not None and self._dropped is not None and len(head) == len(logits):
            weight, bias = self._dropped
            votes = torch.addmm(bias, head, weight).view(len(logits), MASKS, -1).argmax(2)
            found["dropout"] = (votes != logits.argmax(1, keepdim=True)).float().mean(1)
        else:
            found["dropout"] = torch.zeros_like(highest)
        return found

    def _rank(self, share: Tensor) -> Tensor:
        """Where entropies (as shares of ln K) lie among those of clean frames, from -0.5 to 0.5."""
        known = self._entropies
        if not len(known):
            return torch.zeros_like(share)
        middle = torch.searchsorted(known, share) + torch.searchsorted(known, share, right=True)
        return middle / (2 * len(known)) - 0.5

    def _oddness(self, features: Tensor, logits: Tensor) -> State:
        """How far a frame's features (B, F) lie from those of clean frames of the class it is called."""
        said = logits.argmax(1)
        if self._class_mean is None:
            apart = ((features - self.source.mean) / self.source.scale) ** 2
            off = torch.zeros(len(said))
        else:
            apart = (features - self._class_mean[said]) ** 2 * self._class_weight[said]
            off = (torch.addmm(self._class_bias, features[:, self._last], self._class_way).argmax(1) != said).float()
        apart = apart.clamp(max=100)
        return {"odd": apart.mean(1).log1p(), "odd_last": apart[:, self._last].mean(1).log1p(), "off_prototype": off}

    def _means(self, frames: State, stream: Tensor, counts: Tensor) -> State:
        joined = torch.stack(list(frames.values()), 1).nan_to_num()
        means = per_stream_mean(joined, stream, counts.clamp_min(1))
        return dict(zip(frames, means.unbind(1), strict=True))


def _marginal(forward: Forward, logits: Tensor) -> Tensor:
    """Entropy of the mean prediction, as a share of ln K, (S,): over the method's own window where it keeps one."""
    mix = forward.kept.get("class_mix")
    if mix is None:
        mix = per_stream_mean(logits.softmax(1), forward.stream, forward.counts.clamp_min(1))
    return -(mix * mix.clamp_min(TINY).log()).sum(1) / math.log(logits.shape[1])


def _dropped_heads(model: AdaptableModel) -> tuple[Tensor, Tensor] | None:
    """The last layer under fixed dropout masks, side by side: weight (d, masks x K) and bias."""
    if model.head is None:
        return None
    weight, bias = model.head.weight.detach(), model.head.bias
    random = torch.Generator().manual_seed(0)
    keep = (torch.rand(MASKS, 1, weight.shape[1], generator=random) >= DROPPED).float() / (1 - DROPPED)
    heads = (keep * weight).flatten(0, 1).T.contiguous()
    return heads, torch.zeros(heads.shape[1]) if bias is None else bias.detach().repeat(MASKS)


def _rows(signals: State) -> list[dict[str, float]]:
    values = torch.stack(list(signals.values()), 1).nan_to_num().tolist()
    return [dict(zip(signals, row, strict=True)) for row in values]


def fold(
    before: RunningProxies, seen: Observed, generated: Mapping[str, float], model: AccuracyModel | None
) -> RunningProxies:
    """The running signals after one more micro-batch, and the accuracies that they say.

    `generated` are the signals of the update, empty where there was none. Confidence and entropy stay.
    """
    signals = dict(before.signals)
    frames = before.frames - seen.frames  # The caller has counted them already.
    _move(signals, seen.own, seen.frames, frames)
    _move(signals, seen.shadow, seen.shadowed, before.shadowed)
    sound = {n: math.log1p(max(0.0, v)) for n, v in generated.items() if n in GENERATED and math.isfinite(v)}
    _move(signals, sound, seen.frames, before.generated)
    after = before.model_copy(
        update={
            "signals": signals,
            "shadowed": before.shadowed + seen.shadowed,
            "generated": before.generated + (seen.frames if sound else 0),
        }
    )
    if model is not None:
        after.accuracy, after.source_accuracy = model.accuracies(signals)
        low, high = model.interval(np.array([after.accuracy]))
        after.low, after.high = float(low[0]), float(high[0])
    return after


def as_source(proxies: RunningProxies) -> RunningProxies:
    """What is known of a stream whose parameters have just become source's: what source was seen to do."""
    signals = dict(proxies.signals)
    for name in SHADOW:
        own = name.removeprefix("source_")
        if name.startswith("source_") and own in OWN and name in signals:
            signals[own] = signals[name]
    signals |= {name: 0.0 for name in ("flips", "moved", "gap", "distance", "changed") if name in signals}
    if "source_confidence" in signals:
        signals["source_backing"] = signals["source_confidence"]
    for name in GENERATED:
        signals.pop(name, None)
    few = {"frames": min(proxies.frames, WINDOW // 4), "generated": 0, "accuracy": proxies.source_accuracy}
    return proxies.model_copy(update={"signals": signals, **few, "low": None, "high": None})


def _move(signals: dict[str, float], new: Mapping[str, float], frames: int, seen: int) -> None:
    """A plain mean until the window is full, then an exponential one."""
    if not frames:
        return
    weight = frames / (frames + max(0, min(seen, WINDOW - frames)))
    for name, value in new.items():
        old = signals.get(name, value)
        signals[name] = old + weight * (value - old)
