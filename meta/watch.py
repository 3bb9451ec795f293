"""Streams whose truth is known, seen as a worker sees them: for calibration, and to measure what it promised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from meta.estimator import AccuracyModel, Table
from meta.method import Method, State
from meta.mgg import as_served
from meta.objective import per_stream_mean
from meta.proxies import SIGNALS, WINDOW, Observer, fold
from meta.shifts import Shift
from meta.simulate import SimulatedStream
from meta.train import Preprocessing, draw
from schemas.state import RunningProxies

FRAMES = 16  # of a micro-batch
SHADOW_EVERY, YOUNG = 16, 256  # as in a worker: source answers every sixteenth micro-batch, and all of a young stream
REPEATS = (1, 1, 2, 2, 1, 4)  # frames in which a camera sees the same item
WINDOW_STEPS = WINDOW // FRAMES


@dataclass
class Watched:
    """Micro-batch by micro-batch: what was known of each stream after it, and what was true.

    `truth` (S, 2): running accuracies, weighted as the signals are; `halves` (S, 2): of the adapted answers to every
    other item, and to the rest. `visits` (S,) count what has happened to each camera so far. answers and plain
    (S x b, K): the adapted answers' and source's logits; labels (S x b,); signals (S,) of the updates.
    """

    proxies: list[list[RunningProxies]] = field(default_factory=list)
    truth: list[np.ndarray] = field(default_factory=list)
    halves: list[np.ndarray] = field(default_factory=list)
    visits: list[np.ndarray] = field(default_factory=list)
    answers: list[Tensor] = field(default_factory=list)
    plain: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    signals: list[State] = field(default_factory=list)

    def table(self, names: Sequence[str] = SIGNALS, every: int = WINDOW_STEPS) -> Table:
        """Every so many micro-batches of every stream, once a window is full."""
        moments = range(every - 1, len(self.truth), every)
        rows = [[one.signals.get(name, np.nan) for name in names] for t in moments for one in self.proxies[t]]
        return Table(np.array(rows, float), self.at(self.truth, every))

    @staticmethod
    def at(values: Sequence[np.ndarray], every: int = WINDOW_STEPS) -> np.ndarray:
        """Of these, moment by moment, those that belong to the rows of `table`."""
        return np.concatenate(values[every - 1 :: every])


def cameras(
    images: Tensor,
    labels: Tensor,
    shifts: dict[str, Shift],
    count: int,
    random: torch.Generator,
    strength: float = 1.0,
) -> list[SimulatedStream]:
    """Cameras of a line: items pass in one frame, two or four, moved a little, under shifts that come and go."""
    repeats = [REPEATS[i % len(REPEATS)] for i in range(count)]
    return [SimulatedStream(images, labels, shifts, random, repeat, strength) for repeat in repeats]


def watch(
    method: Method,
    observer: Observer,
    streams: list[SimulatedStream],
    preprocessing: Preprocessing,
    steps: int,
    adapt: bool,
    model: AccuracyModel | None = None,
    wanted: Callable[[], bool] = lambda: True,
) -> Watched:
    """Run `steps` micro-batches of every stream, with updates or without; as long as they are `wanted`."""
    state = {name: tensor.detach() for name, tensor in method.fresh(len(streams)).items()}
    # As in a worker: where there will be no update, nothing is kept for one.
    seen, predict = Watched(), as_served(method) if adapt else method.predict
    proxies = [RunningProxies() for _ in streams]
    truth, halves, visits = np.zeros((len(streams), 2)), np.zeros((len(streams), 2)), np.zeros(len(streams), int)
    other_half = torch.cat([torch.arange(FRAMES) // camera.repeat % 2 for camera in streams])
    for step in range(steps):
        if not wanted():
            break
        for place, camera in enumerate(streams):
            if camera.over:
                camera.begin()
                visits[place] += 1
        frames, labels, stream = draw(streams, FRAMES, preprocessing)
        with torch.inference_mode(not adapt):
            forward = predict(frames, stream, state)
        asked = (stream + step) % (1 if step * FRAMES < YOUNG else SHADOW_EVERY) == 0
        chosen = asked.nonzero().flatten()
        observed, _ = observer.observe(frames, forward, chosen)
        signals: State = {}
        if adapt:
            update = method.update(forward)
            state, signals = update.state, update.signals
        else:
            state = method.observe(forward)
        state = {name: tensor.detach() for name, tensor in state.items()}
        with torch.inference_mode():
            plain = observer.model(frames)
        weight = 1 / min(step + 1, WINDOW_STEPS)
        hits = torch.stack([forward.answer.argmax(1) == labels, plain.argmax(1) == labels], 1).float()
        truth = truth + weight * (per_stream_mean(hits, stream, forward.counts).numpy() - truth)
        own = hits[:, 0].split(FRAMES), other_half.split(FRAMES)
        parts = [[float(right[half == i].mean()) for i in (0, 1)] for right, half in zip(*own, strict=True)]
        halves = halves + weight * (np.array(parts) - halves)
        rows = [{name: float(values[i]) for name, values in signals.items()} for i in range(len(streams))]
        proxies = [fold(before, one, row, model) for before, one, row in zip(proxies, observed, rows, strict=True)]
        seen.proxies.append(proxies)
        seen.truth.append(truth)
        seen.halves.append(halves)
        seen.visits.append(visits.copy())
        seen.answers.append(forward.answer)
        seen.plain.append(plain.clone())
        seen.labels.append(labels)
        if signals:
            seen.signals.append({name: values.detach() for name, values in signals.items()})
    return seen
