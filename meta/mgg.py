"""Our method `mgg`: test-time adaptation by the meta gradient generator, for many streams in one pass.

It builds on MGTTA (`meta.paper` is that method as published). docs/science.md measures what each difference brings.
An update of a stream has five parts:

1. The running feature statistics move. They are compared with those of clean source frames of the same class mix.
2. The gradient of entropy plus that discrepancy passes the gradient memory, together with other inputs
   (`meta.inputs`): its size, its agreement between frames, the gap of the coordinate's channel, the distance from the
   source parameters.
3. The anchor maps the gaps of all channels to the point where the affine should rest. The memory's output says how far
   each coordinate follows its gradient from there, and how strongly it is pulled back.
4. The dose, in (0, 1), scales the total distance from the source parameters. It is near 0 while the frames look
   like source data.
5. Predictions pass a filter over the stream's classes (`meta.temporal`). Its output also gives the class mix.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meta.gradient_frames import gradient_frames
from meta.inputs import Inputs
from meta.learned import LearnedOptimizer, LearnedWeights
from meta.method import Forward, Method, State, Update, where_seen
from meta.moments import NormMoments
from meta.norms import AdaptableModel
from meta.objective import Objective, SourceStatistics
from meta.outputs import Known, Output, all_but, concatenated, order_of
from meta.stream_norm import LayerCorrection
from meta.temporal import filter_classes, fresh_belief
from meta.threads import one_thread

TINY = 1e-8
GRADIENT_SHARE = 4  # At a site, every fourth frame gives the gradient.
MOST_FRAMES = 16  # per stream and update: what tracks a shift is the number of updates, not of frames in each


@dataclass(frozen=True)
class _Pass:
    """The result of one pass of the model over n frames.

    `rows` (n, P): each frame's affine, the leaf that the gradient is taken for; None without a graph. `source_output`:
    the source model's output for the frames that it was asked about.
    """

    output: Output
    rows: Tensor | None
    moments: NormMoments | None
    source_output: Output | None = None


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
        """A copy for serving: gradient step, push and anchor are multiplied by `step_scale`, the pull is not.

        Quantities that depend on the learned parameters alone are computed here, once.
        """
        site = copy.copy(self)
        site.step_scale = step_scale
        with torch.no_grad():
            site._weights = self.learned.weights()
        return site

    def with_gradient_share(self, share: int) -> MGG:
        """A copy whose served updates take the gradient from every `share`-th frame; 1: from all frames."""
        method = copy.copy(self)
        method.gradient_share = share
        return method

    # --- state ---------------------------------------------------------------------------------------------------

    def fresh(self, streams: int) -> State:
        """The state of S new streams.

        affine, offset and moments of the gradient (S, P); memory (S, h, h, P) and (S, h, P), in `memory_precision`;
        feature statistics (S, F + F1); class mix and belief (S, K); BatchNorm moments (S, C); age, in updates (S,).
        """
        with torch.no_grad():
            return self._at_rest(self.initial(streams))

    def initial(self, streams: int) -> State:
        """As `fresh`, but in float32 and differentiable in the learned initial memory."""
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
        """Round the memory to the precision of the store, so that a restored state equals the one in memory."""
        precision = getattr(torch, self.settings.memory_precision)
        return {name: t.to(precision) if name.startswith("memory_") else t for name, t in state.items()}

    # --- the interface of meta.method.Method -----------------------------------------------------------------------

    def predict(self, frames: Tensor, stream: Tensor, state: State) -> Forward:
        """Predict all frames with a graph. In inference mode there is none, and `update` refuses the result."""
        counts = torch.bincount(stream, minlength=len(state["affine"])).float()
        passed = self._run(frames, stream, state, None, counts, not torch.is_inference_mode_enabled())
        return self._forward(passed, frames, stream, counts, state)

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
        """Predict as at a site: only the frames that give the gradient run with a graph (`meta.gradient_frames`).

        adapts (S,): which streams will be updated; None: all.
        asked (n,): indices of frames that the source model predicts too; ignored if all frames run with a graph.
        known: outputs from an earlier pass. These frames run again only if they give the gradient.
        keep: return features as for an update, those of the first layer's input included, so that a later pass can
            have the outputs as `known`.

        If BatchNorm layers use the statistics of the pass, all frames run without a graph, and those that give the
        gradient a second time with one: a prediction must not depend on which frames give the gradient.
        """
        subset = gradient_frames(stream, len(state["affine"]), self.gradient_share, adapts)
        counts, chosen = subset.counts, subset.chosen
        if len(chosen) == len(stream):
            return self.predict(frames, stream, state)
        with torch.inference_mode():
            others = [] if known is None else [known.without(chosen)]
            partial = bool(others) or len(chosen) > 0
            rest = None
            if partial and not self.uses_batch_statistics:
                rest = all_but(len(stream), [others[0].places, chosen]) if others else subset.rest
            passed = self._run(frames, stream, state, rest, counts, keep or partial, asked)
        gradient_forward = None
        if len(chosen):
            with torch.inference_mode(False):
                own = self._run(frames, stream, state, chosen, subset.chosen_counts)
            gradient_forward = Forward(
                own.output.logits, own.output.features, own.rows, subset.chosen_stream, subset.chosen_counts, state
            )
            others.append(Known(chosen, own.output))
        with torch.inference_mode():
            if rest is not None:
                parts = [Known(rest, passed.output), *others]
                order = subset.order if known is None else order_of(len(stream), parts)
                passed = replace(passed, output=concatenated([part.output for part in parts]).select(order))
            return self._forward(passed, frames, stream, counts, state, gradient_forward)

    def update(self, forward: Forward) -> Update:
        """One update per stream. After `serve` a part of the frames gives the gradient; the statistics are of all."""
        part, whole = forward, None
        if forward.rows is None:
            if forward.gradient_forward is None:
                raise ValueError("no frame has a graph: what was predicted in inference mode cannot be updated from")
            part, whole = replace(forward.gradient_forward, state=forward.state, kept=forward.kept), forward
        frame_gradient, statistics, signals = self.gradient(part, whole=whole)
        with torch.inference_mode(), one_thread():
            update = self.generate(part, frame_gradient, statistics, signals)
            state = where_seen(forward, self._at_rest(update.state))
        return Update(state, update.signals | {"frames": forward.counts})

    def observe(self, forward: Forward) -> State:
        """The state after frames that were predicted but not adapted on.

        The class filter's belief and the BatchNorm moments move; the affine and the feature statistics stay. The
        latter, because the anchor depends on gaps that it closes itself. In meta-training an update renewed about half
        of the window. If updates found all of it renewed, the gaps would be gone once the anchor had acted, the anchor
        would return to zero, and the affine would oscillate.
        """
        return forward.state | self._carried(forward)

    def _run(
        self,
        frames: Tensor,
        stream: Tensor,
        state: State,
        places: Tensor | None,
        counts: Tensor,
        with_first: bool = True,
        asked: Tensor | None = None,
    ) -> _Pass:
        """Run the model on the frames at `places`, or on all; each stream has `counts` (S,) of them.

        With `with_first` the features (n, F + F1) end with those of the first layer under the source affine, and there
        is a graph outside of inference mode. The frames `asked` (n,) run a second time in the same pass, as frames of
        an additional stream that has the source parameters; this needs inference mode.
        """
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
        if with_first:
            with torch.enable_grad():
                rows.requires_grad_(not torch.is_inference_mode_enabled())
                logits, *pooled = self.model.forward_with_inputs(frames, rows, moments, correction)
                features = torch.cat(pooled, 1)
        else:
            logits, features = self.model.forward_with_features(frames, rows, moments, correction)
        head = self.model.context.head
        if head is not None and len(head) != len(frames):
            head = None  # The last linear layer does not get one row per frame.
        output, source_output = Output(logits, features, head), None
        if len(frames) > count:
            output, source_output = output.rows(0, count), output.rows(count, len(frames))
        return _Pass(output, rows if rows.requires_grad else None, moments, source_output)

    def _and_source(self, state: State) -> State:
        """The entries of the state that the model depends on, with the source's values as an additional last row."""
        model = self.model
        source = {"affine": model.source_affine}
        if model.correction is not None:
            source["correction"] = model.source_affine.new_zeros(())
        elif model.batch_channels:
            source |= {"norm_mean": model.source_mean, "norm_variance": model.source_variance}
        return {name: torch.cat([state[name], row.unsqueeze(0)]) for name, row in source.items()}

    def _kept(self, logits: Tensor, stream: Tensor, counts: Tensor, state: State, moments: NormMoments | None) -> State:
        """What `update` and `observe` need of the pass: `Forward.kept`."""
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
        passed: _Pass,
        frames: Tensor,
        stream: Tensor,
        counts: Tensor,
        state: State,
        gradient_forward: Forward | None = None,
    ) -> Forward:
        output = passed.output
        return Forward(
            logits=output.logits,
            features=output.features,
            rows=passed.rows,
            stream=stream,
            counts=counts,
            state=state,
            frames=frames,
            kept=self._kept(output.logits.detach(), stream, counts, state, passed.moments),
            gradient_forward=gradient_forward,
            source_output=passed.source_output,
            head=output.head,
        )

    def subsampled(self, forward: Forward) -> tuple[Forward, Tensor]:
        """The part of a forward with a graph that gives the gradient in `serve`, and its frames' indices (b,)."""
        subset = gradient_frames(forward.stream, len(forward.counts), self.gradient_share)
        logits, features = (t.index_select(0, subset.chosen) for t in (forward.logits, forward.features))
        part = replace(
            forward, logits=logits, features=features, stream=subset.chosen_stream, counts=subset.chosen_counts
        )
        return part, subset.chosen

    # --- parts -----------------------------------------------------------------------------------------------------

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether BatchNorm layers normalise with statistics of the stream's frames in the pass."""
        return self.model.batch_channels > 0 and self.model.correction is None

    def _moments(self, stream: Tensor, counts: Tensor, state: State) -> NormMoments | None:
        """Running BatchNorm moments over `norm_window` frames, which start at the source's; None if unused."""
        if not self.uses_batch_statistics:
            return None
        share = 1 - (1 - 1 / self.settings.norm_window) ** counts
        return NormMoments(stream, share, state["norm_mean"], state["norm_variance"])

    def _correction(self, stream: Tensor, state: State) -> LayerCorrection | None:
        """The correction of single frames for this pass; its strength is 0 until the stream's first update."""
        if self.model.correction is None:
            return None
        return self.model.correction.under(state["correction"].index_select(0, stream))

    def _carried(self, forward: Forward) -> State:
        """The entries of the next state that prediction alone determines."""
        return {name: tensor for name, tensor in forward.kept.items() if name != "probability"}

    def gradient(
        self, forward: Forward, retain_graph: bool = False, whole: Forward | None = None
    ) -> tuple[Tensor, State, State]:
        """The gradient (B, P) of the sum of the streams' losses with respect to every frame's affine, the moved
        statistics, and the signals. `whole`: see `Objective.__call__`."""
        slopes, statistics, signals = self.objective(forward, whole)
        (frame_gradient,) = torch.autograd.grad(
            [forward.logits, forward.features], [forward.rows], list(slopes), retain_graph=retain_graph
        )
        return frame_gradient, statistics, signals

    def generate(self, forward: Forward, frame_gradient: Tensor, statistics: State, signals: State) -> Update:
        """The next state, in float32, from per-frame gradients (B, P) and the results of `gradient`.

        With the stream's gradient g in units of `gradient_scale`, the learned step size eta, and gate, push and pull
        from the update rule:

            offset <- offset - pull offset - step_scale (step_limit tanh(gate eta g / step_limit) + push_limit push)
            affine <- source + dose (offset + step_scale anchor(gaps))

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
        offset = state["offset"]
        raw_norm = torch.linalg.vector_norm(gradient, dim=1)
        inputs = self._inputs.of(forward.counts, gradient, raw_norm, power, (first, second), age, offset, signals)
        weights = learned.weights() if self._weights is None else self._weights
        gate, push, pull, weight, bias = learned.rule(
            inputs, state["memory_weight"].float(), state["memory_bias"].float(), weights.rule
        )
        step = torch.tanh(gate * gradient * weights.rate)
        change = torch.add(settings.step_limit * step, push, alpha=settings.push_limit)
        pulled = torch.addcmul(offset, pull, offset, value=-1)
        offset = torch.add(pulled, change, alpha=-self.step_scale)
        moved = {
            "offset": offset,
            "first_moment": first,
            "second_moment": second,
            "memory_weight": weight,
            "memory_bias": bias,
            "age": age,
        }
        dose = self._dose(signals, weights.dose_bias)
        if self.model.correction is not None:
            strength = settings.correction_start + settings.correction_slope * dose.detach()
            moved["correction"] = strength.clamp(0, 1)
        displacement = dose.unsqueeze(1) * self._target(offset, signals)
        affine = self.model.source_affine + displacement
        generated = (state["affine"] - affine).detach()
        generated_norm = torch.linalg.vector_norm(generated, dim=1)
        return Update(
            state={"affine": affine, **moved, **statistics, **self._carried(forward)},
            signals={
                **{name: value for name, value in signals.items() if value.dim() == 1},
                "raw_gradient_norm": raw_norm,
                "generated_gradient_norm": generated_norm,
                "cosine": (gradient * generated).sum(1) / (raw_norm * generated_norm).clamp_min(TINY),
                "source_distance": torch.linalg.vector_norm(displacement.detach(), dim=1),
                "dose": dose.detach(),
                "frames": forward.counts,
            },
        )

    def _target(self, offset: Tensor, signals: State) -> Tensor:
        """The proposed displacement (S, P) from the source affine, before the dose: offset plus anchor."""
        if self.learned.anchor is None:
            return offset
        gaps = torch.cat([signals["gap_mean"] / 2, signals["gap_std"]], 1)
        return torch.add(offset, self.learned.anchor(gaps), alpha=self.step_scale)

    def _dose(self, signals: State, bias: Tensor) -> Tensor:
        """The share (S,), in (0, 1), of the proposed distance from the source parameters that is applied."""
        unusual = [
            (signals["novelty"] + TINY).log(),
            (signals["discrepancy"] + TINY).log(),
            signals["entropy"] / math.log(self.classes),
        ]
        return torch.sigmoid(torch.addmv(bias, torch.stack(unusual, 1).clamp(-12, 12), self.learned.dose_weight))


def as_served(method: Method) -> Callable[[Tensor, Tensor, State], Forward]:
    """The function with which a site predicts: `serve` if the method has it, else `predict`."""
    return method.serve if isinstance(method, MGG) else method.predict


def frames_per_update(method: Method, wanted: int) -> int:
    """How many frames of a stream to give a method at a time, out of at most `wanted`."""
    return min(wanted, MOST_FRAMES) if isinstance(method, MGG) else wanted


def _with_first(source: SourceStatistics, model: AdaptableModel) -> SourceStatistics:
    """The statistics of all layers (F), then those of the first layer again (F1): on source data, all layers have the
    source affine, so both are the same."""
    parts = (source.mean, source.std, source.class_mean, source.class_square)
    count = model.layers[0].feature_count
    return SourceStatistics(*[None if t is None else torch.cat([t, t[..., :count]], -1) for t in parts])
