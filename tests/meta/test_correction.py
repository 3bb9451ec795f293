import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta.affine import Estimate
from meta.correction import FLOOR, MOST, Correction, _Probe, fit_correction
from meta.learned import GeneratorSettings, LearnedOptimizer
from meta.mgg import MGG
from meta.models import batchnorm_cnn
from meta.norms import AdaptableModel, run_order
from meta.objective import feature_statistics
from meta.source import Preprocessing, as_frames
from meta.stream_norm import StreamNorm
from tests.meta.test_norms import NETWORKS, Backwards, scrambled

MEAN, STD = torch.tensor([0.4]), torch.tensor([0.3])


class Moved:
    """A correction with a gain and an offset for every frame and channel, whatever the frames show."""

    def __init__(self, frames: int, features: int) -> None:
        random = torch.Generator().manual_seed(3)
        self.gain = torch.rand(frames, features, generator=random) + 0.5
        self.offset = torch.randn(frames, features, generator=random)

    def of(self, channels: slice, mean: Tensor, square: Tensor) -> Estimate:
        assert bool((square >= mean**2 - 1e-5).all())
        return Estimate.fixed(self.gain[:, channels], self.offset[:, channels])


def doubles(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def random_correction(channels: int, rank: int = 3) -> Correction:
    """In float64."""
    torch.manual_seed(6)
    return Correction(
        doubles(channels),
        doubles(channels).exp(),
        *(doubles(2 * channels, rank), doubles(2 * channels, rank)),
        *(doubles(2 * channels), doubles(2 * channels).exp()),
    )


def corrected(layer: StreamNorm, moved: Moved) -> Callable[[Tensor], Tensor]:
    """What a layer's own normalisation gives, changed."""
    normalise, (gain, offset) = layer.norm, (t[:, layer.features] for t in (moved.gain, moved.offset))
    last = (layer.scale.dim() == 1 and not layer.channels_first) or layer.scale.dim() == 3

    def change(x: Tensor) -> Tensor:
        x = normalise(x)
        shape = (4, *[1] * (x.dim() - 2), -1) if last else (4, -1, *[1] * (x.dim() - 2))
        return x * gain.reshape(shape) + offset.reshape(shape)

    return change


@pytest.mark.parametrize("name", NETWORKS)
def test_activations_are_corrected_before_scale_and_shift(name: str) -> None:
    """Logits and gradients are those of a model whose normalised activations are changed as the definition says."""
    model = AdaptableModel(scrambled(name))
    moved = Moved(4, sum(layer.feature_count for layer in model.layers))
    frames = torch.randn(4, 1, 28, 28)
    rows = (model.source_affine + 0.3 * torch.randn(4, model.coordinates)).requires_grad_()
    logits = model(frames, rows, correction=moved)
    (found,) = torch.autograd.grad(logits.logsumexp(1).sum(), [rows])

    for layer in model.layers:
        change = corrected(layer, moved)
        layer._modules.pop("norm", None)
        layer.groups, layer.fixed, layer.norm = 0, False, change
    plain = model(frames, rows)
    (expected,) = torch.autograd.grad(plain.logsumexp(1).sum(), [rows])
    torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0])
def test_an_estimate_has_the_gradient_of_its_formula(strength: float) -> None:
    """Gain and offset are those of the definition, in float64, and so is the gradient that is written out."""
    correction = random_correction(channels=4)
    mean, spread = doubles(3, 4), doubles(3, 4)
    share = torch.full((3, 1), strength, dtype=torch.float64)

    def defined(mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        deviation = correction.deviation
        variance = (square - mean**2) / deviation**2
        shown = torch.cat([(mean - correction.mean) / deviation, ((variance + FLOOR) / (1 + FLOOR)).log() / 2], 1)
        estimate = shown @ correction.reduce @ correction.expand.T + correction.bias
        size = (estimate**2 / correction.spread).mean(1, keepdim=True)
        moved, wider = (estimate * share * size / (size + 1)).tensor_split(2, 1)
        gain = torch.exp(-wider.clamp(-MOST, MOST))
        return gain, correction.mean - (correction.mean + deviation * moved) * gain

    leaves = mean.requires_grad_(), (mean.detach() ** 2 + spread**2 + 0.1).requires_grad_()
    expected = defined(*leaves)
    found = correction.under(share[:, 0]).of(slice(0, 4), *(leaf.detach() for leaf in leaves))
    given = doubles(3, 4), doubles(3, 4)
    for part, wanted in zip(found[:2], expected, strict=True):
        torch.testing.assert_close(part, wanted)
    for part, wanted in zip(found.gradient(*given), torch.autograd.grad(expected, leaves, given), strict=True):
        torch.testing.assert_close(part, wanted)


def test_an_estimate_is_limited_and_a_constant_channel_teaches_nothing() -> None:
    correction = random_correction(channels=4)
    correction.bias[4:] = 1_000.0
    mean = doubles(2, 4)
    found = correction.under(torch.ones(2)).of(slice(0, 4), mean, mean**2 - 1e-9)
    torch.testing.assert_close(found.gain, torch.full_like(mean, math.exp(-MOST)))
    of_mean, of_square = found.gradient(torch.ones_like(mean), torch.ones_like(mean))
    assert not of_square.any()
    assert of_mean.isfinite().all()


def test_moments_of_a_layer_without_positions_are_those_before_its_affine() -> None:
    """There a frame's moments are its activations, which a pass without a graph overwrites."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    nn.init.constant_(network[2].weight, 3.0)
    nn.init.constant_(network[2].bias, 5.0)
    frames = torch.randn(6, 1, 2, 2)
    expected = network[1](frames.flatten(1)) / (1 + network[2].eps) ** 0.5
    probe = _Probe()
    with torch.no_grad():
        AdaptableModel(network)(frames, correction=probe)
    mean, square = probe.seen[0]
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(square, expected**2)


def pictures(count: int, seed: int) -> Tensor:
    """Bright bars on a dark ground, uint8."""
    random = torch.Generator().manual_seed(seed)
    images = 30 * torch.rand(count, 1, 16, 16, generator=random)
    for image, (row, column) in zip(images, torch.randint(2, 12, (count, 2), generator=random).tolist(), strict=True):
        image[0, row : row + 3] += 120
        image[0, :, column : column + 2] += 60
    return images.to(torch.uint8)


def lit(images: Tensor, severity: Tensor, traits: Tensor, random: torch.Generator) -> Tensor:
    """Brighter or darker."""
    each = severity.view(-1, 1, 1, 1)
    return (images * (1 + each) if traits[0] < 0.5 else images * (1 - 0.7 * each) + 0.1 * each).clamp(0, 1)


def settled() -> nn.Module:
    torch.manual_seed(4)
    network = batchnorm_cnn(classes=4, widths=(8, 8))
    clean = as_frames(pictures(256, 0).float() / 255, MEAN, STD)
    network.train()
    for _ in range(30):
        network(clean)
    return network.eval()


def fit(model: AdaptableModel) -> Correction:
    return fit_correction(
        model, pictures(512, 1), Preprocessing(MEAN, STD), 0, draws=40, frames=32, shifts={"lit": lit}
    )


@pytest.fixture(scope="module")
def fitted() -> tuple[AdaptableModel, Correction]:
    model = AdaptableModel(settled())
    return model, fit(model)


def shown(severity: float, brighter: bool) -> tuple[Tensor, Tensor]:
    """Other pictures as they are, and under a shift."""
    images = pictures(64, 2).float() / 255
    traits = torch.tensor([0.0 if brighter else 1.0, 0.0, 0.0, 0.0])
    shifted = lit(images, torch.full((64,), severity), traits, torch.Generator())
    return as_frames(images, MEAN, STD), as_frames(shifted, MEAN, STD)


@pytest.mark.parametrize("brighter", [True, False])
def test_single_frames_under_a_shift_come_out_nearer_to_those_without(fitted, brighter: bool) -> None:
    model, correction = fitted
    clean, shifted = shown(0.7, brighter)
    wanted, before = model(clean), model(shifted)
    after = torch.cat([model(one[None], correction=correction.under(torch.ones(1))) for one in shifted])
    assert F.mse_loss(after, wanted) < 0.3 * F.mse_loss(before, wanted)


def test_frames_without_a_shift_stay_nearly_as_they_are(fitted) -> None:
    model, correction = fitted
    clean, shifted = shown(0.7, True)
    wanted = model(clean)
    kept = model(clean, correction=correction.under(torch.ones(64)))
    assert F.mse_loss(kept, wanted) < 0.1 * F.mse_loss(model(shifted), wanted)


def test_who_shares_the_pass_does_not_matter(fitted) -> None:
    model, correction = fitted
    clean, shifted = shown(0.5, True)
    frames, strength = torch.cat([clean[:3], shifted[:3]]), torch.tensor([1.0, 0.0, 0.4, 1.0, 0.0, 0.4])
    together = model(frames, correction=correction.under(strength))
    for i in range(6):
        alone = model(frames[i : i + 1], correction=correction.under(strength[i : i + 1]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[[1, 4]], model(frames[[1, 4]]))


@pytest.fixture
def method(fitted) -> MGG:
    model, correction = fitted
    with torch.no_grad():
        logits, features = model.forward_with_features(shown(0.0, True)[0])
    learned = LearnedOptimizer(GeneratorSettings(), model).requires_grad_(False)
    model.correction = correction
    yield MGG(model, feature_statistics(features, logits.softmax(1)), learned, 4)
    model.correction = None


def test_a_stream_is_corrected_from_its_first_update_on(method) -> None:
    """Until then it answers as source; what it only shows changes nothing, and no moments of BatchNorm are kept."""
    frames, stream = shown(0.7, True)[1][:8], torch.zeros(8, dtype=torch.long)
    fresh = method.fresh(1)
    forward = method.predict(frames, stream, fresh)
    torch.testing.assert_close(forward.logits, method.model(frames))
    assert float(method.observe(forward)["correction"]) == 0
    moved = method.for_site(0.0).update(forward).state
    assert "norm_mean" not in moved
    after = method.predict(frames, stream, moved).logits
    torch.testing.assert_close(after, method.model(frames, correction=method.model.correction.under(torch.ones(8))))


def test_source_is_not_corrected_in_the_pass_of_a_stream_that_is(method) -> None:
    frames, stream = shown(0.7, True)[1][:8], torch.zeros(8, dtype=torch.long)
    moved = method.update(method.predict(frames, stream, method.fresh(1))).state
    with torch.inference_mode():
        forward = method.serve(frames, stream, moved, [False], torch.tensor([5, 2]))
    torch.testing.assert_close(forward.source_output.logits, method.model(frames[[5, 2]]))
    assert not torch.allclose(forward.source_output.logits, forward.logits[[5, 2]], atol=1e-3)


def test_equal_seeds_give_equal_corrections(fitted) -> None:
    model, first = fitted
    second = fit(model)
    for name, tensor in first.as_tensors().items():
        assert torch.equal(tensor, second.as_tensors()[name])


def test_layers_are_fitted_as_they_run_however_they_are_declared(fitted) -> None:
    _, expected = fitted
    network = Backwards(settled())
    found = fit(AdaptableModel(network, run_order(network, torch.zeros(1, 1, 16, 16))))
    for name, tensor in expected.as_tensors().items():
        torch.testing.assert_close(found.as_tensors()[name], tensor)
