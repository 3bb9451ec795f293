"""The meta-learned parameters of the generator, and the settings that are not learned."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from meta.generator import Anchor, RuleWeights, UpdateRule
from meta.inputs import ALL_INPUTS, Input
from meta.norms import AdaptableModel

# These settings make a trained generator more cautious. They are at their defaults during training.
AFTER_TRAINING = ("dose_shift", "correction_start", "correction_slope")


class GeneratorSettings(BaseModel):
    """The generator's hyperparameters, which are stored in the bundle."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: tuple[Input, ...] = Field(default=ALL_INPUTS, min_length=1)
    hidden: int = Field(default=4, ge=2, le=64)
    anchor_rank: int = Field(default=16, ge=0, le=512, description="0: no anchor, the generator serves any model")
    step_size: float = Field(
        default=0.002, gt=0, le=1, description="initial value; for gradients in units of gradient_scale"
    )
    step_limit: float = Field(
        default=0.05, gt=0, le=1, description="largest change of a coordinate by the gradient in one update"
    )
    push_limit: float = Field(default=0.02, ge=0, le=1, description="largest change by the push")
    momentum_decay: float = Field(default=0.9, ge=0, lt=1)
    square_decay: float = Field(default=0.99, ge=0, lt=1)
    entropy_weight: float = Field(default=1.0, ge=0)
    discrepancy_weight: float = Field(default=10.0, ge=0)
    feature_window: int = Field(default=32, ge=1, description="frames over which feature statistics are averaged")
    norm_window: int = Field(
        default=256, ge=1, description="frames over which BatchNorm moments are averaged: longer than runs of a class"
    )
    class_share: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="weight of a stream's class mix in its expected features; the rest is an even mix",
    )
    class_filter: bool = Field(default=True, description="filter predictions by those of neighbouring frames")
    dose_shift: float = Field(
        default=0.0, description="added to the dose's learned bias after training; negative values lower the dose"
    )
    correction_start: float = Field(
        default=1.0, description="strength of the correction of single frames at a dose of 0, clipped to [0, 1]"
    )
    correction_slope: float = Field(default=0.0, ge=0, description="increase of that strength per unit of dose")
    memory_precision: Literal["float32", "float16", "bfloat16"] = Field(
        default="float16", description="of the gradient memory between updates, in RAM and in the store"
    )

    def in_training(self) -> GeneratorSettings:
        """The settings with those of AFTER_TRAINING at their defaults."""
        return self.model_copy(update={name: type(self).model_fields[name].default for name in AFTER_TRAINING})


class LearnedWeights(NamedTuple):
    """The learned weights in the form in which an update uses them.

    rule: of the update rule; rate (): learned step size / `step_limit`; dose_bias (): with `dose_shift`.
    """

    rule: RuleWeights
    rate: Tensor
    dose_bias: Tensor


class LearnedOptimizer(nn.Module):
    """All meta-learned parameters: the update rule, which serves any model, and the anchor, which serves one.

    `gradient_scale` is the root mean square of a coordinate's gradient in this model, measured before training.
    """

    gradient_scale: Tensor

    def __init__(self, settings: GeneratorSettings, model: AdaptableModel) -> None:
        super().__init__()
        features = model.feature_count + model.layers[0].feature_count
        self.settings = settings
        self.rule = UpdateRule(len(settings.inputs), settings.hidden)
        self.rate = nn.Parameter(torch.tensor(math.log(settings.step_size)))
        self.anchor = Anchor(features, model.coordinates, settings.anchor_rank) if settings.anchor_rank else None
        # Weights of log novelty, log discrepancy and entropy. The dose starts near 1.
        self.dose_weight = nn.Parameter(torch.tensor([0.5, 0.0, 0.0]))
        self.dose_bias = nn.Parameter(torch.tensor(4.0))
        self.register_buffer("gradient_scale", torch.tensor(1.0))

    def weights(self) -> LearnedWeights:
        """The weights for an update, from the present parameters; differentiable."""
        rate = self.rate.exp() / self.settings.step_limit
        return LearnedWeights(self.rule.weights(), rate, self.dose_bias + self.settings.dose_shift)


def transplant(learned: LearnedOptimizer, model: AdaptableModel) -> LearnedOptimizer:
    """The rule for another source model, without the anchor, which is specific to its model.

    `gradient_scale` must be measured for the new model afterwards (`meta.train.measure_gradient`).
    """
    moved = LearnedOptimizer(learned.settings.model_copy(update={"anchor_rank": 0}), model)
    own = {name: t for name, t in learned.state_dict().items() if not name.startswith("anchor.")}
    moved.load_state_dict(own)
    for parameter in moved.parameters():
        parameter.requires_grad_(False)
    return moved.eval()
