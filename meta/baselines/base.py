"""The base class of the baselines, their optimizers, and functions that several of them need.

Every baseline is a `meta.method.Method`: S streams in one pass, a row of the state for each, and results that do not
depend on which streams share the pass. All adapt the norm affine only; the docstring says so where a paper adapts more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from meta.method import Forward, State, Update, where_seen
from meta.moments import NormMoments
from meta.norms import AdaptableModel
from meta.objective import SourceStatistics, entropy, per_stream_mean, per_stream_sum
from schemas.errors import BundleError

Statistics = Literal["source", "batch", "prior", "running"]
Options = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """What a method is built from.

    mean, std (ch,): of the frames' standardisation
    source_frames (N, ch, h, w): standardised clean frames, for methods that use source data; None: they do without
    frame_shape (ch, h, w): for methods that store frames or run the model to examine it
    """

    model: AdaptableModel
    source: SourceStatistics
    classes: int
    mean: Tensor
    std: Tensor
    source_frames: Tensor | None = None
    frame_shape: tuple[int, ...] = ()


class Sgd:
    """Stochastic gradient descent with heavy-ball momentum, as torch.optim.SGD has it, per stream."""

    def __init__(self, momentum: float = 0.9) -> None:
        self.momentum = momentum

    def fresh(self, streams: int, size: int, device: torch.device | None = None) -> State:
        return {"velocity": torch.zeros(streams, size, device=device)}

    def direction(self, state: State, gradient: Tensor) -> tuple[Tensor, State]:
        """What to subtract, before the step size, and the optimizer's new state."""
        velocity = self.momentum * state["velocity"] + gradient
        return velocity, {"velocity": velocity}


class Adam:
    """Adam (Kingma and Ba, ICLR 2015), per stream."""

    first, second, epsilon = 0.9, 0.999, 1e-8

    def fresh(self, streams: int, size: int, device: torch.device | None = None) -> State:
        return {
            "first_moment": torch.zeros(streams, size, device=device),
            "second_moment": torch.zeros(streams, size, device=device),
            "steps": torch.zeros(streams, device=device),
        }

    def direction(self, state: State, gradient: Tensor) -> tuple[Tensor, State]:
        """What to subtract, before the step size, and the optimizer's new state."""
        first = torch.lerp(gradient, state["first_moment"], self.first)
        second = torch.lerp(gradient**2, state["second_moment"], self.second)
        steps = state["steps"] + 1
        corrected_first = first / (1 - self.first**steps).unsqueeze(1)
        corrected_second = second / (1 - self.second**steps).unsqueeze(1)
        direction = corrected_first / (corrected_second.sqrt() + self.epsilon)
        return direction, {"first_moment": first, "second_moment": second, "steps": steps}


class Baseline:
    """A method that takes one gradient step per micro-batch. Subclasses define the loss, and override more if needed.

    `statistics` are those with which BatchNorm layers normalise (see `NormMoments`):

    - source: the running statistics of training
    - batch: those of the stream's frames in the pass
    - prior: a mean of both, in which the source counts as `amount` frames
    - running: an exponential mean over about `amount` frames that starts at the source's
    """

    name: ClassVar[str]
    published: ClassVar[Options] = {}
    steps: ClassVar[tuple[float, ...]] = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)

    def __init__(
        self,
        setup: Setup,
        step_size: float = 1e-3,
        statistics: Statistics = "batch",
        amount: float = 64.0,
        optimizer: Sgd | Adam | None = None,
    ) -> None:
        if not step_size >= 0:
            raise ValueError(f"step_size {step_size} is below 0, and would climb; give 0 or more")
        if statistics not in get_args(Statistics):
            raise ValueError(f"statistics {statistics!r} is none of {', '.join(get_args(Statistics))}")
        self.setup, self.model, self.classes = setup, setup.model, setup.classes
        self.device = setup.model.device
        self.step_size, self.statistics, self.amount = step_size, statistics, amount
        self.optimizer = optimizer or Adam()

    @classmethod
    def grid(cls, batch_norm: bool) -> list[Options]:
        """The options that `tuned` chooses from on the tuning shifts: step sizes, and BatchNorm statistics."""
        steps: list[Options] = [{"step_size": size} for size in cls.steps]
        if not batch_norm:
            return steps
        return steps + [{**step, "statistics": "running", "amount": 64.0} for step in steps]

    def for_site(self, step_scale: float) -> Baseline:
        """The same method with its step size multiplied."""
        site = copy.copy(self)
        site.step_size = self.step_size * step_scale
        return site

    # --- the interface of meta.method.Method ---

    def fresh(self, streams: int) -> State:
        """The source affine, the optimizer's initial state, and `memory`."""
        state = {"affine": self.model.source_affine.expand(streams, -1).clone()}
        if self.statistics == "running" and self.model.batch_channels:
            state["norm_mean"] = self.model.source_mean.expand(streams, -1).clone()
            state["norm_variance"] = self.model.source_variance.expand(streams, -1).clone()
        return state | self.optimizer.fresh(streams, self.model.coordinates, self.device) | self.memory(streams)

    def predict(self, frames: Tensor, stream: Tensor, state: State) -> Forward:
        rows = state["affine"].detach().index_select(0, stream).requires_grad_()
        moments = self.moments(stream, state)
        with torch.enable_grad():
            logits = self.model(frames, rows, moments)
        return self.forward_of(frames, rows, stream, state, logits, moments)

    def update(self, forward: Forward) -> Update:
        with torch.enable_grad():
            loss, active, memory = self.loss(forward)
        return self.descend(forward, loss, active, memory)

    def observe(self, forward: Forward) -> State:
        """Running BatchNorm statistics move with every predicted frame; nothing else does."""
        return forward.state | next_moments(forward)

    # --- what subclasses change ---

    def memory(self, streams: int) -> State:
        """Further entries of the state of new streams."""
        return {}

    def loss(self, forward: Forward) -> tuple[Tensor, Tensor, State]:
        """The loss of each stream (S,), whether it takes a step (S,) bool, and the next values of `memory`."""
        raise NotImplementedError

    # --- parts ---

    def moments(self, stream: Tensor, state: State) -> NormMoments | None:
        """The BatchNorm statistics of a pass; None: the running statistics of training."""
        streams = len(state["affine"])
        if self.statistics == "source" or not self.model.batch_channels:
            return None
        counts = torch.bincount(stream, minlength=streams).float()
        if self.statistics == "batch":
            share = torch.ones(streams, device=self.device)
        elif self.statistics == "prior":
            share = counts / (counts + self.amount)
        else:
            share = 1 - (1 - 1 / self.amount) ** counts
            return NormMoments(stream, share, state["norm_mean"], state["norm_variance"])
        given = self.model.source_mean, self.model.source_variance
        return NormMoments(stream, share, *[tensor.expand(streams, -1) for tensor in given])

    def forward_of(
        self,
        frames: Tensor,
        rows: Tensor | None,
        stream: Tensor,
        state: State,
        logits: Tensor,
        moments: NormMoments | None,
        **kept: Tensor,
    ) -> Forward:
        counts = torch.bincount(stream, minlength=len(state["affine"])).float()
        if self.statistics == "running" and moments is not None:
            kept["norm_mean"], kept["norm_variance"] = moments.mixed()
        return Forward(logits, logits.new_zeros(len(logits), 0), rows, stream, counts, state, frames, kept)

    def descend(self, forward: Forward, loss: Tensor, active: Tensor, memory: State) -> Update:
        """One optimizer step for the `active` streams (S,); `memory` changes for all streams with frames."""
        (frame_gradient,) = torch.autograd.grad(loss.sum(), [forward.rows])
        gradient = per_stream_sum(frame_gradient, forward.stream, len(forward.counts))
        return self.step(forward, loss.detach(), gradient, active, memory)

    def step(self, forward: Forward, loss: Tensor, gradient: Tensor, active: Tensor, memory: State) -> Update:
        """The next state from the gradient (S, P)."""
        state = forward.state
        direction, optimizer_state = self.optimizer.direction(state, gradient)
        moved = {"affine": state["affine"] - self.size(state) * direction, **optimizer_state}
        new = state | choose(active, moved, state) | next_moments(forward) | where_seen(forward, memory)
        return Update(new, self.signals(forward, loss, gradient, direction, new))

    def signals(self, forward: Forward, loss: Tensor, gradient: Tensor, direction: Tensor, new: State) -> State:
        """The signals (S,) for guard, metrics and audit; `direction` (S, P) is the step before its size."""
        counts = forward.counts.clamp_min(1)
        return {
            "loss": loss,
            "entropy": per_stream_mean(entropy(forward.logits.detach()), forward.stream, counts),
            "raw_gradient_norm": gradient.norm(dim=1),
            "generated_gradient_norm": direction.norm(dim=1),
            "cosine": torch.cosine_similarity(gradient, direction, dim=1),
            "source_distance": (new["affine"] - self.model.source_affine).norm(dim=1),
            "frames": forward.counts,
        }

    def size(self, state: State) -> float | Tensor:
        """The step size: from the state, (S, 1), if tuning gives each stream its own; else that of the method."""
        return state["step_size"].unsqueeze(1) if "step_size" in state else self.step_size

    def unmoved(self, forward: Forward, memory: State) -> Update:
        """The update of a method without gradients: `memory` changes, the affine does not."""
        still = torch.zeros_like(forward.state["affine"])
        new = forward.state | next_moments(forward) | memory
        return Update(new, self.signals(forward, still.new_zeros(len(still)), still, still, new))

    def logits_under(self, frames: Tensor, stream: Tensor, affine: Tensor, state: State) -> Tensor:
        """Logits of frames under an affine (S, P); they have a graph if `affine` requires a gradient."""
        return self.model(frames, affine.index_select(0, stream), self.moments(stream, state))


class NoOptimizer(Sgd):
    """For methods that take no gradient steps."""

    def fresh(self, streams: int, size: int, device: torch.device | None = None) -> State:
        return {}


def next_moments(forward: Forward) -> State:
    """BatchNorm's running moments after the pass; empty unless the method's statistics are `running`."""
    return {name: forward.kept[name] for name in ("norm_mean", "norm_variance") if name in forward.kept}


def choose(mask: Tensor, yes: State, no: State) -> State:
    """Rows of `yes` where mask (S,) is true, of `no` elsewhere."""
    return {name: torch.where(mask.view(-1, *[1] * (t.dim() - 1)), t, no[name]) for name, t in yes.items()}


def weighted_mean(
    values: Tensor, weights: Tensor, chosen: Tensor, stream: Tensor, streams: int
) -> tuple[Tensor, Tensor]:
    """Mean (S,) of weights * values over each stream's chosen frames, 0 without any; and their number (S,)."""
    kept = torch.where(chosen, values * weights, torch.zeros_like(values))
    total = per_stream_sum(kept, stream, streams)
    count = per_stream_sum(chosen.to(values.dtype), stream, streams)
    return total / count.clamp_min(1), count


def position_in_stream(stream: Tensor) -> Tensor:
    """(B,) int64: 0 for a stream's first frame of the pass, 1 for its second, and so on."""
    order = torch.argsort(stream, stable=True)
    ordered = stream[order]
    starts = torch.searchsorted(ordered, ordered)
    place = torch.empty_like(stream)
    place[order] = torch.arange(len(stream), device=stream.device) - starts
    return place


def longest_stream(place: Tensor) -> int:
    """The most frames that a stream has in the pass, from `position_in_stream`."""
    return int(place.max()) + 1 if len(place) else 0


def next_age(state: State) -> Tensor:
    """The age (S,) after one more update. It returns to 0 at 2^24, beyond which float32 does not count: random numbers
    that depend on the age would repeat."""
    return (state["age"] + 1) % 2**24


def frame_keys(state: State, stream: Tensor) -> Tensor:
    """A key (B,) int64 for `uniforms` for each frame of a pass, from its stream's `age` and its place in the stream."""
    return state["age"].long().index_select(0, stream) * 65_536 + position_in_stream(stream)


def uniforms(keys: Tensor, slots: int) -> Tensor:
    """Pseudo-random numbers (N, slots) in [0, 1) that depend on each key (N,) int64 alone.

    A generator's numbers would depend on which streams share the pass. SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)
    of key * slots + slot.
    """
    x = (keys.unsqueeze(1) * slots + torch.arange(slots, device=keys.device) + 1) * -0x61C8864680B583EB
    x = (x ^ _logical_shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _logical_shift(x, 27)) * -0x6B2FB644ECCEEE15
    return _logical_shift(x ^ _logical_shift(x, 31), 40).float() / (1 << 24)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def classifier(setup: Setup) -> nn.Linear:
    """The linear layer whose output is the model's logits, for methods that work on its input.

    The model runs on two frames to find it, as a second head may also have an output per class. Raises BundleError if
    there is no such layer.
    """
    linear = [module for module in setup.model.network.modules() if isinstance(module, nn.Linear)]
    layers = [module for module in linear if module.out_features == setup.classes]
    if not layers:
        raise BundleError(
            "this method works on the input of a linear classifier, and the model has no linear layer with an output "
            "for each class"
        )
    if not setup.frame_shape:
        raise ValueError("this method tries the model; give the frames' shape (ch, h, w) as frame_shape of the Setup")
    said: dict[nn.Module, Tensor] = {}
    handles = [layer.register_forward_hook(lambda layer, _, out: said.update({layer: out})) for layer in layers]
    try:
        with torch.no_grad():
            answer = setup.model(torch.zeros(2, *setup.frame_shape, device=setup.model.device))
    finally:
        for handle in handles:
            handle.remove()
    found = [layer for layer in layers if layer in said and torch.equal(said[layer], answer)]
    if not found:
        raise BundleError(
            "this method works on the input of a linear classifier, and what the model answers is the output of none "
            "of its linear layers as it is"
        )
    return found[-1]


def with_penultimate(head: nn.Linear, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The result of the forward pass `run`, and the input (B, D) of its classifier `head`."""
    caught: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    try:
        return run(), caught[-1]
    finally:
        handle.remove()
