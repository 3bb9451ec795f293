"""Adaptation with the meta gradient generator, ours: from a micro-batch of many streams to their next states.

What differs from the paper (`meta.paper`), and why, is measured in docs/science.md. Per update of a stream:

1. The running feature statistics move, and are compared with those of clean source frames of the same class mix.
2. The gradient of entropy plus that discrepancy goes, with what is known of its size, its agreement between frames,
   the gap of the coordinate's own channel and the distance from source, through the gradient memory.
3. An anchor, from all gaps together, says where the affine should rest; the memory's output says how far each
   coordinate follows its gradient from there, and how strongly it is pulled back.
4. A dose in (0, 1) scales the whole way from source: with nothing unusual in the frames, the source answers.
5. Predictions pass a filter over the stream's classes (`meta.temporal`), whose answers also give the class mix.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meta.division import divided
from meta.inputs import Inputs
from meta.learned import LearnedOptimizer, LearnedWeights
from meta.method import Forward, Method, State, Update, where_seen
from meta.moments import NormMoments
from meta.norms import AdaptableModel
from meta.objective import Objective, SourceStatistics
from meta.outputs import Known, Output, all_but, joined, order_of
from meta.stream_norm import LayerCorrection
from meta.temporal import filter_classes, fresh_belief
from meta.threads import one_thread

TINY = 1e-8
GRADIENT_SHARE = 4  # one of so many frames gives a site's updates their gradient
MOST_FRAMES = 16  # of a stream in one update: a shift is followed update by update, however many frames each has


@dataclass(frozen=True)
class _Ran:
    """What the model put out for some frames; `rows` is their affine where there is a graph; `shadow`, what source says
    of those that it was asked for."""

    output: Output
    rows: Tensor | None
    moments: NormMoments | None
    shadow: Output | None = None


class MGG:
    """The method `mgg`. Its state: affine, offset, moments, gradient memory, running statistics, belief, age."""

    def __init__(
        self, model: AdaptableModel, source: SourceStatistics, learned: LearnedOptimizer, classes: int
    ) -> None:
        self.model, self.source, self.learned = model, source, learned
        self._source_features = _with_first(source, model)
        self.settings = settings = learned.settings
        self.objective = Objective(
            self._source_features,
            model.feature_count,
            settings.entropy_weight,
            settings.discrepancy_weight,
            settings.feature_window,
            settings.class_share,
        )
        self.classes = classes
        self.step_scale, self.gradient_share = 1.0, GRADIENT_SHARE
        self._weights: LearnedWeights | None = None
        decays = self.settings.momentum_decay, self.settings.square_decay
        self._inputs = Inputs(model, self.settings.inputs, decays, classes)

    def for_site(self, step_scale: float) -> MGG:
        """The same method with every change of the affine multiplied, but for the pull. What it has learned by now is
        worked out for all updates to come."""
        site = copy.copy(self)
        site.step_scale = step_scale
        with torch.no_grad():
            site._weights = self.learned.weights()
        return site

    def with_gradient_share(self, share: int) -> MGG:
        """The same method, whose updates take their gradient from one of so many frames as served; 1: from all."""
        sharing = copy.copy(self)
        sharing.gradient_share = share
        return sharing

    # --- state ---------------------------------------------------------------------------------------------------

    def fresh(self, streams: int) -> State:
        """State of new streams, S in the first dimension: affine, offset and moments (S, P), memory (S, h, h, P) and
        (S, h, P), feature statistics (S, F + F1), class mix and belief (S, K), BatchNorm moments (S, C), age (S)."""
        with torch.no_grad():
            return self._at_rest(self.initial(streams))

    def initial(self, streams: int) -> State:
        """As `fresh`, in full precision, and differentiable in the learned initial memory."""
        size, device = self.model.coordinates, self.model.device
        weight, bias = self.learned.rule.memory.fresh(streams, size)
        state = {
            "affine": self.model.source_affine.expand(streams, -1).clone(),
            "offset": torch.zeros(streams, size, device=device),
            "first_moment": torch.zeros(streams, size, device=device),
            "second_moment": torch.zeros(streams, size, device=device),
            "memory_weight": weight.clone(memory_format=torch.contiguous_format),
            "memory_bias": bias.clone(memory_format=torch.contiguous_format),
            "feature_mean": self._source_features.mean.expand(streams, -1).clone(),
            "feature_square": self._source_features.square.expand(streams, -1).clone(),
            "feature_classes": torch.full((streams, self.classes), 1 / self.classes, device=device),
            "age": torch.zeros(streams, device=device),
        }
        if self.settings.class_filter:
            state |= fresh_belief(streams, self.classes, device)
        if self.model.correction is not None:
            state["correction"] = torch.zeros(streams, device=device)
        elif self.model.batch_channels:
            state["norm_mean"] = self.model.source_mean.expand(streams, -1).clone()
            state["norm_variance"] = self.model.source_variance.expand(streams, -1).clone()
        return state

    def _at_rest(self, state: State) -> State:
        """Round the memory to the precision it is kept in. What is stored is so what a worker goes on with."""
        precision = getattr(torch, self.settings.memory_precision)
        return {name: t.to(precision) if name.startswith("memory_") else t for name, t in state.items()}

    # --- the interface of meta.method.Method -----------------------------------------------------------------------

    def predict(self, frames: Tensor, stream: Tensor, state: State) -> Forward:
        """With a graph; in inference mode without one, and then not to be updated from."""
        counts = torch.bincount(stream, minlength=len(state["affine"])).float()
        ran = self._run(frames, stream, state, None, counts, not torch.is_inference_mode_enabled())
        return self._forward(ran, frames, stream, counts, state)

    def serve(
        self,
        frames: Tensor,
        stream: Tensor,
        state: State,
        adapts: Sequence[bool] | None = None,
        asked: Tensor | None = None,
        known: Known | None = None,
        keep: bool = False,
    ) -> Forward:
        """As `predict`, the way sites do it: only those frames have a graph that give an update its gradient.

        `adapts` (S,): which streams will be updated; None: all. Where layers normalise with the statistics of their
        batch, those frames are run twice, for what the others get must not depend on them. `asked` (n,): for which
        frames source answers too, unless all of the pass's have a graph. `known`: frames that are run again only where
        they give a gradient. `keep`: what comes of the pass may be known to a later one; as where an update follows,
        the features have those of the first layer's input.
        """
        division = divided(stream, len(state["affine"]), self.gradient_share, adapts)
        counts, chosen, few = division.counts, division.chosen, division.few
        if len(chosen) == len(stream):
            return self.predict(frames, stream, state)
        with torch.inference_mode():
            parts = [] if known is None else [known.but(chosen)]
            some_elsewhere = bool(parts) or len(chosen) > 0
            rest = None
            if some_elsewhere and not self.mixes:
                rest = all_but(len(stream), [parts[0].places, chosen]) if parts else division.rest
            ran = self._run(frames, stream, state, rest, counts, keep or some_elsewhere, asked)
        giving = None
        if len(chosen):
            with torch.inference_mode(False):
                own = self._run(frames, stream, state, chosen, few)
            giving = Forward(own.output.logits, own.output.features, own.rows, division.stream, few, state)
            parts.append(Known(chosen, own.output))
        with torch.inference_mode():
            if rest is not None:
                parts.insert(0, Known(rest, ran.output))
                order = division.order if known is None else order_of(len(stream), parts)
                ran = replace(ran, output=joined([part.output for part in parts]).at(order))
            return self._forward(ran, frames, stream, counts, state, giving)

    def update(self, forward: Forward) -> Update:
        """One update per stream. Of frames that were served some give the gradient; all count in the statistics."""
        some, whole = forward, None
        if forward.rows is None:
            if forward.giving is None:
                raise ValueError("no frame has a graph: what was predicted in inference mode cannot be updated from")
            some, whole = replace(forward.giving, state=forward.state, kept=forward.kept), forward
        frame_gradient, statistics, signals = self.gradient(some, whole=whole)
        with torch.inference_mode(), one_thread():
            update = self.generate(some, frame_gradient, statistics, signals)
            state = where_seen(forward, self._at_rest(update.state))
        return Update(state, update.signals | {"frames": forward.counts})

    def observe(self, forward: Forward) -> State:
        """The state after frames that were predicted and not adapted on: the belief moves, and with BatchNorm its
        moments; the affine does not, nor do the feature statistics.

        The anchor answers to gaps that it has closed itself. It was trained where about half of the window is new at
        each update; where all of it is, the anchor would be let go as soon as it had worked, and swing.
        """
        return forward.state | self._carried(forward)

    def _run(
        self,
        frames: Tensor,
        stream: Tensor,
        state: State,
        places: Tensor | None,
        counts: Tensor,
        update: bool = True,
        asked: Tensor | None = None,
    ) -> _Ran:
        """The model on the frames at `places`, or on all, of which each stream has `counts` (S,). For an `update` the
        features have those of the first layer under the source affine; with a graph, but for inference mode. There
        the frames `asked` (n,) run once more behind them, as those of one more stream, which stays at source."""
        whole = frames
        if places is not None:
            frames, stream = frames.index_select(0, places), stream.index_select(0, places)
        count = len(frames)
        if asked is not None and len(asked):
            frames = torch.cat([frames, whole.index_select(0, asked)])
            stream = torch.cat([stream, stream.new_full((len(asked),), len(counts))])
            counts, state = torch.cat([counts, counts.new_zeros(1)]), self._and_source(state)
        rows = state["affine"].detach().index_select(0, stream)
        moments, correction = self._moments(stream, counts, state), self._correction(stream, state)
        if update:
            with torch.enable_grad():
                rows.requires_grad_(not torch.is_inference_mode_enabled())
                logits, *pooled = self.model.forward_with_inputs(frames, rows, moments, correction)
                features = torch.cat(pooled, 1)
        else:
            logits, features = self.model.forward_with_features(frames, rows, moments, correction)
        head = self.model.context.head
        if head is not None and len(head) != len(frames):
            head = None  # a layer that sees something else than frames
        output, shadow = Output(logits, features, head), None
        if len(frames) > count:
            output, shadow = output.of(0, count), output.of(count, len(frames))
        return _Ran(output, rows if rows.requires_grad else None, moments, shadow)

    def _and_source(self, state: State) -> State:
        """What of the state makes the model, with a row more that is source's."""
        model = self.model
        source = {"affine": model.source_affine}
        if model.correction is not None:
            source["correction"] = model.source_affine.new_zeros(())
        elif model.batch_channels:
            source |= {"norm_mean": model.source_mean, "norm_variance": model.source_variance}
        return {name: torch.cat([state[name], row.unsqueeze(0)]) for name, row in source.items()}

    def _kept(self, logits: Tensor, stream: Tensor, counts: Tensor, state: State, moments: NormMoments | None) -> State:
        kept: State = {}
        if moments is not None:
            mean, variance = moments.mixed()
            kept["norm_mean"], kept["norm_variance"] = mean[: len(counts)], variance[: len(counts)]
        if self.settings.class_filter:
            kept["probability"], belief = filter_classes(logits, stream, counts, state)
            kept |= belief
        return kept

    def _forward(
        self,
        ran: _Ran,
        frames: Tensor,
        stream: Tensor,
        counts: Tensor,
        state: State,
        giving: Forward | None = None,
    ) -> Forward:
        logits, features, head = ran.output.logits, ran.output.features, ran.output.head
        kept = self._kept(logits.detach(), stream, counts, state, ran.moments)
        return Forward(logits, features, ran.rows, stream, counts, state, frames, kept, giving, ran.shadow, head)

    def thinned(self, forward: Forward) -> tuple[Forward, Tensor]:
        """Those frames of a forward with a graph that give the gradient as served, and their places in it (b,)."""
        division = divided(forward.stream, len(forward.counts), self.gradient_share)
        logits, features = (t.index_select(0, division.chosen) for t in (forward.logits, forward.features))
        some = replace(forward, logits=logits, features=features, stream=division.stream, counts=division.few)
        return some, division.chosen

    # --- parts -----------------------------------------------------------------------------------------------------

    @property
    def mixes(self) -> bool:
        """Whether layers normalise with what a stream's frames in the pass have in common."""
        return self.model.batch_channels > 0 and self.model.correction is None

    def _moments(self, stream: Tensor, counts: Tensor, state: State) -> NormMoments | None:
        """BatchNorm layers normalise with a running mean over the window, which starts at the source's."""
        if not self.mixes:
            return None
        share = 1 - (1 - 1 / self.settings.norm_window) ** counts
        return NormMoments(stream, share, state["norm_mean"], state["norm_variance"])

    def _correction(self, stream: Tensor, state: State) -> LayerCorrection | None:
        """What single frames say of their shift corrects them, once there has been an update."""
        if self.model.correction is None:
            return None
        return self.model.correction.under(state["correction"].index_select(0, stream))

    def _carried(self, forward: Forward) -> State:
        return {name: tensor for name, tensor in forward.kept.items() if name != "probability"}

    def gradient(
        self, forward: Forward, retain_graph: bool = False, whole: Forward | None = None
    ) -> tuple[Tensor, State, State]:
        """The gradient of the sum of the streams' losses with respect to every frame's affine (B, P), the moved
        statistics, and the signals. `whole`: see `Objective`."""
        slopes, statistics, signals = self.objective(forward, whole)
        (frame_gradient,) = torch.autograd.grad(
            [forward.logits, forward.features], [forward.rows], list(slopes), retain_graph=retain_graph
        )
        return frame_gradient, statistics, signals

    def generate(self, forward: Forward, frame_gradient: Tensor, statistics: State, signals: State) -> Update:
        """From per-frame gradients (B, P) to the next state, in full precision.

        Differentiable in the learned parameters and the state.
        """
        state, settings, learned = forward.state, self.settings, self.learned
        frame_gradient = frame_gradient / learned.gradient_scale
        zeros = frame_gradient.new_zeros(state["affine"].shape)
        gradient = zeros.index_add(0, forward.stream, frame_gradient)
        power = zeros.index_add(0, forward.stream, frame_gradient**2)
        age = state["age"] + 1
        first = torch.lerp(gradient, state["first_moment"], settings.momentum_decay)
        second = torch.lerp(gradient**2, state["second_moment"], settings.square_decay)
        source = self.model.source_affine
        offset = state["offset"]
        raw_norm = torch.linalg.vector_norm(gradient, dim=1)
        inputs = self._inputs.of(forward.counts, gradient, raw_norm, power, (first, second), age, offset, signals)
        weights = learned.weights() if self._weights is None else self._weights
        gate, push, pull, weight, bias = learned.rule(
            inputs, state["memory_weight"].float(), state["memory_bias"].float(), weights.rule
        )
        step = torch.tanh(gate * gradient * weights.rate)
        change = torch.add(settings.step_limit * step, push, alpha=settings.push_limit)
        held = torch.addcmul(offset, pull, offset, value=-1)
        moved = {
            "offset": torch.add(held, change, alpha=-self.step_scale),
            "first_moment": first,
            "second_moment": second,
            "memory_weight": weight,
            "memory_bias": bias,
            "age": age,
        }
        wanted = moved["offset"]
        if learned.anchor is not None:
            gaps = torch.cat([signals["gap_mean"] / 2, signals["gap_std"]], 1)
            wanted = torch.add(wanted, learned.anchor(gaps), alpha=self.step_scale)
        dose = self._dose(signals, weights.dose_bias)
        if self.model.correction is not None:
            strength = settings.correction_start + settings.correction_slope * dose.detach()
            moved["correction"] = strength.clamp(0, 1)
        away = dose.unsqueeze(1) * wanted
        affine = source + away
        generated = (state["affine"] - affine).detach()
        generated_norm = torch.linalg.vector_norm(generated, dim=1)
        return Update(
            state={"affine": affine, **moved, **statistics, **self._carried(forward)},
            signals={
                **{name: value for name, value in signals.items() if value.dim() == 1},
                "raw_gradient_norm": raw_norm,
                "generated_gradient_norm": generated_norm,
                "cosine": (gradient * generated).sum(1) / (raw_norm * generated_norm).clamp_min(TINY),
                "source_distance": torch.linalg.vector_norm(away.detach(), dim=1),
                "dose": dose.detach(),
                "frames": forward.counts,
            },
        )

    def _dose(self, signals: State, bias: Tensor) -> Tensor:
        """How much of the way from source is gone, (S,)."""
        unusual = [
            (signals["novelty"] + TINY).log(),
            (signals["discrepancy"] + TINY).log(),
            signals["entropy"] / math.log(self.classes),
        ]
        return torch.sigmoid(torch.addmv(bias, torch.stack(unusual, 1).clamp(-12, 12), self.learned.dose_weight))


def as_served(method: Method) -> Callable[[Tensor, Tensor, State], Forward]:
    """How a site predicts with a method."""
    return method.serve if isinstance(method, MGG) else method.predict


def frames_an_update(method: Method, wanted: int) -> int:
    """How many frames of a stream a method had best take at a time, where it may have `wanted`."""
    return min(wanted, MOST_FRAMES) if isinstance(method, MGG) else wanted


def _with_first(source: SourceStatistics, model: AdaptableModel) -> SourceStatistics:
    """The statistics of all layers, and again those of the first: on source data it has the source affine anyway."""
    parts = (source.mean, source.std, source.class_mean, source.class_square)
    count = model.layers[0].feature_count
    return SourceStatistics(*[None if t is None else torch.cat([t, t[..., :count]], -1) for t in parts])
