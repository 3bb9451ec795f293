"""Run a method over many streams at once, and measure its cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from meta.baselines.own import Oracle
from meta.benchmark.datasets import Pool
from meta.benchmark.streams import Condition, Stream
from meta.method import Method, State, finite_rows
from meta.mgg import as_served, frames_per_update
from meta.source import as_frames, image_tensor

MAX_PASS = 512  # frames of all streams in one pass


@dataclass(frozen=True)
class Frames:
    """The images of a pool under all conditions: `stack` uint8 (conditions, N, h, w[, 3]); labels (N,)."""

    stack: np.ndarray
    place: dict[Condition, int]
    labels: np.ndarray
    mean: Tensor
    std: Tensor

    def codes(self, stream: Stream) -> np.ndarray:
        """The index in `stack` of each frame's condition, (L,)."""
        return np.array([self.place[condition] for condition in stream.conditions])[stream.condition]

    def batch(self, conditions: np.ndarray, images: np.ndarray) -> Tensor:
        """Standardised frames (B, ch, h, w), from indices (B,) of conditions and images."""
        return as_frames(image_tensor(self.stack[conditions, images]).float() / 255, self.mean, self.std)


def load_frames(pool: Pool, conditions: list[Condition], mean: Tensor, std: Tensor) -> Frames:
    """All images of a pool under every condition, in memory as uint8."""
    stack = np.stack([pool.images(*condition) for condition in conditions])
    return Frames(stack, {condition: i for i, condition in enumerate(conditions)}, pool.labels, mean, std)


@dataclass(frozen=True)
class Outcome:
    """For each stream, whether each prediction was right (L,) bool; and the number of updates that were not finite."""

    right: list[np.ndarray]
    refused: int


def run_streams(
    method: Method,
    streams: list[Stream],
    frames: Frames,
    batch: int,
    adapt_every: int = 1,
    advance: Callable[[int], object] = lambda _: None,
    step_sizes: list[float] | None = None,
) -> Outcome:
    """Predict every batch, then update, for many streams in one pass. A stream's result is as if it ran alone.

    A method with a limit of frames per update makes several updates from a batch, as in a worker. An update that is
    not finite is refused, as by the worker's guard. A prediction that is not finite counts as wrong.

    adapt_every: C; the method adapts on the first of every C batches
    advance: is called with numbers of finished frames
    step_sizes: one for each stream, for baselines; None: the method's
    """
    order = sorted(range(len(streams)), key=lambda i: -len(streams[i]))
    right = [np.zeros(len(stream), bool) for stream in streams]
    refused = 0
    batch = frames_per_update(method, batch)
    at_once = max(1, MAX_PASS // batch)
    for start in range(0, len(order), at_once):
        group = order[start : start + at_once]
        own = [streams[i] for i in group]
        state = {name: tensor.detach() for name, tensor in method.fresh(len(own)).items()}
        if step_sizes is not None:
            state["step_size"] = torch.tensor([step_sizes[i] for i in group])
        refused += _run_group(method, own, state, [right[i] for i in group], frames, batch, adapt_every, advance)
    return Outcome(right, refused)


def _run_group(
    method: Method,
    streams: list[Stream],
    state: State,
    right: list[np.ndarray],
    frames: Frames,
    batch: int,
    adapt_every: int,
    advance: Callable[[int], object],
) -> int:
    """Run streams in order of decreasing length: those still running are then the first rows of the state.

    Fills `right`, and returns the number of refused updates.
    """
    codes = [frames.codes(stream) for stream in streams]
    predict, refused = as_served(method), 0
    for turn in range(math.ceil(len(streams[0]) / batch)):
        now = slice(turn * batch, (turn + 1) * batch)
        running = [i for i, stream in enumerate(streams) if len(stream) > now.start]
        if len(running) < len(next(iter(state.values()))):
            state = {name: tensor[: len(running)] for name, tensor in state.items()}
        images = [streams[i].image[now] for i in running]
        sizes = [len(part) for part in images]
        stream = torch.arange(len(running)).repeat_interleave(torch.tensor(sizes))
        seen = frames.batch(np.concatenate([codes[i][now] for i in running]), np.concatenate(images))
        labels = frames.labels[np.concatenate(images)]
        forward = predict(seen, stream, state)
        logits = forward.answer
        hits = (logits.argmax(1).numpy() == labels) & logits.isfinite().all(1).numpy()
        for i, part in zip(running, np.split(hits, np.cumsum(sizes)[:-1]), strict=True):
            right[i][now] = part
        if turn % adapt_every == 0:
            if isinstance(method, Oracle):
                method.labels = torch.from_numpy(labels)
            state, lost = _guarded(method.update(forward).state, state)
            refused += lost
        else:
            state, _ = _guarded(method.observe(forward), state)
        advance(len(hits))
    return refused


def _guarded(new: State, old: State) -> tuple[State, int]:
    """`new`, but with `old` for streams where it is not finite, and the number of these."""
    finite = finite_rows(new)
    new = {name: tensor.detach() for name, tensor in new.items()}
    if bool(finite.all()):
        return new, 0
    rows = {name: finite.view(-1, *[1] * (tensor.dim() - 1)) for name, tensor in new.items()}
    return {name: torch.where(rows[name], new[name], old[name]) for name in new}, int((~finite).sum())


def relative_cost(method: Method, model: torch.nn.Module, frames: Tensor, labels: Tensor) -> float:
    """The processor time of predict and update divided by that of the model's forward pass, for one stream.

    Both are medians of nine measurements in turn. Processor time, because the load of the machine must not decide how
    many batches a method misses.
    """
    parts = frames.split(frames_per_update(method, len(frames)))
    state = {name: tensor.detach() for name, tensor in method.fresh(1).items()}
    plain, adapted, predict = [], [], as_served(method)
    if isinstance(method, Oracle):
        method.labels = labels
    for _ in range(11):
        begin = time.process_time()
        with torch.inference_mode():
            model(frames)
        middle = time.process_time()
        for part in parts:
            method.update(predict(part, torch.zeros(len(part), dtype=torch.long), state))
        plain.append(middle - begin)
        adapted.append(time.process_time() - middle)
    return float(np.median(adapted[2:]) / np.median(plain[2:]))


def source_hits(model: torch.nn.Module, frames: Frames, streams: list[Stream]) -> np.ndarray:
    """Where the source model is right (conditions, N) bool, for every frame that occurs in a stream."""
    needed = np.zeros(frames.stack.shape[:2], bool)
    for stream in streams:
        needed[frames.codes(stream), stream.image] = True
    hits = np.zeros_like(needed)
    conditions, images = np.nonzero(needed)
    for start in range(0, len(images), MAX_PASS):
        some = slice(start, start + MAX_PASS)
        with torch.inference_mode():
            logits = model(frames.batch(conditions[some], images[some]))
        hits[conditions[some], images[some]] = logits.argmax(1).numpy() == frames.labels[images[some]]
    return hits
