"""Meta-training: train the generator to lower the loss on the frames after each update.

The updates use no labels, and take the gradient from a part of the frames, as at a site. The meta-objective uses
labels, which exist at the centre, or else the updates' own objective. Gradients of the source model are treated as
constants, as is usual for learned optimizers. So an unrolled step costs one forward and two backward passes through the
model, and back-propagation through time runs over the generator alone.

Several source models can train one rule. Each has its own streams, statistics and anchor; they take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor

from meta.method import State
from meta.mgg import GRADIENT_SHARE, MGG
from meta.objective import per_stream_mean, per_stream_sum
from meta.shifts import TUNING
from meta.simulate import SimulatedStream
from meta.source import Preprocessing


class TrainingSettings(BaseModel):
    """Options of meta-training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    meta_steps: int = Field(
        default=600, ge=0, description="steps of the meta-optimizer; 0: the generator stays as it is"
    )
    unroll: int = Field(default=10, ge=2, description="updates per step of the meta-optimizer")
    streams: int = Field(default=16, ge=1, description="simulated cameras in each pass")
    batches: tuple[PositiveInt, ...] = Field(
        default=(1, 4, 8, 16, 16), min_length=1, description="sizes of micro-batches, drawn at random for each unroll"
    )
    objective: Literal["labelled", "unlabelled"] = Field(
        default="labelled", description="the meta-objective: cross-entropy, or the updates' own objective"
    )
    learning_rate: float = Field(default=3e-3, gt=0)
    gradient_share: int = Field(
        default=GRADIENT_SHARE,
        ge=1,
        description="every n-th frame gives an update its gradient; sites have the default",
    )
    seed: int = 0


class Problem:
    """A task of meta-training: one source model with its method, its images and its simulated cameras."""

    def __init__(
        self,
        method: MGG,
        images: Tensor,
        labels: Tensor,
        preprocessing: Preprocessing,
        settings: TrainingSettings,
        random: torch.Generator,
    ) -> None:
        self.method, self.preprocessing, self.random = method, preprocessing, random
        self.cameras = [SimulatedStream(images, labels, TUNING, random) for _ in range(settings.streams)]
        method.learned.gradient_scale.fill_(measure_gradient(method, self.cameras, preprocessing))
        self.state = method.initial(settings.streams)

    def detach(self) -> None:
        """Detach the state from the graph of the previous unroll."""
        self.state = {name: tensor.detach() for name, tensor in self.state.items()}

    def restart_finished(self) -> None:
        """Start a new episode where one has ended: half of them from a fresh state, half from the state at the end."""
        finished = [i for i, camera in enumerate(self.cameras) if camera.over]
        cold = [i for i in finished if float(torch.rand((), generator=self.random)) < 0.5]
        for i in finished:
            self.cameras[i].begin()
        fresh = self.method.initial(len(self.cameras))
        reset = torch.zeros(len(self.cameras), dtype=torch.bool)
        reset[cold] = True
        # Fresh rows stay attached to the initial memory, which is learned, too.
        self.state = {
            name: torch.where(reset.view(-1, *[1] * (tensor.dim() - 1)), fresh[name], tensor)
            for name, tensor in self.state.items()
        }


def meta_train(problems: Sequence[Problem], settings: TrainingSettings, say: Callable[[str], None]) -> list[float]:
    """Train the generators of all problems in place; they may share modules. Returns the accuracy of each unroll.

    Deterministic for a seed on one machine.
    """
    if not settings.meta_steps:
        return []
    torch.manual_seed(settings.seed)
    random = torch.Generator().manual_seed(settings.seed)
    parameters = list({id(p): p for problem in problems for p in problem.method.learned.parameters()}.values())
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.meta_steps, settings.learning_rate / 20)
    course: list[float] = []
    started, every = time.monotonic(), max(1, settings.meta_steps // 20)
    for meta_step in range(settings.meta_steps):
        problem = problems[meta_step % len(problems)]
        problem.restart_finished()
        frames = settings.batches[int(torch.randint(len(settings.batches), (), generator=random))]
        objective, accuracy = _unroll(problem, frames, settings)
        optimizer.zero_grad()
        objective.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if torch.isfinite(norm):
            optimizer.step()
        schedule.step()
        problem.detach()
        course.append(accuracy)
        if (meta_step + 1) % every == 0:
            recent = sum(course[-every:]) / every
            left = (time.monotonic() - started) / (meta_step + 1) * (settings.meta_steps - meta_step - 1)
            say(f"generator: step {meta_step + 1}/{settings.meta_steps}, accuracy {recent:.3f}, {left:.0f} s left")
    return course


def draw(cameras: list[SimulatedStream], frames: int, preprocessing: Preprocessing) -> tuple[Tensor, Tensor, Tensor]:
    """The next micro-batch of every camera: standardised frames (B, ch, h, w), labels (B,) and stream (B,)."""
    drawn = [camera.next(frames) for camera in cameras]
    images = torch.cat([images for images, _ in drawn])
    labels = torch.cat([labels for _, labels in drawn])
    stream = torch.arange(len(cameras)).repeat_interleave(frames)
    return preprocessing.frames(images), labels, stream


def _unroll(problem: Problem, frames: int, settings: TrainingSettings) -> tuple[Tensor, float]:
    """Unroll a few updates. Returns the meta-objective and the accuracy of the predictions.

    The meta-objective is linear in the affines, with the losses' gradients as constant coefficients: its gradient is
    that of the sum of the losses. The first affine does not depend on the updates, so the first loss has no part in it.
    """
    method, cameras = problem.method.with_gradient_share(settings.gradient_share), problem.cameras
    objective = torch.zeros(())
    right = 0
    for _ in range(settings.unroll):
        batch, labels, stream = draw(cameras, frames, problem.preprocessing)
        forward = method.predict(batch, stream, problem.state)
        right += int((forward.logits.argmax(1) == labels).sum())
        part, chosen = method.subsampled(forward)
        slope, statistics, signals = method.gradient(part, retain_graph=True, whole=forward)
        frame_gradient = slope.index_select(0, chosen)
        if settings.objective == "labelled":
            each = F.cross_entropy(forward.logits, labels, reduction="none")
            labelled = per_stream_mean(each, stream, forward.counts).sum()
            (slope,) = torch.autograd.grad(labelled, [forward.rows])
        affine = problem.state["affine"]
        per_stream = per_stream_sum(slope, stream, len(cameras))
        objective = objective + (per_stream.detach() * affine).sum() / len(cameras)
        problem.state = method.generate(part, frame_gradient, statistics, signals).state
    return objective / settings.unroll, right / (settings.unroll * frames * len(cameras))


def measure_gradient(method: MGG, cameras: list[SimulatedStream], preprocessing: Preprocessing) -> float:
    """The root mean square of a coordinate's gradient at the source affine, over streams with and without a shift.

    Gradients in this unit have the same size in all models, so that one rule can serve them.
    """
    state: State = method.fresh(len(cameras))
    squares = []
    for _ in range(8):
        batch, _, stream = draw(cameras, 8, preprocessing)
        forward = method.predict(batch, stream, state)
        frame_gradient, _, _ = method.gradient(forward)
        gradient = per_stream_sum(frame_gradient, stream, len(cameras))
        squares.append(float((gradient**2).mean()))
    for camera in cameras:
        camera.begin()
    return max(1e-8, sum(squares) / len(squares)) ** 0.5
