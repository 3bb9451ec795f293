"""What goes into a pass over the micro-batches of many streams, and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from meta.method import Forward, State
from meta.outputs import Known
from meta.proxies import Observed
from schemas.prediction import Parameters
from schemas.state import StreamHeader
from worker.batch.batcher import MicroBatch
from worker.engine.held import Seen
from worker.engine.resident import Resident
from worker.guard.guard import Sight

WAY = {"affine", "offset", "student"}  # the tensors of a state of which an update can be accepted in part


@dataclass(frozen=True)
class Fixed:
    """Frames of a part that fixed parameters answer, source's or approved ones, without the class filter: which frames
    (N,) of the part, each one's row (N,) in the parameters, and the parameters. Frames that source answers and is asked
    about anyway are not among them."""

    frames: Tensor
    stream: Tensor
    parameters: State


@dataclass(frozen=True)
class Part:
    """Micro-batches gathered for one forward: each frame's row in `state`, and `state`, a copy of the streams' rows.

    `shadow` (n,): the places of the frames that source is asked about too. `by_source` (m,): the places in `shadow` of
    those that it answers. `headers`: the residents' as they were when this was gathered; another thread may read them.
    `known`: outputs that are known of held frames. `keep`: some micro-batches will be held, so keep their outputs.
    """

    batches: list[MicroBatch]
    residents: list[Resident]
    headers: list[StreamHeader]
    stream: Tensor
    counts: Tensor
    state: State
    fixed: Fixed | None
    shadow: Tensor
    by_source: Tensor
    known: Known | None = None
    keep: bool = False


@dataclass(frozen=True)
class Gathered:
    """All that a pass needs to run in any thread, without the engine's tensors.

    `adapting` is predicted with a graph for the backward pass. `passive` is not: it makes no update, or the method runs
    the frames that it takes the gradient of again.
    """

    adapting: Part | None
    passive: Part | None
    hurried: Part | None


@dataclass(frozen=True)
class BatchPrediction:
    """What a pass says of one micro-batch's frames, in order, before any update.

    `parameters` and `step`: those that answered. The means, and `signals` (entropy and confidence of each frame), are
    of the parameters that adapt. `seen`: the outputs to keep where the frames will be held.
    """

    batch: MicroBatch
    resident: Resident
    parameters: Parameters
    step: int
    top_index: list[list[int]]
    top_confidence: list[list[float]]
    mean_confidence: float
    mean_entropy: float
    signals: list[list[float]]
    observed: Observed | None
    sight: Sight
    seen: Seen | None = None

    @property
    def source_index(self) -> Sequence[int | None]:
        """The class that source gives each frame. Source is asked about all frames of a micro-batch or none."""
        source = self.observed.source if self.observed is not None else ()
        return source or [None] * len(self.batch.frames)


@dataclass(frozen=True)
class Pass:
    """The predictions of a pass, and what its updates need: `forward` has a row for each of `adapting`. `observed`: the
    tensors that frames move without an update, a row for each of `passive`."""

    predictions: list[BatchPrediction]
    adapting: list[BatchPrediction]
    forward: Forward | None
    passive: list[BatchPrediction]
    observed: State


@dataclass(frozen=True)
class Proposal:
    """A stream's next state, before the guard has judged it: a `row` of `Proposals.state`. Where it is no `update`, the
    parameters stay, and it is a row of `Proposals.observed`. `layers`: how far each norm layer moves."""

    prediction: BatchPrediction
    row: int
    update: bool
    signals: dict[str, float]
    finite: bool
    layers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Proposals:
    """What a pass proposes. Rows of streams with an update: `state` after it and `before` it. Rows of the others:
    `observed`, the tensors that move without an update."""

    proposals: list[Proposal]
    before: State
    state: State
    observed: State

    @torch.inference_mode()
    def shrink(self, proposal: Proposal, share: float) -> None:
        """Accept only this share of the way from the parameters before the update. All tensors stay on the pass's
        device, so that the loop does not wait for a GPU."""
        for name in WAY & set(self.state):
            row = self.state[name][proposal.row]
            row.copy_(torch.lerp(self.before[name][proposal.row], row, share))

    @torch.inference_mode()
    def replace(self, proposal: Proposal, state: State) -> None:
        """Propose `state` instead."""
        for name, tensor in state.items():
            self.state[name][proposal.row] = tensor
