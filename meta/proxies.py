"""Signals of a stream's accuracy without labels, per micro-batch and as running means over recent frames.

Every signal is a mean over frames, so that means can be averaged further. Those in `OWN` are of the adapted model and
its parameters, those in `SHADOW` of the source model on a sample of the same frames. Sources: mean
confidence (Hendrycks and Gimpel, ICLR 2017); the share above a threshold (ATC, Garg et al., ICLR 2022); disagreement
under dropout before the last layer (after AETTA, Lee et al., CVPR 2024, which drops in every block); disagreement with
the source model (after ASR's flip rate); discrepancy of features and the generator's own signals (ours).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meta.estimator import AccuracyModel
from meta.method import CPU, Forward, State, on_cpu
from meta.norms import AdaptableModel
from meta.objective import SourceStatistics, per_stream_mean
from meta.outputs import Output
from meta.threads import one_thread
from schemas.state import RunningProxies

# For arrays of few frames and classes a NumPy call takes a fraction of the time of a torch call.
Numbers = np.ndarray[Any, np.dtype[Any]]
Signals = dict[str, Numbers]

OWN = (
    *("confidence", "answer_confidence", "entropy", "above", "energy", "dropout", "marginal", "changed", "stay"),
    *("discrepancy", "discrepancy_middle", "discrepancy_last", "distance", "odd", "odd_last", "off_prototype"),
)
GENERATED = ("novelty", "dose")  # signals of an update, of methods that have them
SHADOW = (
    *("source_confidence", "source_entropy", "source_above", "source_energy", "source_dropout", "source_rank"),
    *("flips", "moved", "source_backing", "gap", "source_odd", "source_odd_last", "source_off_prototype"),
)
SIGNALS = OWN + GENERATED + SHADOW
WINDOW = 128  # frames of the running means, which are exponential once a stream has had as many
SHADOW_SPAN = 256  # frames; the time constant with which older signals of the source model lose weight
DROPPED, MASKS = 0.4, 4  # dropout probability and number of masks
TINY = 1e-12


@dataclass(frozen=True)
class Observed:
    """The signals of one stream's micro-batch.

    own: means over its `frames`; shadow: means over the `shadowed` frames that the source model predicted too; source:
    the source model's class for each of these.
    """

    frames: int
    own: dict[str, float]
    shadowed: int
    shadow: dict[str, float]
    source: tuple[int, ...] = ()

    @property
    def rank(self) -> float | None:
        """The source model's mean entropy as a rank (`rank_among`), for the guard's bet; None without such frames."""
        return self.shadow["source_rank"] if self.shadowed else None

    @property
    def flipped(self) -> int | None:
        """For how many shadowed frames the answer differs from the source model's class."""
        return round(self.shadow["flips"] * self.shadowed) if self.shadowed else None


class Observer:
    """Computes the signals of a model's passes.

    threshold: ATC's, for the highest class probability
    entropies: quantiles of the source model's entropy on clean frames, in units of ln K
    """

    def __init__(
        self, model: AdaptableModel, source: SourceStatistics, threshold: float, entropies: Sequence[float] = ()
    ) -> None:
        source = source.to(CPU)
        self.model, self.source, self.threshold = model, source, threshold
        self._entropies = torch.tensor(list(entropies))
        self._dropped = _dropped_heads(model)
        ends = np.cumsum([layer.feature_count for layer in model.layers])
        self._last = slice(int(ends[-1]) - model.layers[-1].feature_count, int(ends[-1]))
        middle = len(ends) // 2
        self._middle = slice(int(ends[middle]) - model.layers[middle].feature_count, int(ends[middle]))
        self._mean, self._scale = source.mean.numpy(), source.scale.numpy()
        self._class_mean = None if source.class_mean is None else source.class_mean.numpy()
        if source.class_mean is not None and source.class_square is not None:
            spread = source.class_square - source.class_mean**2
            self._class_weight = (1 / spread.clamp_min(1e-4 * source.scale**2)).numpy()
            # The nearest class mean m in the last layer, in standardised features, has the largest x m - |m|^2 / 2.
            means = source.class_mean[:, self._last] / source.scale[self._last]
            self._prototypes = (means / source.scale[self._last]).T.contiguous()
            self._prototype_bias = -(means**2).sum(1) / 2

    @torch.no_grad()
    def observe(self, frames: Tensor, forward: Forward, chosen: Tensor) -> tuple[list[Observed], Tensor | None]:
        """The signals of each stream in a pass, and the source model's logits (n, K) for the frames `chosen` (n,).

        The source model runs now unless the pass has its output already. Without chosen frames the logits are None.
        """
        with _one_thread_without_warnings():
            passed = _on_cpu(_pass_tensors(forward, chosen, self.model.source_affine), forward.head)
            seen = self._frame_signals(passed)
            own = _rows(self._own(passed, seen))
        counts = passed["counts"].long().tolist()
        if not len(chosen):
            return [Observed(count, mine, 0, {}) for count, mine in zip(counts, own, strict=True)], None
        asked = forward.source_output or self._ask(frames.index_select(0, chosen))
        with _one_thread_without_warnings():
            source = self._frame_signals(_on_cpu({"logits": asked.logits, "features": asked.features}, asked.head))
            stream = passed["stream"].index_select(0, passed["chosen"])
            signals, shadowed = self._shadow(source, stream, passed, seen)
        said = said_to(stream, source.said.tolist(), len(counts))
        each = zip(counts, own, shadowed.long().tolist(), _rows(signals), said, strict=True)
        return [Observed(*one) for one in each], asked.logits

    def _ask(self, frames: Tensor) -> Output:
        return Output(*self.model.forward_with_features(frames), self.model.context.head)

    def _own(self, passed: State, seen: _FrameSignals) -> Signals:
        """The signals (S,) of OWN, from the tensors of `_pass_tensors`."""
        answer = seen.probability if (kept := passed.get("probability")) is None else kept.numpy()
        counts, stream = passed["counts"].clamp_min(1), passed["stream"]
        each = seen.signals | {"answer_confidence": answer.max(1), "changed": answer.argmax(1) != seen.said}
        means, features = _means(each, stream, counts, seen.features)
        if (mix := passed.get("class_mix")) is None:
            mix = per_stream_mean(torch.from_numpy(seen.probability), stream, counts)
        mixed, stay = mix.numpy(), passed.get("class_stay")
        gap = (features - self._mean) / self._scale
        gap *= gap
        return means | {
            # Entropy of the mean prediction, over the window of the class filter if there is one.
            "marginal": -(mixed * np.log(np.maximum(mixed, TINY))).sum(1) / math.log(mixed.shape[1]),
            "stay": np.zeros(len(mixed), np.float32) if stay is None else stay.numpy(),
            "discrepancy": np.log1p(gap.mean(1)),
            "discrepancy_middle": np.log1p(gap[:, self._middle].mean(1)),
            "discrepancy_last": np.log1p(gap[:, self._last].mean(1)),
            "distance": passed["distance"].log1p().numpy(),
        }

    def _shadow(
        self, source: _FrameSignals, stream: Tensor, passed: State, seen: _FrameSignals
    ) -> tuple[Signals, Tensor]:
        """The signals (S,) of SHADOW, from the source model's output for the chosen frames of `stream` (n,).

        They are 0 for a stream without chosen frames. Also the number of chosen frames of each stream (S,).
        """
        counts = torch.bincount(stream, minlength=len(passed["counts"])).float()
        places = passed["chosen"].numpy()
        kept = passed.get("probability")
        said = seen.said[places] if kept is None else kept.numpy()[places].argmax(1)
        each = {f"source_{name}": values for name, values in source.signals.items()}
        each["flips"] = said != source.said
        each["moved"] = seen.said[places] != source.said
        each["source_backing"] = source.probability[np.arange(len(said)), said]
        each["source_rank"] = rank_among(self._entropies, torch.from_numpy(source.signals["entropy"])).numpy()
        each["gap"] = seen.signals["confidence"][places] - source.signals["confidence"]
        return _means(each, stream, counts.clamp_min(1))[0], counts

    def _frame_signals(self, outputs: State) -> _FrameSignals:
        """Per-frame signals from logits (B, K), pooled features (B, F or more) and the last layer's input (B, d)."""
        logits, features = outputs["logits"].numpy(), outputs["features"].numpy()[:, : len(self._mean)]
        largest = logits.max(1, keepdims=True)
        shifted = logits - largest
        probability = np.exp(shifted)
        total = probability.sum(1, keepdims=True)
        probability /= total
        said, confidence = logits.argmax(1), 1 / total[:, 0]
        log_total = np.log(total[:, 0])
        entropy = log_total - (probability * shifted).sum(1)
        signals = {
            "confidence": confidence,
            "entropy": entropy / np.float32(math.log(logits.shape[1])),
            "above": confidence >= self.threshold,
            "energy": log_total + largest[:, 0],
            "dropout": self._dropout(outputs.get("head"), said),
        }
        return _FrameSignals(features, probability, said, signals | self._feature_distance(features, said))

    def _dropout(self, head: Tensor | None, said: Numbers) -> Numbers:
        """The share (B,) of dropout masks before the last layer under which the class differs from `said` (B,)."""
        if head is None or self._dropped is None or len(head) != len(said):
            return np.zeros(len(said), np.float32)
        weight, bias = self._dropped
        votes = torch.addmm(bias, head, weight).view(len(said), MASKS, -1).argmax(2).numpy()
        differ: Numbers = np.add.reduce(votes != said[:, None], 1, np.float32)
        return differ / MASKS

    def _feature_distance(self, features: Numbers, said: Numbers) -> Signals:
        """Distance of features (B, F) from those of clean frames of the predicted class (B,)."""
        if self._class_mean is None:
            apart = (features - self._mean) / self._scale
            apart *= apart
            off = np.zeros(len(said), bool)
        else:
            apart = features - self._class_mean[said]
            apart *= apart
            apart *= self._class_weight[said]
            last = torch.from_numpy(features[:, self._last])
            off = torch.addmm(self._prototype_bias, last, self._prototypes).argmax(1).numpy() != said
        np.minimum(apart, 100, out=apart)
        total, last_total = np.add.reduce(apart, 1), np.add.reduce(apart[:, self._last], 1)
        odd, odd_last = np.log1p(total / apart.shape[1]), np.log1p(last_total / (self._last.stop - self._last.start))
        return {"odd": odd, "odd_last": odd_last, "off_prototype": off}


@dataclass(frozen=True)
class _FrameSignals:
    """For each frame: features (B, F), class probabilities (B, K), predicted class `said` (B,), and signals (B,)."""

    features: Numbers
    probability: Numbers
    said: Numbers
    signals: Signals


@contextmanager
def _one_thread_without_warnings() -> Iterator[None]:
    """Small arrays need one thread. Parameters that are not finite show in the signals; NumPy need not warn."""
    with np.errstate(invalid="ignore", over="ignore"), one_thread():
        yield


def said_to(stream: Tensor, classes: Sequence[int], streams: int) -> list[tuple[int, ...]]:
    """The classes (n,) of frames of `stream` (n,), grouped by stream."""
    said: list[list[int]] = [[] for _ in range(streams)]
    for row, index in zip(stream.tolist(), classes, strict=True):
        said[row].append(index)
    return [tuple(indices) for indices in said]


def rank_among(known: Tensor, share: Tensor) -> Tensor:
    """The rank of entropies, in units of ln K, among the quantiles `known` of clean frames: -0.5 to 0.5."""
    if not len(known):
        return torch.zeros_like(share)
    middle = torch.searchsorted(known, share) + torch.searchsorted(known, share, right=True)
    return middle / (2 * len(known)) - 0.5


def _on_cpu(shown: State, head: Tensor | None) -> State:
    """The tensors and the last layer's input on the CPU."""
    return on_cpu(shown if head is None else shown | {"head": head})


def _pass_tensors(forward: Forward, chosen: Tensor, source_affine: Tensor) -> State:
    """The tensors that signals are computed from, without a graph."""
    kept = {name: forward.kept[name] for name in ("probability", "class_mix", "class_stay") if name in forward.kept}
    return kept | {
        "logits": forward.logits.detach(),
        "features": forward.features.detach(),
        "stream": forward.stream,
        "counts": forward.counts,
        "chosen": chosen,
        "distance": (forward.state["affine"] - source_affine).norm(dim=1),
    }


def _means(frames: Signals, stream: Tensor, counts: Tensor, features: Numbers | None = None) -> tuple[Signals, Numbers]:
    """Means of signals (B,) and of features (B, F) over each stream's frames: (S,) and (S, F)."""
    count = len(frames)
    joined = np.empty((len(stream), count + (0 if features is None else features.shape[1])), np.float32)
    for place, values in enumerate(frames.values()):
        joined[:, place] = values
    joined[:, count:] = 0 if features is None else features
    if not math.isfinite(np.add.reduce(joined, None)):
        np.nan_to_num(joined, copy=False)
    means = per_stream_mean(torch.from_numpy(joined), stream, counts).numpy()
    return dict(zip(frames, means.T, strict=False)), means[:, count:]


def _dropped_heads(model: AdaptableModel) -> tuple[Tensor, Tensor] | None:
    """The last layer under each of the fixed dropout masks, concatenated: weight (d, MASKS x K) and bias."""
    if model.head is None:
        return None
    weight, bias = model.head.weight.detach().cpu(), model.head.bias
    random = torch.Generator().manual_seed(0)
    keep = (torch.rand(MASKS, 1, weight.shape[1], generator=random) >= DROPPED).float() / (1 - DROPPED)
    heads = (keep * weight).flatten(0, 1).T.contiguous()
    return heads, torch.zeros(heads.shape[1]) if bias is None else bias.detach().cpu().repeat(MASKS)


def _rows(signals: Signals) -> list[dict[str, float]]:
    table = np.stack(list(signals.values()), 1)
    table[~np.isfinite(table)] = 0
    return [dict(zip(signals, row, strict=True)) for row in table.tolist()]


def fold(
    before: RunningProxies, seen: Observed, generated: Mapping[str, float], model: AccuracyModel | None
) -> RunningProxies:
    """The running signals after one more micro-batch, and the accuracies estimated from them.

    `generated`: the signals of the update; empty without one. The fields confidence and entropy are left alone.
    """
    return before.model_copy(update=folded(before, seen, generated, model))


def folded(
    before: RunningProxies, seen: Observed, generated: Mapping[str, float], model: AccuracyModel | None
) -> dict[str, Any]:
    """The fields that `fold` changes."""
    signals = dict(before.signals)
    _move(signals, seen.own, seen.frames, before.frames)
    frames = before.frames + seen.frames
    apart = frames - before.shadowed_at if before.shadowed_at is not None else 0
    _move(signals, seen.shadow, seen.shadowed, before.shadowed, 1 - math.exp(-max(0, apart) / SHADOW_SPAN))
    sound = {n: math.log1p(max(0.0, v)) for n, v in generated.items() if n in GENERATED and math.isfinite(v)}
    _move(signals, sound, seen.frames, before.generated)
    after: dict[str, Any] = {
        "frames": frames,
        "signals": signals,
        "shadowed": before.shadowed + seen.shadowed,
        "shadowed_at": frames if seen.shadowed else before.shadowed_at,
        "generated": before.generated + (seen.frames if sound else 0),
    }
    if model is not None:
        after["accuracy"], after["source_accuracy"] = model.predict_one(signals)
        after["low"], after["high"] = model.interval_of_one(after["accuracy"])
    return after


def as_source(proxies: RunningProxies) -> RunningProxies:
    """The proxies of a stream whose parameters were just reset to the source's: the source model's signals."""
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
    unknown = dict.fromkeys(("shadowed_at", "low", "high"))
    return proxies.model_copy(update={"signals": signals, **few, **unknown})


def _move(signals: dict[str, float], new: Mapping[str, float], frames: int, seen: int, least: float = 0.0) -> None:
    """Update running means: plain until the window is full, then exponential, with a weight of at least `least`."""
    if not frames:
        return
    weight = max(least, frames / (frames + max(0, min(seen, WINDOW - frames))))
    for name, value in new.items():
        old = signals.get(name, value)
        signals[name] = old + weight * (value - old)
