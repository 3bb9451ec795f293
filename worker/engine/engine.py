"""The engine: one pass for the micro-batches of many streams, each under its own parameters."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Set
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from meta.answers import AnswerObserver
from meta.bundle import Bundle
from meta.estimator import AccuracyModel
from meta.method import Forward, State, finite_rows, narrowed, on_cpu, put, take
from meta.mgg import MGG
from meta.outputs import Known
from meta.proxies import Observer
from meta.threads import one_thread
from monitoring.proxies import estimate
from schemas.state import StreamHeader
from schemas.state_tensors import StreamState
from schemas.update import Proxies
from worker.batch.batcher import MicroBatch
from worker.decode.pixels import blank_frames, normalise_pixels
from worker.engine.held import kept, known
from worker.engine.passes import BatchPrediction, Fixed, Gathered, Part, Pass, Proposal, Proposals
from worker.engine.predictions import Look, answer_barely, batch_predictions
from worker.engine.resident import Headers, Resident
from worker.guard.guard import watched

FIRST_SLOTS = 16
SOURCE_SHARE = 1 / 16
MOST_ASKED = 1 / 3  # of a pass's frames: up to so many source answers in the same forward, more in one of their own
# The tensors of a state that answer. The others serve updates alone.
PARAMETERS = ("affine", "norm_mean", "norm_variance", "correction")


class Engine:
    """Holds the resident streams' tensors, a row each, on the model's device, and runs passes over them. All tensors
    that others give it and get from it are on the CPU.

    `gather` and `accept` read and write the rows and belong to the worker's loop. `forward` and `adapt` work on copies
    that `gather` has made, so that another thread may run them. A stream must not be in two passes at once.
    """

    def __init__(
        self,
        bundle: Bundle,
        step_scale: float = 1.0,
        observe: bool = True,
        source_share: float = SOURCE_SHARE,
    ) -> None:
        """`observe` False: frames that make no update get the bare model's answer and leave no trace in the state.

        `source_share`: the share of micro-batches that source answers too; it answers all of new and doubtful streams.
        0: none at all.
        """
        self.bundle, self._observe = bundle, observe
        calibration = bundle.manifest.calibration
        self._observer: Observer | AnswerObserver
        self.accuracy_model: AccuracyModel | None = None
        if bundle.is_estimated:
            self._observer = Observer(bundle.model, bundle.statistics, calibration.threshold, calibration.entropies)
            self.accuracy_model = AccuracyModel(calibration.estimator) if calibration.estimator else None
        else:  # Another method reports no features, and the bundle's accuracy estimate does not hold for it.
            self._observer = AnswerObserver(bundle.model, calibration.entropies)
        self._shadow_every = round(1 / source_share) if source_share else 0
        self.bundle_hash = bundle.hash
        self._method = bundle.method.for_site(step_scale)
        # Outputs of held frames are kept for the next pass, except where they depend on the other frames of the pass.
        self._keeps = isinstance(self._method, MGG) and not self._method.uses_batch_statistics
        self.device = bundle.model.device
        self._residents: dict[str, Resident] = {}
        self._headers = Headers()
        fresh = self._method.fresh(1)
        self._fresh = on_cpu({name: tensor[0].clone() for name, tensor in fresh.items()})
        self._free: list[int] = []
        self.source = {name: tensor for name, tensor in self._fresh.items() if name in PARAMETERS}
        places = bundle.model.places
        self._layers = [place.layer for place in places]
        sizes = torch.tensor([place.end - place.scale for place in places])
        self._layer_of = torch.arange(len(places)).repeat_interleave(sizes).to(self.device)
        self._state: State = {name: tensor[:0].clone() for name, tensor in fresh.items()}

    @property
    def like(self) -> dict[str, Tensor]:
        """The tensors of a new stream, which also tell the names and shapes that stored ones must have."""
        return self._fresh

    def begun(self, stream: str) -> StreamState:
        """The state of a new stream."""
        header = StreamHeader(stream=stream, bundle=self.bundle_hash, method=self.bundle.method_name)
        return StreamState(header=header, tensors=self.like)

    @property
    def state_bytes(self) -> int:
        """Bytes of one stream's tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._fresh.values())

    @property
    def _slots(self) -> int:
        return next(iter(self._state.values())).shape[0]

    def __contains__(self, stream: str) -> bool:
        return stream in self._residents

    def __len__(self) -> int:
        return len(self._residents)

    @property
    def streams(self) -> Set[str]:
        """All resident streams."""
        return self._residents.keys()

    def resident(self, stream: str) -> Resident:
        return self._residents[stream]

    def holds(self, stream: str, resident: Resident) -> bool:
        """Whether the stream is still this resident. It is not if it was released, or released and admitted again: what
        was computed for the old one is void then, and must be written neither to memory nor to the store."""
        return self._residents.get(stream) is resident

    def estimate(self, header: StreamHeader) -> Proxies:
        """The stream's estimated accuracy, from its running signals by the bundle's calibration."""
        manifest = self.bundle.manifest
        clean, classes = manifest.model.clean_accuracy, len(self.bundle.labels)
        return estimate(header.proxies, manifest.calibration, clean, classes, self.bundle.is_estimated)

    def reserve(self, slots: int) -> None:
        """Have at least so many slots. The kernel gives memory only when a stream uses it.

        Growing later copies all states, and the process keeps the memory of the old ones.
        """
        used = self._slots
        size = max(slots, used)
        for name, old in self._state.items():
            tensor = old.new_empty(size, *old.shape[1:])
            tensor[:used] = old
            self._state[name] = tensor
        self._free = [*reversed(range(used, size)), *self._free]

    def admit(self, state: StreamState, token: int, stored: bool, approved: State | None = None) -> None:
        """Make a stream resident."""
        if not self._free:
            self.reserve(max(FIRST_SLOTS, 2 * self._slots))
        slot = self._free.pop()
        self._residents[state.header.stream] = Resident(slot, state.header, token, stored, approved, self._headers)
        for name, tensor in self._state.items():
            tensor[slot] = state.tensors[name]

    def release(self, streams: Iterable[str]) -> None:
        """Forget streams. Their states must be in the store, or are to be computed again."""
        for stream in streams:
            resident = self._residents.pop(stream, None)
            if resident is not None:
                self._headers.forget(resident)
                self._free.append(resident.slot)

    def pack_idle_headers(self, now: float) -> None:
        """Compress the headers of some idle streams to save memory; `now` is monotonic seconds."""
        self._headers.pack_idle(now)

    def least_recent(self, count: int, keep: Set[str]) -> list[str]:
        """The `count` least recently used streams, except those in `keep`."""
        return [stream for stream in self._residents if stream not in keep][: max(0, count)]

    def tensors(self, stream: str) -> dict[str, Tensor]:
        """The stream's tensors: views, or copies where the states are on another device."""
        slot = self._residents[stream].slot
        return on_cpu({name: tensor[slot] for name, tensor in self._state.items()})

    def predict(self, batches: list[MicroBatch]) -> Pass:
        """Predict the frames of all micro-batches, each under its stream's present parameters."""
        return self.forward(self.gather(batches))

    def gather(self, batches: list[MicroBatch]) -> Gathered:
        """Copy what a pass over the micro-batches needs. From here on it does not read the engine's tensors."""
        hurried = [batch for batch in batches if self._hurries(batch)]
        adapting = [batch for batch in batches if batch.adapt]
        # Our own generator takes the gradient of some of a micro-batch's frames, and runs only these with a graph.
        whole = not isinstance(self._method, MGG) or all(len(batch.frames) == 1 for batch in adapting)
        graphs = adapting if whole else []
        others = [batch for batch in batches if not self._hurries(batch) and not (whole and batch.adapt)]
        return Gathered(self._part(graphs), self._part(others), self._part(hurried))

    def forward(self, gathered: Gathered) -> Pass:
        """Predict what was gathered."""
        hurried = self._hurry(gathered.hurried) if gathered.hurried is not None else []
        adapting, forward = self._predict(gathered.adapting) if gathered.adapting is not None else ([], None)
        if gathered.passive is None:
            return Pass(adapting + hurried, adapting, forward, [], {})
        with torch.inference_mode():
            watched, seen = self._predict(gathered.passive)
            after = self._method.observe(seen)
            moved = {name: tensor for name, tensor in after.items() if tensor is not seen.state[name]}
        updating = [row for row, one in enumerate(watched) if one.batch.adapt]
        if not updating:
            return Pass(adapting + watched + hurried, adapting, forward, watched, moved)
        resting = [row for row, one in enumerate(watched) if not one.batch.adapt]
        return Pass(
            watched + hurried,
            [watched[row] for row in updating],
            narrowed(seen, updating),
            [watched[row] for row in resting],
            take(moved, self._index(resting)) if resting else {},
        )

    def _hurries(self, batch: MicroBatch) -> bool:
        return not batch.adapt and (batch.hurried or not self._observe)

    def _predict(self, part: Part) -> tuple[list[BatchPrediction], Forward]:
        frames, looks = self._frames(part)
        adapts = [batch.adapt for batch in part.batches]
        asked = part.shadow if len(part.shadow) <= MOST_ASKED * len(part.stream) else None
        if isinstance(self._method, MGG):
            forward = self._method.serve(frames, part.stream, part.state, adapts, asked, part.known, part.keep)
        else:
            forward = self._method.predict(frames, part.stream, part.state)
        observed, source = self._observer.observe(frames, forward, part.shadow)
        found = batch_predictions(self.bundle, part, frames, forward.answer, observed, looks, source)
        if part.keep:
            held = kept(part.batches, part.headers, forward.output)
            found = [replace(prediction, seen=seen) for prediction, seen in zip(found, held, strict=True)]
        return found, forward

    def _hurry(self, part: Part) -> list[BatchPrediction]:
        """One forward of the bare model under the parameters that answer, without class filter and source."""
        frames, looks = self._frames(part)
        parameters = {name: part.state[name] for name in PARAMETERS if name in part.state}
        if part.fixed is not None:
            rows = part.stream.index_select(0, part.fixed.frames)
            for name, own in part.fixed.parameters.items():
                parameters[name] = parameters[name].index_copy(0, rows, own.index_select(0, part.fixed.stream))
            part = replace(part, fixed=None)
        logits = answer_barely(self.bundle.model, frames, part.stream, parameters)
        return batch_predictions(self.bundle, part, frames, logits, None, looks)

    def adapt(self, passed: Pass) -> Proposals:
        """The updates of micro-batches that adapt, and what the others have moved in their streams' states."""
        proposals: list[Proposal] = []
        before, state = State(), State()
        if passed.forward is not None:
            update, before = self._method.update(passed.forward), passed.forward.state
            state = update.state
            with one_thread():
                finite, layers = finite_rows(state).tolist(), self.distances(before["affine"], state["affine"])
                present = (before["affine"] - self.bundle.model.source_affine).norm(dim=1)
            told = on_cpu(update.signals | {"present_distance": present})
            signals = {name: values.tolist() for name, values in told.items()}
            for row, prediction in enumerate(passed.adapting):
                own = {name: values[row] for name, values in signals.items()}
                proposals.append(Proposal(prediction, row, True, own, finite[row], layers[row]))
        sound = finite_rows(passed.observed).tolist() if passed.observed else [True] * len(passed.passive)
        proposals += [Proposal(one, row, False, {}, sound[row]) for row, one in enumerate(passed.passive)]
        return Proposals(proposals, before, state, passed.observed)

    def distances(self, before: Tensor, after: Tensor) -> list[dict[str, float]]:
        """How far each norm layer moved between two affines (S, P), for each row; to four digits."""
        change = (after - before).detach()
        layer_of = self._layer_of.to(change.device)  # Commands call this with tensors on the CPU.
        squared = change.new_zeros(len(change), len(self._layers)).index_add_(1, layer_of, change * change)
        # A stored state may be so far away that the square is infinite, which an event cannot carry: JSON has no number
        # for it.
        far = squared.sqrt().clamp_max(torch.finfo(squared.dtype).max)
        return [
            {layer: float(f"{distance:.4g}") for layer, distance in zip(self._layers, row, strict=True)}
            for row in far.tolist()
        ]

    def replace(self, stream: str, tensors: State) -> None:
        """Give a stream other tensors, which must be in the store already. It must not be in a pass."""
        slot = self._residents[stream].slot
        for name, tensor in self._state.items():
            tensor[slot] = tensors[name]

    def accept(self, proposals: Proposals, accepted: list[Proposal]) -> None:
        """Make accepted proposals the streams' states. Those of streams that have gone meanwhile are left out."""
        accepted = [p for p in accepted if self.holds(p.prediction.batch.stream, p.prediction.resident)]
        for update, state in ((True, proposals.state), (False, proposals.observed)):
            some = [proposal for proposal in accepted if proposal.update is update]
            if some and state:
                rows = self._index([proposal.row for proposal in some])
                slots = self._index([proposal.prediction.resident.slot for proposal in some])
                put(self._state, slots, take(state, rows))

    def _index(self, values: list[int]) -> Tensor:
        return self._there(torch.tensor(values))

    def _there(self, tensor: Tensor) -> Tensor:
        """The tensor on the engine's device. The loop does not wait for a GPU's pending work."""
        return tensor.to(self.device, non_blocking=True)

    def _part(self, batches: list[MicroBatch]) -> Part | None:
        if not batches:
            return None
        residents = []
        for batch in batches:  # Move it to the end: the dict is in the order of use.
            resident = self._residents[batch.stream] = self._residents.pop(batch.stream)
            residents.append(resident)
        headers = [resident.header for resident in residents]
        counts = torch.tensor([len(batch.frames) for batch in batches])
        stream = torch.arange(len(batches)).repeat_interleave(counts)
        asked = [self._asks(batch, header) for batch, header in zip(batches, headers, strict=True)]
        by_source = torch.tensor([batch.answer == "source" for batch in batches])
        shadow = torch.tensor(asked).index_select(0, stream).nonzero().flatten()
        others = [
            row
            for row, batch in enumerate(batches)
            if batch.answer != "adapted" and not (asked[row] and batch.answer == "source")
        ]
        return Part(
            batches,
            residents,
            headers,
            self._there(stream),
            self._there(counts),
            take(self._state, self._index([resident.slot for resident in residents])),
            self._fixed(batches, residents, stream, others) if others else None,
            self._there(shadow),
            self._there(by_source.index_select(0, stream.index_select(0, shadow)).nonzero().flatten()),
            self._known(batches, residents, headers),
            self._keeps and not all(batch.fold for batch in batches),
        )

    def _known(self, batches: list[MicroBatch], residents: list[Resident], headers: list[StreamHeader]) -> Known | None:
        """The kept outputs of held frames. They are removed from the residents, as they are used once."""
        found = known(batches, [resident.seen for resident in residents], headers)
        for resident in residents:
            resident.seen = None
        return None if found is None else Known(self._there(found.places), found.output)

    def _asks(self, batch: MicroBatch, header: StreamHeader) -> bool:
        """Whether source is asked about a micro-batch, all frames of it.

        It is for every so many micro-batches of a stream, counted by its events, so that a step that is repeated after
        a crash asks the same; for all while the guard watches the stream, and where source answers anyway.
        """
        if not self._shadow_every or self._hurries(batch):
            return False
        # Shifted by the name, so that streams that began together do not all ask in the same pass.
        turn = header.events + zlib.crc32(batch.stream.encode())
        return batch.answer == "source" or watched(header.guard, header.proxies) or turn % self._shadow_every == 0

    def _fixed(self, batches: list[MicroBatch], residents: list[Resident], stream: Tensor, rows: list[int]) -> Fixed:
        """The frames of the micro-batches `rows`, and the parameters that answer them: approved ones, or source's where
        source is not asked anyway."""
        place = torch.full((len(batches),), -1)
        place[rows] = torch.arange(len(rows))
        place = place.index_select(0, stream)
        frames = (place >= 0).nonzero().flatten()
        own = [_answering(batches[row], residents[row], self.source) for row in rows]
        parameters = {name: self._there(torch.stack([state[name] for state in own])) for name in self.source}
        return Fixed(self._there(frames), self._there(place.index_select(0, frames)), parameters)

    def _frames(self, part: Part) -> tuple[Tensor, list[Look]]:
        """The model's input; and for each micro-batch its frames' checksums and the share of blank ones."""
        pixels = [frame.pixels for batch in part.batches for frame in batch.frames]
        stacked = np.stack(pixels)
        blank = blank_frames(stacked)
        checksums = [zlib.crc32(one) for one in stacked]
        looks, start = [], 0
        for batch in part.batches:
            end = start + len(batch.frames)
            looks.append((checksums[start:end], float(blank[start:end].mean())))
            start = end
        return normalise_pixels(stacked, self.bundle.manifest.preprocess, self.device), looks


def _answering(batch: MicroBatch, resident: Resident, source: State) -> State:
    if batch.answer == "approved" and resident.approved is not None:
        return resident.approved
    return source
