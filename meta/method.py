"""What every adaptation method looks like to the engine, the benchmark and the meta-training.

A method holds no stream's state. State is a dict of tensors whose first dimension is the stream; `predict` runs
the forward of a micro-batch under it, and `update` returns the next state. Predictions can so leave before the
backward pass starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from meta.outputs import Output

State = dict[str, Tensor]
TINY = 1e-12
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Forward:
    """A forward pass that `update` can go on from.

    logits (B, classes), features (B, F), rows (B, P), None where there is no graph, stream (B,) int64 in [0, S), counts
    (S,) float, and the state it ran under. logits carry a graph; use `detach` before they leave. `frames` and `kept`
    are what some methods need again: the frames themselves, and whatever else `predict` worked out, of each stream
    (S, ...), but for `probability` (B, classes). `giving`: where there is no graph, those frames once more that give an
    update its gradient, with one. `shadow`: where source was asked in the same pass, what it says. `head` as in
    `Output`.
    """

    logits: Tensor
    features: Tensor
    rows: Tensor | None
    stream: Tensor
    counts: Tensor
    state: State
    frames: Tensor | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)
    giving: Forward | None = None
    shadow: Output | None = None
    head: Tensor | None = None

    @property
    def output(self) -> Output:
        """What the model has put out for the frames."""
        return Output(self.logits, self.features, self.head)

    @property
    def answer(self) -> Tensor:
        """What the method answers, as logits (B, classes) without a graph: its `kept` class probabilities if it has
        any, else the model's logits."""
        probability = self.kept.get("probability")
        return self.logits.detach() if probability is None else probability.clamp_min(TINY).log()


@dataclass(frozen=True)
class Update:
    """The state that a method proposes, and per-stream signals (S,) for guard, metrics and audit. Its tensors may be
    torch's inference tensors: whoever changes them in place does so in inference mode."""

    state: State
    signals: dict[str, Tensor]


class Method(Protocol):
    """Stateless adaptation of many streams."""

    def fresh(self, streams: int) -> State:
        """The state of streams that have seen nothing: they predict as the source model does."""
        ...

    def predict(self, frames: Tensor, stream: Tensor, state: State) -> Forward:
        """Logits of standardised frames (B, ch, h, w); frame i belongs to row stream[i] of the state."""
        ...

    def update(self, forward: Forward) -> Update:
        """One update per stream from its frames in `forward`; the state of a stream without any stays."""
        ...

    def observe(self, forward: Forward) -> State:
        """The next state without an update: what is known of the stream may move, its parameters do not."""
        ...


def where_seen(forward: Forward, state: State) -> State:
    """`state` of the streams that have a frame in the pass; the others keep what they had."""
    seen = forward.counts > 0
    if bool(seen.all()):
        return state
    return {name: torch.where(seen.view(-1, *[1] * (t.dim() - 1)), t, forward.state[name]) for name, t in state.items()}


def narrowed(forward: Forward, streams: list[int]) -> Forward:
    """The same for some of the streams alone, with their frames; without a graph, but for `giving`, whose streams must
    be among these."""
    device = forward.stream.device
    index = torch.tensor(streams, device=device)
    place = torch.full((len(forward.counts),), -1, device=device)
    place.index_copy_(0, index, torch.arange(len(index), device=device))
    stream = place.index_select(0, forward.stream)
    frames = (stream >= 0).nonzero().flatten()
    state, giving = take(forward.state, index), forward.giving
    if giving is not None:
        counts = giving.counts.index_select(0, index)
        giving = replace(giving, stream=place.index_select(0, giving.stream), counts=counts, state=state)
    return Forward(
        forward.logits.detach().index_select(0, frames),
        forward.features.detach().index_select(0, frames),
        None,
        stream.index_select(0, frames),
        forward.counts.index_select(0, index),
        state,
        None if forward.frames is None else forward.frames.index_select(0, frames),
        {name: t.index_select(0, frames if name == "probability" else index) for name, t in forward.kept.items()},
        giving,
    )


def take(state: State, index: Tensor) -> State:
    """The rows `index` (S,) of a state, copied."""
    return {name: tensor.index_select(0, index) for name, tensor in state.items()}


def put(state: State, index: Tensor, rows: State) -> None:
    """Write `rows` over the rows `index` (S,) of those tensors of `state` that they have, in place."""
    for name, tensor in rows.items():
        state[name].index_copy_(0, index, tensor.to(state[name].dtype))


def on_cpu(tensors: State) -> State:
    """The same on the CPU. Each copy waits until the device has done all that it was asked for before, so that tensors
    of a type come in one."""
    if all(tensor.is_cpu for tensor in tensors.values()):
        return tensors
    found: State = {}
    for dtype in {tensor.dtype for tensor in tensors.values()}:
        some = {name: tensor for name, tensor in tensors.items() if tensor.dtype == dtype}
        joined = torch.cat([tensor.flatten() for tensor in some.values()]).cpu()
        parts = joined.split([tensor.numel() for tensor in some.values()])
        found |= {name: part.view(some[name].shape) for name, part in zip(some, parts, strict=True)}
    return found


def finite_rows(tensors: dict[str, Tensor]) -> Tensor:
    """(S,) bool: whether all numbers of a row are finite in every tensor."""
    # Only what is finite is zero when multiplied by it; `isfinite` takes six times as long.
    sums = [
        (t * 0).sum(tuple(range(1, t.dim())), dtype=torch.float32) if t.dim() > 1 else t * 0 for t in tensors.values()
    ]
    return torch.stack(sums).sum(0) == 0
