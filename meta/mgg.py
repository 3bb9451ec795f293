"""Adaptation with the meta gradient generator: from a micro-batch of many streams to their next states."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from meta.generator import MetaGradientGenerator
from meta.method import Forward, State, Update
from meta.norms import AdaptableModel
from meta.objective import SourceStatistics, discrepancy, entropy, per_stream_mean, running

Input = Literal[
    "momentum",
    "gradient",
    "agreement",
    "offset",
    "size",
    "norm",
    "entropy",
    "discrepancy",
    "kind",
    "age",
    "batch",
]
PAPER_INPUTS: tuple[Input, ...] = ("momentum", "gradient")
ALL_INPUTS: tuple[Input, ...] = (
    "momentum",
    "gradient",
    "agreement",
    "offset",
    "size",
    "norm",
    "entropy",
    "discrepancy",
    "kind",
    "age",
    "batch",
)
TINY = 1e-8


class GeneratorSettings(BaseModel):
    """Everything about the generator that is not learned; part of the bundle."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: tuple[Input, ...] = ALL_INPUTS
    hidden: int = Field(default=4, ge=2, le=64)
    shortcut: bool = True
    step_size: float = Field(default=0.02, gt=0, le=1, description="largest change of a coordinate in one update")
    momentum_decay: float = Field(default=0.9, ge=0, lt=1)
    square_decay: float = Field(default=0.99, ge=0, lt=1)
    discrepancy_weight: float = Field(default=10.0, ge=0)
    feature_window: int = Field(default=32, ge=1, description="frames over which feature statistics are averaged")
    memory_precision: Literal["float32", "float16", "bfloat16"] = Field(
        default="float16", description="of the gradient memory between updates, in memory and in the store alike"
    )


class LearnedOptimizer(nn.Module):
    """The generator with its learned pull towards the source: all that meta-training trains."""

    def __init__(self, settings: GeneratorSettings) -> None:
        super().__init__()
        self.settings = settings
        self.generator = MetaGradientGenerator(len(settings.inputs), settings.hidden, settings.shortcut)
        self.pull_logit = nn.Parameter(torch.tensor(math.log(0.005 / 0.995)))

    @property
    def pull(self) -> Tensor:
        """Share of the distance from source that each update takes back."""
        return torch.sigmoid(self.pull_logit)


class MGG:
    """The method `mgg`: state = affine, two moments, gradient memory, feature statistics, age."""

    def __init__(
        self, model: AdaptableModel, source: SourceStatistics, learned: LearnedOptimizer, classes: int
    ) -> None:
        self.model, self.source, self.learned = model, source, learned
        self.settings = learned.settings
        self.classes = classes
        self.kind = 2 * model.is_scale - 1
        self.step_size = self.settings.step_size

    def with_step_scale(self, factor: float) -> MGG:
        """The same method with its step size multiplied."""
        scaled = copy.copy(self)
        scaled.step_size = self.settings.step_size * factor
        return scaled

    def fresh(self, streams: int) -> State:
        """State of new streams: affine (S, P), first and second moment (S, P), memory, statistics (S, F), age (S)."""
        with torch.no_grad():
            return self._at_rest(self.initial(streams))

    def _at_rest(self, state: State) -> State:
        """Round the memory to the precision it is kept in. What is stored is so what a worker goes on with."""
        precision = getattr(torch, self.settings.memory_precision)
        return {name: t.to(precision) if name.startswith("memory_") else t for name, t in state.items()}

    def initial(self, streams: int) -> State:
        """As `fresh`, in full precision, and differentiable in the learned initial memory."""
        size = self.model.coordinates
        weight, bias = self.learned.generator.memory.fresh(streams, size)
        return {
            "affine": self.model.source_affine.expand(streams, -1).clone(),
            "first_moment": torch.zeros(streams, size),
            "second_moment": torch.zeros(streams, size),
            "memory_weight": weight.clone(memory_format=torch.contiguous_format),
            "memory_bias": bias.clone(memory_format=torch.contiguous_format),
            "feature_mean": self.source.mean.expand(streams, -1).clone(),
            "feature_square": self.source.square.expand(streams, -1).clone(),
            "age": torch.zeros(streams),
        }

    def predict(self, frames: Tensor, stream: Tensor, state: State) -> Forward:
        rows = state["affine"].detach().index_select(0, stream).requires_grad_()
        with torch.enable_grad():
            logits, features = self.model.forward_with_features(frames, rows)
        counts = torch.bincount(stream, minlength=state["affine"].shape[0]).float()
        return Forward(logits, features, rows, stream, counts, state)

    def update(self, forward: Forward) -> Update:
        loss, statistics, signals = self.objective(forward)
        (frame_gradient,) = torch.autograd.grad(loss.sum(), [forward.rows])
        update = self.generate(forward, frame_gradient, statistics, signals)
        return Update(self._at_rest(update.state), update.signals)

    def objective(self, forward: Forward) -> tuple[Tensor, State, dict[str, Tensor]]:
        """Per-stream loss (S,), the new feature statistics, and the signals entropy and discrepancy."""
        stream, counts, state = forward.stream, forward.counts, forward.state
        window = self.settings.feature_window
        with torch.enable_grad():
            mean_entropy = per_stream_mean(entropy(forward.logits), stream, counts)
            mean = running(state["feature_mean"], per_stream_mean(forward.features, stream, counts), counts, window)
            square = running(
                state["feature_square"], per_stream_mean(forward.features**2, stream, counts), counts, window
            )
            distance = discrepancy(mean, square, self.source)
            loss = mean_entropy + self.settings.discrepancy_weight * distance
        statistics = {"feature_mean": mean.detach(), "feature_square": square.detach()}
        signals = {
            "loss": loss.detach(),
            "entropy": mean_entropy.detach(),
            "discrepancy": distance.detach(),
        }
        return loss, statistics, signals

    def generate(
        self, forward: Forward, frame_gradient: Tensor, statistics: State, signals: dict[str, Tensor]
    ) -> Update:
        """From per-frame gradients (B, P) to the next state, in full precision.

        Differentiable in the learned parameters and the state.
        """
        state, counts = forward.state, forward.counts
        zeros = frame_gradient.new_zeros(state["affine"].shape)
        gradient = zeros.index_add(0, forward.stream, frame_gradient)
        power = zeros.index_add(0, forward.stream, frame_gradient**2)
        age = state["age"] + 1
        first = torch.lerp(gradient, state["first_moment"], self.settings.momentum_decay)
        second = torch.lerp(gradient**2, state["second_moment"], self.settings.square_decay)
        features = self._inputs(forward, gradient, power, first, second, age, signals)
        direction, weight, bias = self.learned.generator(
            features, state["memory_weight"].float(), state["memory_bias"].float()
        )
        offset = state["affine"] - self.model.source_affine
        moved = (1 - self.learned.pull) * offset - self.step_size * direction
        return Update(
            state={
                "affine": self.model.source_affine + moved,
                "first_moment": first,
                "second_moment": second,
                "memory_weight": weight,
                "memory_bias": bias,
                **statistics,
                "age": age,
            },
            signals={
                **signals,
                "raw_gradient_norm": gradient.norm(dim=1),
                "generated_gradient_norm": direction.detach().norm(dim=1),
                "cosine": torch.cosine_similarity(gradient, direction.detach(), dim=1),
                "source_distance": moved.detach().norm(dim=1),
                "frames": counts,
            },
        )

    def _inputs(
        self,
        forward: Forward,
        gradient: Tensor,
        power: Tensor,
        first: Tensor,
        second: Tensor,
        age: Tensor,
        signals: dict[str, Tensor],
    ) -> Tensor:
        """The generator's inputs (S, d, P), in the order of the settings; per-stream ones are spread over P."""
        b1, b2 = self.settings.momentum_decay, self.settings.square_decay
        steps = age.unsqueeze(1)
        root = (second / (1 - b2**steps)).sqrt() + TINY
        counts = forward.counts.unsqueeze(1)

        def spread(values: Tensor) -> Tensor:
            return values.unsqueeze(1).expand_as(gradient)

        made = {
            "momentum": lambda: first / (1 - b1**steps) / root,
            "gradient": lambda: gradient / root,
            # Of the frames' own gradients: +-1 where all agree, near 0 where they cancel out.
            "agreement": lambda: gradient / ((counts * power).sqrt() + TINY),
            "offset": lambda: (5 * (forward.state["affine"] - self.model.source_affine)).clamp(-3, 3),
            "size": lambda: ((gradient.abs() + TINY).log10() + 3).clamp(-3, 3) / 2,
            "norm": lambda: spread((gradient.norm(dim=1) + TINY).log10().clamp(-3, 3)),
            "entropy": lambda: spread(signals["entropy"] / math.log(self.classes)),
            "discrepancy": lambda: spread(torch.log1p(signals["discrepancy"]).clamp(max=5)),
            "kind": lambda: self.kind.expand_as(gradient),
            "age": lambda: spread(age.rsqrt()),
            "batch": lambda: spread(forward.counts.log2() / 6),
        }
        return torch.stack([made[name]() for name in self.settings.inputs], 1)
