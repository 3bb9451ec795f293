"""Meta-training: make the generator lower the labelled loss of the frames that come next.

The updates see no label; only the objective that trains the generator does (labels exist at the centre). Gradients
of the source model are treated as constants, as is usual for learned optimizers, so one unrolled step costs a
forward and two backward passes through the model, and back-propagation through time runs over the generator alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from meta.method import State
from meta.mgg import MGG
from meta.objective import per_stream_mean
from meta.shifts import TUNING
from meta.simulate import SimulatedStream
from meta.source import as_frames


class TrainingSettings(BaseModel):
    """How long and on what the generator is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    meta_steps: int = Field(default=600, ge=1)
    unroll: int = Field(default=10, ge=2, description="updates between two steps of the generator")
    streams: int = Field(default=16, ge=1, description="simulated cameras that run side by side")
    batches: tuple[int, ...] = Field(default=(1, 4, 8, 16, 16), description="sizes of a micro-batch to draw from")
    learning_rate: float = Field(default=3e-3, gt=0)
    seed: int = 0


@dataclass
class Preprocessing:
    """Per-channel mean and standard deviation of images in [0, 1], each (ch,)."""

    mean: Tensor
    std: Tensor


def meta_train(
    method: MGG,
    images: Tensor,
    labels: Tensor,
    preprocessing: Preprocessing,
    settings: TrainingSettings,
    say: Callable[[str], None] = print,
) -> list[dict[str, float]]:
    """Train `method.learned` in place on images uint8 (N, ch, h, w) with labels (N,); returns its course."""
    torch.manual_seed(settings.seed)
    random = torch.Generator().manual_seed(settings.seed)
    streams = [SimulatedStream(images, labels, TUNING, random) for _ in range(settings.streams)]
    learned = method.learned.train()
    optimizer = torch.optim.Adam(learned.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.meta_steps, settings.learning_rate / 20)
    state = method.initial(settings.streams)
    course: list[dict[str, float]] = []
    for meta_step in range(settings.meta_steps):
        state = _restart_finished(method, streams, state)
        frames = settings.batches[int(torch.randint(len(settings.batches), (), generator=random))]
        objective, record, state = _unroll(method, streams, state, frames, preprocessing, settings.unroll)
        optimizer.zero_grad()
        objective.backward()
        norm = torch.nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        if torch.isfinite(norm):
            optimizer.step()
        schedule.step()
        state = {name: tensor.detach() for name, tensor in state.items()}
        course.append(record)
        if (meta_step + 1) % max(1, settings.meta_steps // 20) == 0:
            recent = course[-max(1, settings.meta_steps // 20) :]
            mean = {key: sum(r[key] for r in recent) / len(recent) for key in record}
            say(
                f"generator: step {meta_step + 1}/{settings.meta_steps}, "
                f"accuracy {mean['accuracy']:.3f}, source {mean['source_accuracy']:.3f}, "
                f"pull {float(learned.pull.detach()):.4f}"
            )
    learned.eval()
    return course


def draw(streams: list[SimulatedStream], frames: int, preprocessing: Preprocessing) -> tuple[Tensor, Tensor, Tensor]:
    """The next micro-batch of every stream: standardised frames, labels and stream index."""
    drawn = [stream.next(frames) for stream in streams]
    images = torch.cat([images for images, _ in drawn])
    labels = torch.cat([labels for _, labels in drawn])
    stream = torch.arange(len(streams)).repeat_interleave(frames)
    return as_frames(images, preprocessing.mean, preprocessing.std), labels, stream


def _unroll(
    method: MGG,
    streams: list[SimulatedStream],
    state: State,
    frames: int,
    preprocessing: Preprocessing,
    steps: int,
) -> tuple[Tensor, dict[str, float], State]:
    """A few updates in a row. The objective's gradient is that of the labelled loss at every step after the first."""
    objective = torch.zeros(())
    right = source_right = 0
    for _ in range(steps):
        batch, labels, stream = draw(streams, frames, preprocessing)
        with torch.inference_mode():
            source_right += int((method.model(batch).argmax(1) == labels).sum())
        forward = method.predict(batch, stream, state)
        right += int((forward.logits.argmax(1) == labels).sum())
        labelled = per_stream_mean(
            F.cross_entropy(forward.logits, labels, reduction="none"), stream, forward.counts
        ).sum()
        (slope,) = torch.autograd.grad(labelled, [forward.rows], retain_graph=True)
        per_stream = torch.zeros_like(state["affine"]).index_add(0, stream, slope)
        objective = objective + (per_stream.detach() * state["affine"]).sum() / len(streams)
        loss, statistics, signals = method.objective(forward)
        (frame_gradient,) = torch.autograd.grad(loss.sum(), [forward.rows])
        state = method.generate(forward, frame_gradient, statistics, signals).state
    seen = steps * frames * len(streams)
    return objective / steps, {"accuracy": right / seen, "source_accuracy": source_right / seen}, state


def _restart_finished(method: MGG, streams: list[SimulatedStream], state: State) -> State:
    """Begin new episodes; half of them from a cold start, half with the state of the last."""
    finished = [i for i, stream in enumerate(streams) if stream.over]
    cold = [i for i in finished if streams[i]._number(0, 1) < 0.5]
    for i in finished:
        streams[i].begin()
    fresh = method.initial(len(streams))
    reset = torch.zeros(len(streams), dtype=torch.bool)
    reset[cold] = True
    # Fresh rows stay attached to the learned initial memory, so that it is trained too.
    return {
        name: torch.where(reset.view(-1, *[1] * (tensor.dim() - 1)), fresh[name], tensor)
        for name, tensor in state.items()
    }
