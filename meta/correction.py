"""The correction of single frames: it estimates a frame's shift from its activations, and normalises for that shift.

Under a shift, a channel's normalised activations have another mean and deviation over all images than in training.
Normalising with the new moments (AdaBN, Li et al., 2016) undoes much of the harm. Measuring them takes many frames
under one shift with an even class mix, which a stream may never show. But the shift also moves the moments of each
single frame, in addition to the image's content. So the new moments are estimated frame by frame: a linear regression
per layer, fitted once at the centre on simulated shifts, maps the moments of the frame's own channels to those of all
images under its shift. Differences between images, those of classes included, are noise to the regression, and it
weighs a direction the less, the less shifts move it (linear empirical Bayes). No state of a stream is involved, so
mixed shifts, runs of one class and single frames make no difference.

Estimates are shrunk: with h the mean of their squares, in units of their variance among frames under one shift, each is
multiplied by h / (h + 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from meta.affine import Estimate
from meta.norms import AdaptableModel
from meta.shifts import TUNING, Shift
from meta.source import Preprocessing

RANK = 16
FLOOR = 0.02  # added to a frame's variance, in units of the clean one: a channel may be constant in an image
MOST = 3.0  # largest change of a log deviation
WIDEST = 512  # channels; wider layers are not corrected, as the regression's cost is cubic in them
LEAST_SPREAD = 1e-4
RIDGE = 0.02  # penalty, in units of the regressors' mean variance
HEALTHY = 0.25  # share of draws without a shift


@dataclass(frozen=True)
class Correction:
    """The estimator for the normalised activations, before scale and shift, of all norm layers; F channels in all.

    mean, deviation (F,): over clean source frames
    reduce, expand (2F, R): the low-rank regression
    bias, spread (2F,): its constant, and the variance of its estimates among frames under one shift

    A layer with the channels [a, b) has the rows [2a, 2b): first those of means, then those of log deviations.
    """

    mean: Tensor
    deviation: Tensor
    reduce: Tensor
    expand: Tensor
    bias: Tensor
    spread: Tensor

    @staticmethod
    def shapes(features: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors by name, for F features; the rank R may differ."""
        wide = dict.fromkeys(("reduce", "expand"), (2 * features, RANK))
        return {
            "mean": (features,),
            "deviation": (features,),
            **wide,
            "bias": (2 * features,),
            "spread": (2 * features,),
        }

    def as_tensors(self) -> dict[str, Tensor]:
        """The tensors by name, for a file."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device) -> Correction:
        """The correction on a device."""
        return Correction(**{name: tensor.to(device) for name, tensor in self.as_tensors().items()})

    def layer(self, channels: slice) -> _Layer:
        """The estimator of the layer with `channels`, prepared once."""
        known = self._layers.get(channels.start)
        if known is None:
            with torch.inference_mode(False), torch.no_grad():
                known = self._layers[channels.start] = _Layer.of(self, channels)
        return known

    @cached_property
    def _layers(self) -> dict[int, _Layer]:
        return {}

    def under(self, strength: Tensor) -> FrameCorrection:
        """The correction for one pass: `strength` (B,) multiplies the estimates of each frame."""
        return FrameCorrection(self, strength.unsqueeze(1))


class FrameCorrection:
    """A `LayerCorrection`: a correction with the strength (B, 1) of each frame of a pass."""

    def __init__(self, correction: Correction, strength: Tensor) -> None:
        self.correction, self.strength = correction, strength

    def of(self, channels: slice, mean: Tensor, square: Tensor) -> Estimate:
        """See `LayerCorrection.of`."""
        return self.correction.layer(channels).estimate(mean, square, self.strength)


@dataclass(frozen=True)
class _Layer:
    """The estimator of one layer with C channels, in units that need the fewest operations.

    Its input is (B, 2C): mean minus clean mean, and log of the variance, in units of the clean one, with FLOOR. Its
    estimate is (B, 2C): the clean mean's change, in units of x_hat, and the log of the gain.

    clean_mean (C,); per_variance (C,): 1 / ((1 + FLOOR) clean variance)
    reduce (2C, R), expand (R, 2C), bias (2C,): the regression
    weight (2C,): makes the sum of squared estimates their mean size, in units of their variance under one shift
    """

    clean_mean: Tensor
    per_variance: Tensor
    reduce: Tensor
    expand: Tensor
    bias: Tensor
    weight: Tensor

    @staticmethod
    def of(correction: Correction, channels: slice) -> _Layer:
        """The rows of a correction that belong to a layer."""
        rows = slice(2 * channels.start, 2 * channels.stop)
        deviation, ones = correction.deviation[channels], torch.ones_like(correction.deviation[channels])
        shown, estimated = torch.cat([1 / deviation, ones / 2]), torch.cat([deviation, -ones])
        return _Layer(
            correction.mean[channels],
            1 / ((1 + FLOOR) * deviation**2),
            shown.unsqueeze(1) * correction.reduce[rows],
            (correction.expand[rows].T * estimated).contiguous(),
            correction.bias[rows] * estimated,
            1 / (correction.spread[rows] * estimated**2 * len(estimated)),
        )

    def estimate(self, mean: Tensor, square: Tensor, strength: Tensor) -> Estimate:
        """Gain and offset (B, C) from the moments (B, C), with the gradient in closed form; strength (B, 1)."""
        channels = len(self.clean_mean)
        variance = torch.addcmul(square, mean, mean, value=-1).clamp_min_(0)
        inner = (variance * self.per_variance).add_(FLOOR / (1 + FLOOR))
        found = torch.addmm(self.bias, torch.cat([mean - self.clean_mean, inner.log()], 1) @ self.reduce, self.expand)
        weighted = found * self.weight
        bigger = 1 + (weighted * found).sum(1, keepdim=True)
        share = strength - strength / bigger
        shrunk = found * share
        wider = shrunk[:, channels:]
        level, gain = shrunk[:, :channels] + self.clean_mean, wider.clamp(-MOST, MOST).exp_()
        offset = torch.addcmul(self.clean_mean, level, gain, value=-1)

        def gradient(of_gain: Tensor, of_offset: Tensor) -> tuple[Tensor, Tensor]:
            along = torch.addcmul(of_gain, of_offset, level, value=-1).mul_(gain)
            along = torch.ops.aten.hardtanh_backward(along, wider, -MOST, MOST)
            of_shrunk = torch.cat([(of_offset * gain).neg_(), along], 1)
            of_size = (of_shrunk * found).sum(1, keepdim=True).mul_(strength / bigger**2)
            of_found = (of_shrunk * share).addcmul_(weighted, of_size, value=2)
            of_input = of_found @ self.expand.T @ self.reduce.T
            of_square = of_input[:, channels:] / inner * self.per_variance
            of_square = torch.ops.aten.threshold_backward(of_square, variance, 0)
            return torch.addcmul(of_input[:, :channels], mean, of_square, value=-2), of_square

        return Estimate(gain, offset, gradient)


def _standardised(mean: Tensor, square: Tensor, clean_mean: Tensor, deviation: Tensor) -> Tensor:
    """Standardised differences (B, 2C) of moments (B, C) from those of clean frames: means, then log deviations."""
    variance = (square - mean**2).clamp_min(0) / deviation**2
    return torch.cat([(mean - clean_mean) / deviation, ((variance + FLOOR) / (1 + FLOOR)).log() / 2], 1)


@torch.no_grad()
def fit_correction(
    model: AdaptableModel,
    images: Tensor,
    preprocessing: Preprocessing,
    seed: int,
    draws: int = 200,
    frames: int = 64,
    at_once: int = 512,
    passes: int | None = None,
    shifts: dict[str, Shift] | None = None,
) -> Correction:
    """Fit the estimator on clean images uint8 (N, ch, h, w), shuffled, under simulated `shifts`; by default TUNING.

    `draws` shifts are drawn, with `frames` images each. Each layer is fitted in a pass of its own over all of them, in
    order, because its input depends on the correction of the layers before it. With fewer `passes`, neighbouring layers
    share one. `at_once` frames are in memory at a time.
    """
    count = model.feature_count
    first, second = torch.zeros(count), torch.zeros(count)
    part = images[: draws * frames // 4]
    for some in part.split(at_once):
        probe = _Probe()
        model(preprocessing.frames(some), correction=probe)
        for start, (m, q) in probe.seen.items():
            channels = slice(start, start + m.shape[1])
            first[channels] += m.sum(0) / len(part)
            second[channels] += q.sum(0) / len(part)
    deviation = (second - first**2).clamp_min(1e-8).sqrt()
    flat = torch.zeros(2 * count, RANK), torch.zeros(2 * count, RANK), torch.zeros(2 * count), torch.ones(2 * count)
    found = Correction(first, deviation, *flat)
    layers = [layer for layer in model.layers if layer.feature_count <= WIDEST]
    size = max(1, -(-len(layers) // (passes or max(1, len(layers)))))
    for start in range(0, len(layers), size):
        fitted = [_Moments(layer.features, frames) for layer in layers[start : start + size]]
        for some in _shifted(images, shifts or TUNING, draws, frames, at_once, seed):
            probe = _Probe(found.under(torch.ones(len(some))))
            model(preprocessing.frames(some), correction=probe)
            for moments in fitted:
                moments.add(found, *probe.seen[moments.channels.start])
        for moments in fitted:
            moments.solve(found)
    return found


class _Probe:
    """A `LayerCorrection` that records the moments of a pass. It corrects as `under` does; None: not at all."""

    def __init__(self, under: FrameCorrection | None = None) -> None:
        self.answer = under
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, channels: slice, mean: Tensor, square: Tensor) -> Estimate:
        self.seen[channels.start] = mean, square
        if self.answer is None:
            return Estimate.fixed(torch.ones_like(mean), torch.zeros_like(mean))
        return self.answer.of(channels, mean, square)


class _Moments:
    """Running sums for the regression of one layer, from each frame's moments to those of all frames of its draw."""

    def __init__(self, channels: slice, frames: int) -> None:
        self.channels, self.frames = channels, frames
        size = 2 * (channels.stop - channels.start)
        self.count = 0
        self.shown, self.wanted = torch.zeros(size), torch.zeros(size)
        self.both, self.within, self.cross = (torch.zeros(size, size) for _ in range(3))

    def add(self, correction: Correction, mean: Tensor, square: Tensor) -> None:
        """Add the moments (B, C) of the frames of whole draws."""
        clean_mean, deviation = correction.mean[self.channels], correction.deviation[self.channels]
        shown = _standardised(mean, square, clean_mean, deviation)
        drawn = (len(shown) // self.frames, self.frames, -1)
        common, squares = mean.view(drawn).mean(1), square.view(drawn).mean(1)
        wider = ((squares - common**2).clamp_min(1e-6 * deviation**2) / deviation**2).log() / 2
        wanted = torch.cat([(common - clean_mean) / deviation, wider], 1)
        total = shown.view(drawn).sum(1)
        apart = shown - (total / self.frames).repeat_interleave(self.frames, 0)
        self.count += len(shown)
        self.shown += total.sum(0)
        self.wanted += self.frames * wanted.sum(0)
        self.both += shown.T @ shown
        self.within += apart.T @ apart
        self.cross += total.T @ wanted

    def solve(self, correction: Correction) -> None:
        """Write the layer's rows of the correction: a ridge regression, reduced to its RANK leading directions."""
        count, rows = self.count, slice(2 * self.channels.start, 2 * self.channels.stop)
        shown, wanted = self.shown / count, self.wanted / count
        both = self.both / count - torch.outer(shown, shown)
        cross = self.cross / count - torch.outer(shown, wanted)
        ridge = RIDGE * both.diagonal().mean().clamp_min(1e-8)
        weight = torch.linalg.solve(both + ridge * torch.eye(len(both)), cross)
        _, directions = torch.linalg.eigh(weight.T @ both @ weight)
        directions = directions[:, -RANK:]
        weight = weight @ directions
        within = self.within / count
        correction.reduce[rows, : weight.shape[1]] = weight
        correction.expand[rows, : weight.shape[1]] = directions
        correction.bias[rows] = wanted - shown @ weight @ directions.T
        noise = directions @ (weight.T @ within @ weight) @ directions.T
        correction.spread[rows] = noise.diagonal().clamp_min(LEAST_SPREAD)
        correction._layers.clear()


def _shifted(
    images: Tensor, shifts: dict[str, Shift], draws: int, frames: int, at_once: int, seed: int
) -> Iterator[Tensor]:
    """Images in [0, 1], several draws of `frames` at a time: a quarter of them clean, else under one or two shifts."""
    random, known = torch.Generator().manual_seed(seed), list(shifts.values())
    together: list[Tensor] = []
    for number in range(draws):
        chosen = torch.randint(len(images), (frames,), generator=random)
        drawn = images[chosen].float() / 255
        if float(torch.rand((), generator=random)) >= HEALTHY:
            how_many = 1 + int(torch.randint(2, (), generator=random))
            for i in torch.randperm(len(known), generator=random)[:how_many].tolist():
                severity = 0.2 + 0.8 * float(torch.rand((), generator=random))
                traits = torch.rand(4, generator=random)
                drawn = known[i](drawn, torch.full((frames,), severity), traits, random)
        together.append(drawn)
        if len(together) * frames >= at_once or number == draws - 1:
            yield torch.cat(together)
            together = []
