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

WAY = {"affine", "offset", "student"}  # what of a state an update moves that can be gone in part


@dataclass(frozen=True)
class Fixed:
    """Frames of a part for which parameters answer that do not adapt, source or approved, without the class filter:
    which frames (N,) of the part, each one's row (N,) in the parameters, and these. Not those that source answers and
    is asked for besides."""

    frames: Tensor
    stream: Tensor
    parameters: State


@dataclass(frozen=True)
class Part:
    """Micro-batches gathered for one forward: pixels, each frame's row in `state`, and a copy of the streams' rows.

    `shadow` (n,) are the places of the frames that the source model is asked for too, and `by_source` (m,) the places
    in `shadow` of those for which it answers. `headers` are the residents' as they were when this was gathered, which
    another thread may read. `known` is of held frames that the model has seen; `keep`: some of these are to be held.
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
    """All that a pass needs. From here on it runs without the engine's tensors, in any thread.

    `adapting` are predicted with a graph; `passive` without, which an update on some of the frames does not need.
    """

    adapting: Part | None
    passive: Part | None
    hurried: Part | None


@dataclass(frozen=True)
class BatchPrediction:
    """What one pass says of the frames of one micro-batch, in order, before any update.

    `parameters` and their `step` are those that answered; the means are of the parameters that adapt, and so are the
    entropy and confidence of each frame in `signals`. `seen`: what to keep of frames that are held.
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
        """The class that source gives each frame, where it was asked: all of a micro-batch, or none."""
        source = self.observed.source if self.observed is not None else ()
        return source or [None] * len(self.batch.frames)


@dataclass(frozen=True)
class Pass:
    """The predictions of a pass, and what its updates need: the streams of `forward` are those of `adapting`.
    `observed`: those tensors that frames without an update have moved, a row for each of `passive`."""

    predictions: list[BatchPrediction]
    adapting: list[BatchPrediction]
    forward: Forward | None
    passive: list[BatchPrediction]
    observed: State


@dataclass(frozen=True)
class Proposal:
    """A stream's next state before the guard has seen it. `row` points into the tensors of all updates.

    `update` is False where the parameters stay and only what is known of the stream has moved; then `row` points into
    the tensors `observed`. `layers` says how far each norm layer moves.
    """

    prediction: BatchPrediction
    row: int
    update: bool
    signals: dict[str, float]
    finite: bool
    layers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Proposals:
    """The updates that a pass proposes: the rows of state that they would leave, and what was there `before`; and of
    streams without an update those tensors that move all the same."""

    proposals: list[Proposal]
    before: State
    state: State
    observed: State

    @torch.inference_mode()
    def shrink(self, proposal: Proposal, share: float) -> None:
        """Go only so much of the way from the parameters that the stream had. All of it is where the pass was: the
        loop must not wait for a GPU."""
        for name in WAY & set(self.state):
            row = self.state[name][proposal.row]
            row.copy_(torch.lerp(self.before[name][proposal.row], row, share))

    @torch.inference_mode()
    def replace(self, proposal: Proposal, state: State) -> None:
        """Propose this state instead."""
        for name, tensor in state.items():
            self.state[name][proposal.row] = tensor
