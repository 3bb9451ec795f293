"""The interface of every adaptation method, for the engine, the benchmark and the meta-training.

A method keeps no state of a stream. The state is a dict of tensors whose first dimension is the stream. `predict` runs
the forward pass of a micro-batch under a state, and `update` returns the next state. Predictions can therefore be
published before the backward pass starts.
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
    """The forward pass of B frames of S streams, from which `update` continues.

    logits (B, classes): with a graph; detach them before they leave the method
    features (B, F): pooled outputs of the norm layers
    rows (B, P): each frame's affine, the leaf that the gradient is taken for; None if there is no graph
    stream (B,): each frame's stream, int64 in [0, S)
    counts (S,): frames of each stream, float
    state: the state that the pass ran under
    frames (B, ch, h, w): for methods whose update needs them
    kept: other results of `predict`, (S, ...) each. `probability` is per frame, (B, classes), and so are results that
        baselines keep for their own `update`
    gradient_forward: if this pass has no graph, a pass with one over the frames that give the gradient
    source_output: the source model's output for the frames that it was asked about in the same pass
    head: as in `Output`
    """

    logits: Tensor
    features: Tensor
    rows: Tensor | None
    stream: Tensor
    counts: Tensor
    state: State
    frames: Tensor | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)
    gradient_forward: Forward | None = None
    source_output: Output | None = None
    head: Tensor | None = None

    @property
    def output(self) -> Output:
        """The model's output for the frames."""
        return Output(self.logits, self.features, self.head)

    @property
    def answer(self) -> Tensor:
        """The method's answer as logits (B, classes) without a graph: the logarithm of `kept["probability"]` if the
        method has it, else the model's logits."""
        probability = self.kept.get("probability")
        return self.logits.detach() if probability is None else probability.clamp_min(TINY).log()


@dataclass(frozen=True)
class Update:
    """The proposed next state, and signals (S,) of each stream for guard, metrics and audit.

    The tensors may be inference tensors, which can be changed in place in inference mode only.
    """

    state: State
    signals: dict[str, Tensor]


class Method(Protocol):
    """Stateless adaptation of many streams."""

    def fresh(self, streams: int) -> State:
        """The state of new streams, under which they predict as the source model does."""
        ...

    def predict(self, frames: Tensor, stream: Tensor, state: State) -> Forward:
        """Logits of standardised frames (B, ch, h, w); frame i belongs to row stream[i] of the state."""
        ...

    def update(self, forward: Forward) -> Update:
        """One update per stream from its frames in `forward`; the state of a stream without any stays."""
        ...

    def observe(self, forward: Forward) -> State:
        """The next state without an update: statistics of the stream may move, its parameters do not."""
        ...


def where_seen(forward: Forward, state: State) -> State:
    """`state` for streams that have a frame in the pass, `forward.state` for the others."""
    seen = forward.counts > 0
    if bool(seen.all()):
        return state
    return {name: torch.where(seen.view(-1, *[1] * (t.dim() - 1)), t, forward.state[name]) for name, t in state.items()}


def narrowed(forward: Forward, streams: list[int]) -> Forward:
    """The forward of some streams and their frames alone.

    It has no graph, but for `gradient_forward`, whose streams must be among these. In `kept` only `probability` may be
    per frame.
    """
    device = forward.stream.device
    index = torch.tensor(streams, device=device)
    row = torch.full((len(forward.counts),), -1, device=device)
    row.index_copy_(0, index, torch.arange(len(index), device=device))
    stream = row.index_select(0, forward.stream)
    frames = (stream >= 0).nonzero().flatten()
    state, part = take(forward.state, index), forward.gradient_forward
    if part is not None:
        counts = part.counts.index_select(0, index)
        part = replace(part, stream=row.index_select(0, part.stream), counts=counts, state=state)
    return Forward(
        forward.logits.detach().index_select(0, frames),
        forward.features.detach().index_select(0, frames),
        None,
        stream.index_select(0, frames),
        forward.counts.index_select(0, index),
        state,
        None if forward.frames is None else forward.frames.index_select(0, frames),
        {name: t.index_select(0, frames if name == "probability" else index) for name, t in forward.kept.items()},
        part,
    )


def take(state: State, index: Tensor) -> State:
    """The rows `index` (S,) of a state, copied."""
    return {name: tensor.index_select(0, index) for name, tensor in state.items()}


def put(state: State, index: Tensor, rows: State) -> None:
    """Write `rows` to the rows `index` (S,) of the tensors of `state` with the same names, in place."""
    for name, tensor in rows.items():
        state[name].index_copy_(0, index, tensor.to(state[name].dtype))


def on_cpu(tensors: State) -> State:
    """The tensors on the CPU. A copy from the device waits for all work queued there, so there is one per dtype."""
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
    """(S,) bool: whether all values in a row are finite, in every tensor."""
    # x * 0 is 0 only if x is finite. `isfinite` takes six times as long.
    sums = [
        (t * 0).sum(tuple(range(1, t.dim())), dtype=torch.float32) if t.dim() > 1 else t * 0 for t in tensors.values()
    ]
    return torch.stack(sums).sum(0) == 0
