"""MGTTA as published, for comparison: the paper's two inputs, memory and loss, without safeguards.

Source: Deng et al., "Learning to Generate Gradients for Test-Time Adaptation via Test-Time Training Layers", AAAI 2025,
arXiv 2412.16901. `reference_bias` reproduces an error of the public implementation, which divides the moments of step t
by 1 - b^(t+1) where Adam divides by 1 - b^t. A micro-batch of one frame has no unbiased deviation, and gives NaN as in
that implementation. Sites should run `meta.mgg`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from meta.generator import MetaGradientGenerator
from meta.method import Forward, State, Update, where_seen
from meta.norms import AdaptableModel
from meta.objective import SourceStatistics, entropy, per_stream_mean, per_stream_sum

FIRST_DECAY, SECOND_DECAY, EPSILON = 0.9, 0.99, 1e-8
DISCREPANCY_WEIGHT, DISCREPANCY_SCALE = 0.4, 64.0


class PaperSettings(BaseModel):
    """The method's hyperparameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden: int = Field(default=8, ge=2, le=64)
    step_size: float = Field(default=1e-3, gt=0, description="alpha at test time")
    reference_bias: bool = Field(
        default=True, description="the bias correction of the public code, which is off by one step"
    )


def generate(
    generator: MetaGradientGenerator, state: State, gradient: Tensor, step_size: float, reference_bias: bool
) -> tuple[State, Tensor]:
    """One update from the gradient (S, P): new affine, moments, memory and age; and the generated gradient (S, P)."""
    age = state["age"] + 1
    first = FIRST_DECAY * state["first_moment"] + (1 - FIRST_DECAY) * gradient
    second = SECOND_DECAY * state["second_moment"] + (1 - SECOND_DECAY) * gradient**2
    steps = (age + reference_bias).unsqueeze(1)
    root = (second / (1 - SECOND_DECAY**steps)).sqrt() + EPSILON
    inputs = torch.stack([first / (1 - FIRST_DECAY**steps) / root, gradient / root], 1)
    generated, weight, bias = generator(inputs, state["memory_weight"], state["memory_bias"])
    after = {
        "affine": state["affine"] - step_size * generated,
        "first_moment": first,
        "second_moment": second,
        "memory_weight": weight,
        "memory_bias": bias,
        "age": age,
    }
    return after, generated


class PaperMGG:
    """The published method; in the benchmark `mgg` with variant `paper`."""

    def __init__(
        self,
        model: AdaptableModel,
        source: SourceStatistics,
        generator: MetaGradientGenerator,
        settings: PaperSettings | None = None,
    ) -> None:
        self.model, self.source, self.generator = model, source, generator
        self.settings = settings or PaperSettings(hidden=generator.memory.hidden)
        self.step_size = self.settings.step_size

    def for_site(self, step_scale: float) -> PaperMGG:
        """The same method with its step size multiplied."""
        site = copy.copy(self)
        site.step_size = self.step_size * step_scale
        return site

    def fresh(self, streams: int) -> State:
        """Affine (S, P), moments (S, P), memory (S, h, h, P) and (S, h, P), age (S)."""
        return {name: tensor.detach() for name, tensor in self.initial(streams).items()}

    def initial(self, streams: int) -> State:
        """As `fresh`, but differentiable in the initial memory, which is learned."""
        size, device = self.model.coordinates, self.model.device
        weight, bias = self.generator.memory.fresh(streams, size)
        return {
            "affine": self.model.source_affine.expand(streams, -1).clone(),
            "first_moment": torch.zeros(streams, size, device=device),
            "second_moment": torch.zeros(streams, size, device=device),
            "memory_weight": weight.clone(memory_format=torch.contiguous_format),
            "memory_bias": bias.clone(memory_format=torch.contiguous_format),
            "age": torch.zeros(streams, device=device),
        }

    def predict(self, frames: Tensor, stream: Tensor, state: State) -> Forward:
        rows = state["affine"].detach().index_select(0, stream).requires_grad_()
        counts = torch.bincount(stream, minlength=len(state["affine"])).float()
        with torch.enable_grad():
            logits, features = self.model.forward_with_features(frames, rows)
        return Forward(logits, features, rows, stream, counts, state)

    def observe(self, forward: Forward) -> State:
        return forward.state

    def loss(self, forward: Forward) -> Tensor:
        """Entropy plus 0.4 / 64 times the squared differences of feature means and unbiased deviations: (S,)."""
        stream, counts = forward.stream, forward.counts
        with torch.enable_grad():
            mean = per_stream_mean(forward.features, stream, counts)
            centred = forward.features - mean.index_select(0, stream)
            spread = per_stream_mean(centred**2, stream, counts)
            std = (spread * (counts / (counts - 1)).unsqueeze(1)).sqrt()
            apart = ((std - self.source.std) ** 2).sum(1) + ((mean - self.source.mean) ** 2).sum(1)
            mean_entropy = per_stream_mean(entropy(forward.logits), stream, counts)
            return mean_entropy + DISCREPANCY_WEIGHT * apart / DISCREPANCY_SCALE

    def gradient(self, forward: Forward) -> tuple[Tensor, Tensor]:
        """The loss (S,) and its gradient (S, P)."""
        loss = self.loss(forward)
        (frame_gradient,) = torch.autograd.grad(loss.sum(), [forward.rows])
        return loss.detach(), per_stream_sum(frame_gradient, forward.stream, len(forward.counts))

    def update(self, forward: Forward) -> Update:
        loss, gradient = self.gradient(forward)
        with torch.no_grad():
            after, generated = generate(
                self.generator, forward.state, gradient, self.step_size, self.settings.reference_bias
            )
            signals = {
                "loss": loss,
                "entropy": per_stream_mean(entropy(forward.logits), forward.stream, forward.counts),
                "raw_gradient_norm": gradient.norm(dim=1),
                "generated_gradient_norm": generated.norm(dim=1),
                "cosine": torch.cosine_similarity(gradient, generated, dim=1),
                "source_distance": (after["affine"] - self.model.source_affine).norm(dim=1),
                "frames": forward.counts,
            }
        return Update(where_seen(forward, after), signals)


def meta_train_paper(
    method: PaperMGG,
    batches: Sequence[Tensor],
    check: Callable[[PaperMGG], float],
    epochs: int = 40,
    learning_rate: float = 1e-2,
    inner_step_size: float = 1e-4,
    say: Callable[[str], None] = print,
) -> None:
    """The paper's meta-training, in place: it lowers each batch's unlabelled loss through the update before that batch.

    batches: standardised frames (b, ch, h, w); in the paper 64 batches of two frames from four corruptions
    check: returns an accuracy, by which the best epoch is kept

    The memory is detached at every step (one-step truncation).
    """
    optimizer = torch.optim.Adam(method.generator.parameters(), lr=learning_rate)
    best, kept = -1.0, copy.deepcopy(method.generator.state_dict())
    for epoch in range(epochs):
        state = method.initial(1)
        for number, frames in enumerate(batches):
            forward = method.predict(frames, torch.zeros(len(frames), dtype=torch.long), state)
            _, gradient = method.gradient(forward)
            if number:
                # d loss / d generator = d loss / d affine * d affine / d generator, the first factor held constant.
                optimizer.zero_grad()
                (gradient * state["affine"]).sum().backward()
                optimizer.step()
            held = {name: tensor.detach() for name, tensor in state.items()}
            if number == 0:
                held |= {name: t for name, t in method.initial(1).items() if name.startswith("memory_")}
            state, _ = generate(method.generator, held, gradient, inner_step_size, method.settings.reference_bias)
        found = check(method)
        if found > best:
            best, kept = found, copy.deepcopy(method.generator.state_dict())
        say(f"paper generator: epoch {epoch + 1}/{epochs}, accuracy {found:.3f}, best {best:.3f}")
    method.generator.load_state_dict(kept)
