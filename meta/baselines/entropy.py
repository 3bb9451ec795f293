"""Baselines that minimise entropy: Tent, EATA, SAR, DeYO."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from meta.baselines.base import (
    Baseline,
    Options,
    Setup,
    Sgd,
    choose,
    frame_keys,
    next_age,
    uniforms,
    weighted_mean,
)
from meta.method import Forward, State, Update
from meta.objective import entropy, per_stream_mean, per_stream_sum


class Tent(Baseline):
    """Entropy of the batch, Adam 1e-3 on scale and shift, BatchNorm with batch statistics.

    Wang et al., "Tent: Fully Test-time Adaptation by Entropy Minimization", ICLR 2021; the settings are those of
    its CIFAR-10-C runs.
    """

    name = "tent"
    published: ClassVar[Options] = {"step_size": 1e-3}

    def loss(self, forward: Forward) -> tuple[Tensor, Tensor, State]:
        counts = forward.counts.clamp_min(1)
        return per_stream_mean(entropy(forward.logits), forward.stream, counts), forward.counts > 0, {}


class Eata(Baseline):
    """Entropy of reliable frames that say something new, weighted, with a Fisher anchor.

    Niu et al., "Efficient Test-Time Model Adaptation without Forgetting", ICML 2022: frames below 0.4 ln C nats whose
    softmax has a cosine below `margin` to the running mean of those used; weights exp(0.4 ln C - H); anchor
    `fisher_weight` x Fisher information, from 2,000 source frames in batches of 64. The cosine margin 0.4 and weight 1
    are those for CIFAR-10 (0.05 and 2,000 for ImageNet). The paper has SGD with momentum 0.9; Adam 1e-3 is what the
    authors of ROID run it with on CIFAR-10-C. Without source frames there is no anchor: the method is then ETA.
    """

    name = "eata"
    published: ClassVar[Options] = {"step_size": 1e-3}
    margin, fisher_weight = 0.4, 1.0

    def __init__(self, setup: Setup, **options: Any) -> None:
        super().__init__(setup, **options)
        self.limit = 0.4 * math.log(self.classes)
        self.fisher = self._fisher()

    def _fisher(self) -> Tensor:
        fisher = torch.zeros_like(self.model.source_affine)
        if self.setup.source_frames is None:
            return fisher
        batches = self.setup.source_frames[:2_000].split(64)
        for frames in batches:
            alone = self.fresh(1)
            forward = self.predict(frames, torch.zeros(len(frames), dtype=torch.long, device=self.device), alone)
            loss = F.cross_entropy(forward.logits, forward.logits.argmax(1))
            (rows,) = torch.autograd.grad(loss, [forward.rows])
            fisher += rows.sum(0) ** 2 / len(batches)
        return fisher

    def memory(self, streams: int) -> State:
        # 0 until a frame was used: all cosines are then 0, so every reliable frame counts as new.
        return {"mean_probability": torch.zeros(streams, self.classes, device=self.device)}

    def loss(self, forward: Forward) -> tuple[Tensor, Tensor, State]:
        stream, streams, old = forward.stream, len(forward.counts), forward.state["mean_probability"]
        surprise = entropy(forward.logits)
        probability = forward.logits.detach().softmax(1)
        cosine = torch.cosine_similarity(old.index_select(0, stream), probability, dim=1)
        used = (surprise.detach() < self.limit) & (cosine.abs() < self.margin)
        loss, count = weighted_mean(surprise, torch.exp(self.limit - surprise.detach()), used, stream, streams)
        anchored = loss + self.fisher_weight * self._drift(forward)
        total = per_stream_sum(probability * used.unsqueeze(1), stream, streams)
        mean = total / count.clamp_min(1).unsqueeze(1)
        first = (old.sum(1) == 0).unsqueeze(1)
        new = torch.where(first, mean, 0.9 * old + 0.1 * mean)
        return anchored, count > 0, choose(count > 0, {"mean_probability": new}, {"mean_probability": old})

    def _drift(self, forward: Forward) -> Tensor:
        """sum_i F_i (theta_i - source_i)^2 of each stream (S,), with a graph to `rows`."""
        share = 1 / forward.counts.clamp_min(1).index_select(0, forward.stream)
        squares = (self.fisher * (forward.rows - self.model.source_affine) ** 2).sum(1) * share
        return per_stream_sum(squares, forward.stream, len(forward.counts))


class Sar(Baseline):
    """Sharpness-aware entropy minimisation on reliable frames, with recovery.

    Niu et al., "Towards Stable Test-Time Adaptation in Dynamic Wild World", ICLR 2023: frames below 0.4 ln C; SAM
    with radius 0.05 over SGD 1e-3, momentum 0.9; a running mean of the loss below e_m resets the stream. e_m is
    0.2 nats for 1,000 classes; it is scaled with ln C here, because in ten classes 0.2 resets at nearly every step.
    The paper leaves the last stage of deep nets alone; our nets have three stages, and all adapt. Its code has 1e-3 for
    a transformer and batches of 64, in proportion to the batch; ResNets have 2.5e-4, and below 32 frames less in
    proportion. Published is 1e-3 here for every net and batch, tuned finds out. A reset also begins the running mean
    anew; in its code the low mean goes on, and resets the model at each update until it has risen. Where no frame is
    reliable nothing moves; in its code the momentum goes on.
    """

    name = "sar"
    published: ClassVar[Options] = {"step_size": 1e-3}
    radius = 0.05

    def __init__(self, setup: Setup, **options: Any) -> None:
        super().__init__(setup, optimizer=Sgd(0.9), **options)
        self.limit = 0.4 * math.log(self.classes)
        self.floor = 0.2 * math.log(self.classes) / math.log(1_000)

    def memory(self, streams: int) -> State:
        # -1: no mean yet
        return {"mean_loss": torch.full((streams,), -1.0, device=self.device)}

    def update(self, forward: Forward) -> Update:
        state, stream, streams = forward.state, forward.stream, len(forward.counts)
        with torch.enable_grad():
            surprise = entropy(forward.logits)
            reliable = surprise.detach() < self.limit
            loss, count = weighted_mean(surprise, torch.ones_like(surprise), reliable, stream, streams)
            (slope,) = torch.autograd.grad(loss.sum(), [forward.rows])
            slope = per_stream_sum(slope, stream, streams)
            climb = self.radius * slope / (slope.norm(dim=1, keepdim=True) + 1e-12)
            sharp = (state["affine"] + climb).detach().requires_grad_()
            second = entropy(self.logits_under(forward.frames, stream, sharp, state))
            chosen = reliable & (second.detach() < self.limit)
            sharp_loss, sharp_count = weighted_mean(second, torch.ones_like(second), chosen, stream, streams)
            (gradient,) = torch.autograd.grad(sharp_loss.sum(), [sharp])
        old, value = state["mean_loss"], sharp_loss.detach()
        mean = torch.where(old < 0, value, 0.9 * old + 0.1 * value)
        mean = torch.where(sharp_count > 0, mean, old)
        update = self.step(forward, loss.detach(), gradient, (count > 0) & (sharp_count > 0), {"mean_loss": mean})
        recover = (mean >= 0) & (mean < self.floor)
        return Update(update.state | choose(recover, self.fresh(streams), update.state), update.signals)


class Deyo(Baseline):
    """Entropy of frames whose label depends on shape: it must suffer when patches are shuffled.

    Lee et al., "Entropy is not Enough for Test-Time Adaptation: From the Perspective of Disentangled Factors", ICLR
    2024: frames below 0.5 ln C whose probability drops by more than 0.2 when a 4x4 grid of patches is shuffled;
    weights exp(0.4 ln C - H) + exp(drop). The paper leaves the last stage of deep nets alone; here all adapt. Its code
    has SGD with momentum 0.9; Adam 1e-3 is what the authors of ROID run it with on CIFAR-10-C.
    """

    name = "deyo"
    published: ClassVar[Options] = {"step_size": 1e-3}
    patches = 4  # along each side

    def __init__(self, setup: Setup, drop: float = 0.2, **options: Any) -> None:
        super().__init__(setup, **options)
        self.limit, self.centre = 0.5 * math.log(self.classes), 0.4 * math.log(self.classes)
        self.drop = drop

    def memory(self, streams: int) -> State:
        return {"age": torch.zeros(streams, device=self.device)}

    def loss(self, forward: Forward) -> tuple[Tensor, Tensor, State]:
        stream, streams, state = forward.stream, len(forward.counts), forward.state
        surprise = entropy(forward.logits)
        first = surprise.detach() < self.limit
        fall = torch.zeros(len(stream), device=self.device)
        if bool(first.any()):
            keys = frame_keys(state, stream)
            shuffled = shuffle_patches(forward.frames[first], self.patches, keys[first])
            with torch.no_grad():
                broken = self.logits_under(shuffled, stream[first], state["affine"], state).softmax(1)
            whole = forward.logits.detach()[first].softmax(1)
            label = whole.argmax(1, keepdim=True)
            fall[first] = (whole.gather(1, label) - broken.gather(1, label)).squeeze(1)
        weights = torch.exp(self.centre - surprise.detach()) + torch.exp(fall)
        loss, count = weighted_mean(surprise, weights, first & (fall > self.drop), stream, streams)
        return loss, count > 0, {"age": next_age(state)}


def shuffle_patches(frames: Tensor, grid: int, keys: Tensor) -> Tensor:
    """Frames (B, ch, h, w) with their grid x grid patches in a random order; `keys` (B,) as in `uniforms`."""
    height, width = frames.shape[2:]
    tall, wide = max(1, height // grid), max(1, width // grid)
    even = frames if (tall * grid, wide * grid) == (height, width) else _resized(frames, tall * grid, wide * grid)
    patches = F.unfold(even, (tall, wide), stride=(tall, wide))  # (B, ch * tall * wide, grid * grid)
    order = uniforms(keys, grid * grid).argsort(1).unsqueeze(1).expand_as(patches)
    mixed = F.fold(patches.gather(2, order), (tall * grid, wide * grid), (tall, wide), stride=(tall, wide))
    return mixed if mixed.shape == frames.shape else _resized(mixed, height, width)


def _resized(frames: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(frames, (height, width), mode="bilinear", align_corners=False, antialias=True)
