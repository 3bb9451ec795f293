"""The engine: one pass for the micro-batches of many streams, each under its own parameters."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from meta.bundle import Bundle
from meta.method import Forward, State, finite_rows, put, take
from schemas.bundle import Preprocess
from schemas.state import RunningProxies, StreamHeader, StreamState
from worker.batcher import MicroBatch
from worker.decode import Pixels

TOP = 3
PROXY_WINDOW = 128


@dataclass
class Resident:
    """A stream whose state is in memory: its slot in the engine's tensors, its header, the worker's token.

    `stored` says whether the store has these tensors; what is fresh or was reset is not there yet.
    """

    slot: int
    header: StreamHeader
    token: int
    stored: bool


@dataclass(frozen=True)
class Outlook:
    """What one pass says of the frames of one micro-batch, in order, before any update."""

    batch: MicroBatch
    step: int
    top_index: list[list[int]]
    top_confidence: list[list[float]]
    mean_confidence: float
    mean_entropy: float


@dataclass(frozen=True)
class Pass:
    """The predictions of a pass, and what its update needs."""

    outlooks: list[Outlook]
    adapting: list[Outlook]
    forward: Forward | None


@dataclass(frozen=True)
class Proposal:
    """A stream's next state before the guard has seen it. `row` points into the update's tensors."""

    outlook: Outlook
    row: int
    signals: dict[str, float]
    finite: bool


@dataclass(frozen=True)
class Proposals:
    proposals: list[Proposal]
    state: State


class Engine:
    """Holds the resident streams' tensors, row by row, and runs passes over them."""

    def __init__(self, bundle: Bundle, step_scale: float = 1.0) -> None:
        self.bundle = bundle
        self._method = bundle.method.with_step_scale(step_scale)
        self._residents: dict[str, Resident] = {}
        self._state = self._method.fresh(16)
        self._free = list(range(16))
        self._fresh = {name: tensor[0].clone() for name, tensor in self._method.fresh(1).items()}

    @property
    def like(self) -> dict[str, Tensor]:
        """The tensors of a stream that has seen nothing; also the pattern for stored ones."""
        return self._fresh

    @property
    def state_bytes(self) -> int:
        """Bytes of one stream's tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._fresh.values())

    def __contains__(self, stream: str) -> bool:
        return stream in self._residents

    def __len__(self) -> int:
        return len(self._residents)

    def resident(self, stream: str) -> Resident:
        return self._residents[stream]

    def admit(self, state: StreamState, token: int, stored: bool) -> None:
        """Make a stream resident."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._residents[state.header.stream] = Resident(slot, state.header, token, stored)
        for name, tensor in self._state.items():
            tensor[slot] = state.tensors[name]

    def release(self, streams: Iterable[str]) -> None:
        """Forget streams; what they were is in the store."""
        for stream in streams:
            resident = self._residents.pop(stream, None)
            if resident is not None:
                self._free.append(resident.slot)

    def least_recent(self, count: int, keep: set[str]) -> list[str]:
        """The `count` streams that were used longest ago, but for those in `keep`."""
        return [stream for stream in self._residents if stream not in keep][: max(0, count)]

    def tensors(self, stream: str) -> dict[str, Tensor]:
        """The stream's tensors, as views."""
        slot = self._residents[stream].slot
        return {name: tensor[slot] for name, tensor in self._state.items()}

    def predict(self, batches: list[MicroBatch]) -> Pass:
        """Predict every frame of every micro-batch under its stream's parameters as they are now."""
        for batch in batches:  # The order of this dict is the order of use.
            self._residents[batch.stream] = self._residents.pop(batch.stream)
        adapting = [batch for batch in batches if batch.adapt]
        others = [batch for batch in batches if not batch.adapt]
        outlooks: list[Outlook] = []
        forward = None
        if adapting:
            forward = self._method.predict(*self._inputs(adapting))
            outlooks += self._outlooks(adapting, forward.answer)
        first_passive = len(outlooks)
        if others:
            frames, stream, state = self._inputs(others)
            with torch.inference_mode():
                logits = self.bundle.model(frames, state["affine"].index_select(0, stream))
            outlooks += self._outlooks(others, logits)
        return Pass(outlooks, outlooks[:first_passive], forward)

    def adapt(self, passed: Pass) -> Proposals:
        """The update of every micro-batch that adapts."""
        if passed.forward is None:
            return Proposals([], {})
        update = self._method.update(passed.forward)
        finite = finite_rows(update.state).tolist()
        signals = {name: values.tolist() for name, values in update.signals.items()}
        return Proposals(
            [
                Proposal(outlook, row, {name: values[row] for name, values in signals.items()}, finite[row])
                for row, outlook in enumerate(passed.adapting)
            ],
            update.state,
        )

    def accept(self, proposals: Proposals, accepted: list[Proposal]) -> None:
        """Put accepted updates in place, once they are in the store."""
        accepted = [p for p in accepted if p.outlook.batch.stream in self._residents]
        if not accepted:
            return
        rows = torch.tensor([proposal.row for proposal in accepted])
        slots = torch.tensor([self._residents[p.outlook.batch.stream].slot for p in accepted])
        put(self._state, slots, take(proposals.state, rows))

    def _inputs(self, batches: list[MicroBatch]) -> tuple[Tensor, Tensor, State]:
        frames = normalise_pixels(
            [frame.pixels for batch in batches for frame in batch.frames], self.bundle.manifest.preprocess
        )
        counts = torch.tensor([len(batch.frames) for batch in batches])
        stream = torch.arange(len(batches)).repeat_interleave(counts)
        slots = torch.tensor([self._residents[batch.stream].slot for batch in batches])
        return frames, stream, take(self._state, slots)

    def _outlooks(self, batches: list[MicroBatch], logits: Tensor) -> list[Outlook]:
        log_p = logits.log_softmax(1)
        entropy = (log_p.exp() * log_p).sum(1).neg().tolist()
        calibrated = (logits / self.bundle.manifest.calibration.temperature).softmax(1).nan_to_num()
        top = calibrated.topk(min(TOP, calibrated.shape[1]), 1)
        confidence, index = top.values.tolist(), top.indices.tolist()
        outlooks, start = [], 0
        for batch in batches:
            end = start + len(batch.frames)
            outlooks.append(
                Outlook(
                    batch=batch,
                    step=self._residents[batch.stream].header.step,
                    top_index=index[start:end],
                    top_confidence=confidence[start:end],
                    mean_confidence=sum(row[0] for row in confidence[start:end]) / (end - start),
                    mean_entropy=sum(entropy[start:end]) / (end - start),
                )
            )
            start = end
        return outlooks

    def _grow(self) -> None:
        size = next(iter(self._state.values())).shape[0]
        more = self._method.fresh(size)
        self._state = {name: torch.cat([tensor, more[name]]) for name, tensor in self._state.items()}
        self._free = list(range(size, 2 * size))


def normalise_pixels(pixels: Sequence[Pixels], preprocess: Preprocess) -> Tensor:
    """Decoded pixels, uint8 (h, w) or (h, w, 3), to the model's input: float (B, ch, h, w), channels-last."""
    stacked = torch.from_numpy(np.stack(pixels))
    images = stacked.unsqueeze(1) if stacked.dim() == 3 else stacked.permute(0, 3, 1, 2)
    mean = torch.tensor(preprocess.mean).view(1, -1, 1, 1) * 255
    std = torch.tensor(preprocess.std).view(1, -1, 1, 1) * 255
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def next_header(header: StreamHeader, outlook: Outlook, applied: bool) -> StreamHeader:
    """The header after these frames have been folded in, with or without an update."""
    frames = outlook.batch.frames
    positions, folded = dict(header.positions), header.folded
    for frame in frames:
        positions[frame.position.log] = frame.position.offset
        folded = hashlib.sha256(f"{folded}{frame.position}".encode()).hexdigest()
    proxies = header.proxies
    usable = math.isfinite(outlook.mean_confidence) and math.isfinite(outlook.mean_entropy)
    # A plain mean until the window is full, then an exponential one.
    seen = min(proxies.frames, PROXY_WINDOW - len(frames)) if proxies.frames else 0
    weight = len(frames) / (len(frames) + max(0, seen))
    return header.model_copy(
        update={
            "positions": positions,
            "folded": folded,
            "frames": header.frames + len(frames),
            "step": header.step + applied,
            "events": header.events + 1,
            "proxies": RunningProxies(
                frames=proxies.frames + len(frames),
                confidence=proxies.confidence + weight * (outlook.mean_confidence - proxies.confidence),
                entropy=max(0.0, proxies.entropy + weight * (outlook.mean_entropy - proxies.entropy)),
            )
            if usable
            else proxies,
        }
    )
