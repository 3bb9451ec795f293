"""Baselines with a mean teacher, whose parameters are an exponential mean of the student's: CoTTA and RoTTA."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from meta.baselines.augment import augmented
from meta.baselines.base import (
    Baseline,
    Options,
    Setup,
    choose,
    frame_keys,
    longest_stream,
    next_age,
    next_moments,
    position_in_stream,
    uniforms,
)
from meta.method import Forward, State, Update
from meta.moments import NormMoments
from meta.objective import entropy, per_stream_mean, per_stream_sum


def consistency(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of the student's logits under the teacher's, (B,)."""
    return -(teacher.softmax(1) * student.log_softmax(1)).sum(1)


class Cotta(Baseline):
    """A teacher averaged over augmentations, and stochastic restoration of the source parameters.

    Wang et al., "Continual Test-Time Domain Adaptation", CVPR 2022: teacher decay 0.999; 32 augmentations where the
    source model's mean confidence on the batch is below 0.92; each coordinate restored with probability 0.01; Adam
    1e-3. The teacher predicts. The paper adapts every weight; here, as for all methods, scale and shift only. Its
    augmentations are not quite the published ones (`meta.baselines.augment`), nor are those of RoTTA and ROID.
    `affine` is the teacher's, `student` the student's.
    """

    name = "cotta"
    published: ClassVar[Options] = {"step_size": 1e-3}
    decay, restore, confidence = 0.999, 0.01, 0.92

    def __init__(self, setup: Setup, augmentations: int = 32, **options: Any) -> None:
        super().__init__(setup, **options)
        self.augmentations = augmentations

    def memory(self, streams: int) -> State:
        return {
            "student": self.model.source_affine.expand(streams, -1).clone(),
            "age": torch.zeros(streams, device=self.device),
        }

    def predict(self, frames: Tensor, stream: Tensor, state: State) -> Forward:
        counts = torch.bincount(stream, minlength=len(state["age"])).clamp_min(1).float()
        rows = state["student"].detach().index_select(0, stream).requires_grad_()
        moments = self.moments(stream, state)
        with torch.enable_grad():
            student = self.model(frames, rows, moments)
        with torch.no_grad():
            logits = self.logits_under(frames, stream, state["affine"], state)
            source = self.model(frames, None, self.moments(stream, state)).softmax(1).amax(1)
            unsure = per_stream_mean(source, stream, counts) < self.confidence
            chosen = unsure.index_select(0, stream)
            if bool(chosen.any()):
                logits[chosen] = self._averaged(frames[chosen], stream, chosen, state)
        return self.forward_of(frames, rows, stream, state, logits, moments, student=student)

    def _averaged(self, frames: Tensor, stream: Tensor, chosen: Tensor, state: State) -> Tensor:
        keys = frame_keys(state, stream)
        keys, own = keys[chosen] * self.augmentations, stream[chosen]
        total = torch.zeros((), device=self.device)
        for turn in range(self.augmentations):
            seen = augmented(frames, self.setup.mean, self.setup.std, keys + turn)
            total = total + self.logits_under(seen, own, state["affine"], state)
        return total / self.augmentations

    def update(self, forward: Forward) -> Update:
        state, counts = forward.state, forward.counts.clamp_min(1)
        with torch.enable_grad():
            loss = consistency(forward.kept["student"], forward.logits.detach())
            loss = per_stream_mean(loss, forward.stream, counts)
            (gradient,) = torch.autograd.grad(loss.sum(), [forward.rows])
        gradient = per_stream_sum(gradient, forward.stream, len(forward.counts))
        direction, optimizer_state = self.optimizer.direction(state, gradient)
        student = state["student"] - self.size(state) * direction
        teacher = torch.lerp(student, state["affine"], self.decay)
        back = uniforms(state["age"].long(), self.model.coordinates) < self.restore
        student = torch.where(back, self.model.source_affine, student)
        moved = {"affine": teacher, "student": student, "age": next_age(state), **optimizer_state}
        new = state | choose(forward.counts > 0, moved, state) | next_moments(forward)
        return Update(new, self.signals(forward, loss.detach(), gradient, direction, new))


class Rotta(Baseline):
    """A class-balanced memory of recent frames, robust BatchNorm, and a teacher.

    Yuan et al., "Robust Test-Time Adaptation in Dynamic Scenarios", CVPR 2023: 64 frames in memory, kept by age and
    uncertainty; an update at every 64th frame, from the whole memory; teacher rate 0.001; BatchNorm's moments move
    by 0.05 of the memory's at each update; Adam 1e-3. The teacher predicts. `affine` is the teacher's.
    """

    name = "rotta"
    published: ClassVar[Options] = {"step_size": 1e-3}
    share = 0.05  # of the memory's moments in BatchNorm's at an update

    def __init__(self, setup: Setup, capacity: int = 64, every: int = 64, rate: float = 0.001, **options: Any) -> None:
        super().__init__(setup, **{**options, "statistics": "source"})
        if not setup.frame_shape:
            raise ValueError("rotta keeps frames in memory; give their shape (ch, h, w) as frame_shape of the Setup")
        self.capacity, self.every, self.rate = capacity, every, rate
        self.wrap = every * (2**24 // every)  # float32 counts no further, and would call every frame the 64th

    @classmethod
    def grid(cls, batch_norm: bool) -> list[Options]:
        return [{"step_size": size, "rate": rate} for size in cls.steps for rate in (0.001, 0.03)]

    def memory(self, streams: int) -> State:
        shape = (streams, self.capacity)
        state = {
            "student": self.model.source_affine.expand(streams, -1).clone(),
            "frames": torch.zeros(*shape, *self.setup.frame_shape, device=self.device),
            "label": torch.full(shape, -1.0, device=self.device),
            "uncertainty": torch.zeros(shape, device=self.device),
            "frame_age": torch.zeros(shape, device=self.device),
            "seen": torch.zeros(streams, device=self.device),
        }
        for who in ("student", "teacher") if self.model.batch_channels else ():
            state[f"{who}_mean"] = self.model.source_mean.expand(streams, -1).clone()
            state[f"{who}_variance"] = self.model.source_variance.expand(streams, -1).clone()
        return state

    def predict(self, frames: Tensor, stream: Tensor, state: State) -> Forward:
        with torch.no_grad():
            rows = state["affine"].index_select(0, stream)
            logits = self.model(frames, rows, self._moments_of("teacher", stream, state, 0.0))
        return self.forward_of(frames, None, stream, state, logits, None)

    def _moments_of(self, who: str, stream: Tensor, state: State, share: float) -> NormMoments | None:
        if not self.model.batch_channels:
            return None
        shares = torch.full((len(state["affine"]),), share, device=self.device)
        return NormMoments(stream, shares, state[f"{who}_mean"], state[f"{who}_variance"])

    def update(self, forward: Forward) -> Update:
        state = {name: tensor.clone() for name, tensor in forward.state.items()}
        place, surprise = position_in_stream(forward.stream), entropy(forward.logits)
        label = forward.logits.argmax(1)
        loss = torch.zeros_like(forward.counts)
        gradient = torch.zeros_like(state["affine"])
        for turn in range(longest_stream(place)):
            now = torch.nonzero(place == turn).flatten()
            streams = forward.stream[now]
            self._remember(state, streams, forward.frames[now], label[now], surprise[now])
            due = streams[state["seen"][streams] % self.every == 0]
            if len(due):
                loss[due], gradient[due] = self._learn(state, due)
        return Update(state, self.signals(forward, loss, gradient, gradient, state))

    def _remember(self, state: State, streams: Tensor, frames: Tensor, label: Tensor, surprise: Tensor) -> None:
        """Offer one frame to the memory of each of `streams`, in place: it may replace an older or less certain one."""
        labels, uncertainty = state["label"][streams], state["uncertainty"][streams]
        filled = labels >= 0
        one_hot = (labels.unsqueeze(2) == torch.arange(self.classes, device=self.device)) & filled.unsqueeze(2)
        occupied = one_hot.sum(1)
        own = occupied.gather(1, label.unsqueeze(1)).squeeze(1)
        rare, full = own < self.capacity / self.classes, filled.all(1)
        scores = torch.sigmoid(state["frame_age"][streams] / self.capacity) + uncertainty / math.log(self.classes)
        largest = occupied == occupied.amax(1, keepdim=True)
        in_largest = (one_hot & largest.unsqueeze(1)).any(2)
        same = labels == label.unsqueeze(1)
        candidates = torch.where((rare & full).unsqueeze(1), in_largest, same) & filled
        worst, slot = scores.masked_fill(~candidates, -torch.inf).max(1)
        append = rare & ~full
        slot = torch.where(append, (~filled).int().argmax(1), slot)
        accept = append | (worst > 0.5 + surprise / math.log(self.classes))
        to, where = streams[accept], slot[accept]
        state["frames"][to, where] = frames[accept]
        state["label"][to, where] = label[accept].float()
        state["uncertainty"][to, where] = surprise[accept]
        state["frame_age"][to, where] = 0.0
        state["frame_age"][streams] += (state["label"][streams] >= 0).float()
        state["seen"][streams] = (state["seen"][streams] + 1) % self.wrap

    def _learn(self, state: State, due: Tensor) -> tuple[Tensor, Tensor]:
        """One student step of the streams `due` from their memories, in place. Returns their loss and gradient."""
        mine = {name: tensor[due] for name, tensor in state.items()}
        owner, slot = torch.nonzero(mine["label"] >= 0, as_tuple=True)
        frames, age = mine["frames"][owner, slot], mine["frame_age"][owner, slot] / self.capacity
        keys = mine["seen"].long()[owner] * 65_536 + slot
        strong = augmented(frames, self.setup.mean, self.setup.std, keys)
        counts = torch.bincount(owner, minlength=len(due)).float()
        teacher_moments = self._moments_of("teacher", owner, mine, self.share)
        student_moments = self._moments_of("student", owner, mine, self.share)
        with torch.no_grad():
            target = self.model(frames, mine["affine"].index_select(0, owner), teacher_moments)
        rows = mine["student"].index_select(0, owner).requires_grad_()
        with torch.enable_grad():
            weight = torch.exp(-age) / (1 + torch.exp(-age))
            loss = consistency(self.model(strong, rows, student_moments), target) * weight
            loss = per_stream_mean(loss, owner, counts.clamp_min(1))
            (frame_gradient,) = torch.autograd.grad(loss.sum(), [rows])
        gradient = per_stream_sum(frame_gradient, owner, len(due))
        direction, changed = self.optimizer.direction(mine, gradient)
        changed["student"] = mine["student"] - self.size(mine) * direction
        changed["affine"] = torch.lerp(mine["affine"], changed["student"], self.rate)
        for who, moments in (("teacher", teacher_moments), ("student", student_moments)):
            if moments is not None:
                changed[f"{who}_mean"], changed[f"{who}_variance"] = moments.mixed()
        for name, tensor in changed.items():
            state[name][due] = tensor
        return loss.detach(), gradient
