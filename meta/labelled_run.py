"""Simulated streams with known labels, run and observed as in a worker: for calibration, and to measure it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from meta.estimator import AccuracyModel, Table
from meta.method import Method, State
from meta.mgg import as_served
from meta.proxies import SIGNALS, WINDOW, Observer, fold
from meta.shifts import Shift
from meta.simulate import SimulatedStream
from meta.source import Preprocessing
from meta.train import draw
from schemas.state import RunningProxies

FRAMES = 16  # per micro-batch
SHADOW_EVERY, YOUNG = (
    16,
    256,
)  # As in a worker, source predicts every 16th micro-batch, and all of the first 256 frames.
REPEATS = (1, 1, 2, 2, 1, 4)  # frames in a row that show the same item, camera by camera
WINDOW_STEPS = WINDOW // FRAMES


@dataclass
class LabelledRun:
    """The course of S streams: an entry for each micro-batch of b frames.

    proxies: of each stream, after the micro-batch
    truth (S, 2): running accuracy of the adapted and the source model, with the weights of the signals
    halves (S, 2): running accuracy of the adapted model on every other item, and on the rest
    visits (S,): number of the camera's episode
    answers, plain (S x b, K): logits of the adapted and the source model
    labels (S x b,)
    signals (S,): of the update; no entries without updates
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
        """A row for each stream at every `every`-th micro-batch, from the first that completes a window."""
        moments = range(every - 1, len(self.truth), every)
        rows = [[one.signals.get(name, np.nan) for name in names] for t in moments for one in self.proxies[t]]
        return Table(np.array(rows, float), self.at(self.truth, every))

    @staticmethod
    def at(values: Sequence[np.ndarray], every: int = WINDOW_STEPS) -> np.ndarray:
        """The values that belong to the rows of `table`, from an entry (S, ...) for each micro-batch."""
        return np.concatenate(values[every - 1 :: every])


def cameras(
    images: Tensor,
    labels: Tensor,
    shifts: dict[str, Shift],
    count: int,
    random: torch.Generator,
    strength: float = 1.0,
) -> list[SimulatedStream]:
    """Cameras of a production line: each item shows in one, two or four frames, under shifts that come and go."""
    repeats = [REPEATS[i % len(REPEATS)] for i in range(count)]
    return [SimulatedStream(images, labels, shifts, random, repeat, strength) for repeat in repeats]


def run_labelled(
    method: Method,
    observer: Observer,
    streams: list[SimulatedStream],
    preprocessing: Preprocessing,
    steps: int,
    adapt: bool,
    model: AccuracyModel | None = None,
    wanted: Callable[[], bool] = lambda: True,
) -> LabelledRun:
    """Run `steps` micro-batches of every stream, with or without updates; stop early once `wanted` is false."""
    state = {name: tensor.detach() for name, tensor in method.fresh(len(streams)).items()}
    # As in a worker, which keeps no graph if there will be no update.
    seen, predict = LabelledRun(), as_served(method) if adapt else method.predict
    proxies, truth, visits = [RunningProxies() for _ in streams], _Truth(streams), np.zeros(len(streams), int)
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
        truth.take(torch.stack([forward.answer.argmax(1) == labels, plain.argmax(1) == labels], 1).float())
        rows = [{name: float(values[i]) for name, values in signals.items()} for i in range(len(streams))]
        proxies = [fold(before, one, row, model) for before, one, row in zip(proxies, observed, rows, strict=True)]
        seen.proxies.append(proxies)
        seen.truth.append(truth.lately)
        seen.halves.append(truth.halves)
        seen.visits.append(visits.copy())
        seen.answers.append(forward.answer)
        seen.plain.append(plain.clone())
        seen.labels.append(labels)
        if signals:
            seen.signals.append({name: values.detach() for name, values in signals.items()})
    return seen


class _Truth:
    """Running accuracies: `lately` is `LabelledRun.truth`, `halves` is `LabelledRun.halves`."""

    def __init__(self, streams: list[SimulatedStream]) -> None:
        self.lately, self.halves = np.zeros((len(streams), 2)), np.zeros((len(streams), 2))
        self._half = [torch.arange(FRAMES) // camera.repeat % 2 for camera in streams]
        self._steps = 0

    def take(self, hits: Tensor) -> None:
        """Add a micro-batch of every stream. hits (S x b, 2): whether the adapted and the source model were right."""
        self._steps += 1
        weight = 1 / min(self._steps, WINDOW_STEPS)
        own = hits.split(FRAMES)
        self.lately = self.lately + weight * (torch.stack([part.mean(0) for part in own]).numpy() - self.lately)
        halves = [
            [float(part[half == i, 0].mean()) for i in (0, 1)] for part, half in zip(own, self._half, strict=True)
        ]
        self.halves = self.halves + weight * (np.array(halves) - self.halves)
