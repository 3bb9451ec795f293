"""The paper's method against an independent implementation in plain loops."""

import math

import torch

from meta.generator import LAYER_NORM_EPSILON, MetaGradientGenerator
from meta.models import groupnorm_cnn
from meta.norms import AdaptableModel
from meta.objective import feature_statistics
from meta.paper import PaperMGG, generate, meta_train_paper

COORDINATES, HIDDEN, STEPS = 3, 4, 100


def random_generator(seed: int = 0) -> MetaGradientGenerator:
    """Every learned number at random, none at a value that hides a mistake."""
    torch.manual_seed(seed)
    generator = MetaGradientGenerator(inputs=2, hidden=HIDDEN).double()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.6)
        generator.memory.token_scale.fill_(0.3)
    return generator


def layer_norm(values: list[float], scale: list[float], shift: list[float]) -> tuple[list[float], list[float], float]:
    n = len(values)
    mean = sum(values) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / n + LAYER_NORM_EPSILON)
    standard = [(v - mean) / deviation for v in values]
    return [scale[i] * standard[i] + shift[i] for i in range(n)], standard, deviation


class PlainCoordinate:
    """One coordinate, one number at a time, straight from the paper's equations."""

    def __init__(self, generator: MetaGradientGenerator, start: float, bias_offset: int) -> None:
        memory = generator.memory
        self.p = {name: p.detach().tolist() for name, p in memory.named_parameters()}
        self.post = generator.post_scale.tolist(), generator.post_shift.tolist()
        self.out = generator.output.tolist()[0]
        self.weight = [row[:] for row in self.p["initial_weight"]]
        self.bias = self.p["initial_bias"][:]
        self.affine, self.m, self.v, self.t, self.offset = start, 0.0, 0.0, 0, bias_offset

    def step(self, g: float, alpha: float) -> None:
        p, h = self.p, HIDDEN
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.99 * self.v + 0.01 * g * g
        n = self.t + self.offset
        root = math.sqrt(self.v / (1 - 0.99**n)) + 1e-8
        x = [self.m / (1 - 0.9**n) / root, g / root]
        q, k, v = (
            [sum(w * xi for w, xi in zip(row, x, strict=True)) for row in p[n]] for n in ("query", "key", "value")
        )
        z = [sum(k[i] * self.weight[i][j] for i in range(h)) + self.bias[j] for j in range(h)]
        normal, standard, deviation = layer_norm(z, p["norm_scale"], p["norm_shift"])
        e = [(normal[j] - (v[j] - k[j])) * p["norm_scale"][j] for j in range(h)]
        mean_e, mean_es = sum(e) / h, sum(e[j] * standard[j] for j in range(h)) / h
        d = [(e[j] - mean_e - standard[j] * mean_es) / deviation for j in range(h)]
        gate = 1 / (1 + math.exp(-(sum(w * xi for w, xi in zip(p["rate_weight"], x, strict=True)) + p["rate_bias"])))
        eta = gate / h * max(1 + p["token_scale"], 0)
        self.weight = [[self.weight[i][j] - eta * k[i] * d[j] for j in range(h)] for i in range(h)]
        self.bias = [self.bias[j] - eta * d[j] for j in range(h)]
        read = [sum(q[i] * self.weight[i][j] for i in range(h)) + self.bias[j] for j in range(h)]
        normal, _, _ = layer_norm(read, p["norm_scale"], p["norm_shift"])
        o = [q[j] + normal[j] for j in range(h)]
        last, _, _ = layer_norm(o, *self.post)
        self.affine -= alpha * math.tanh(sum(w * value for w, value in zip(self.out, last, strict=True)))


def fresh_state(generator: MetaGradientGenerator) -> dict[str, torch.Tensor]:
    weight, bias = generator.memory.fresh(1, COORDINATES)
    zeros = torch.zeros(1, COORDINATES, dtype=torch.float64)
    return {
        "affine": torch.linspace(0.5, 1.5, COORDINATES, dtype=torch.float64)[None],
        "first_moment": zeros,
        "second_moment": zeros,
        "memory_weight": weight,
        "memory_bias": bias,
        "age": torch.zeros(1, dtype=torch.float64),
    }


def test_a_hundred_steps_equal_plain_loops() -> None:
    generator = random_generator()
    gradients = torch.randn(STEPS, COORDINATES, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.2
    for reference_bias in (True, False):
        state = fresh_state(generator)
        plain = [PlainCoordinate(generator, float(a), int(reference_bias)) for a in state["affine"][0]]
        for gradient in gradients:
            with torch.no_grad():
                state, _ = generate(generator, state, gradient[None], 1e-3, reference_bias)
            for coordinate, g in zip(plain, gradient.tolist(), strict=True):
                coordinate.step(g, 1e-3)
        expected = torch.tensor([c.affine for c in plain], dtype=torch.float64)
        assert (state["affine"][0] - expected).abs().max() < 1e-10
        weights = torch.tensor([c.weight for c in plain], dtype=torch.float64)
        assert (state["memory_weight"][0].permute(2, 0, 1) - weights).abs().max() < 1e-10


def test_the_closed_form_of_the_memory_is_the_gradient_of_its_inner_loss() -> None:
    memory = random_generator(3).memory
    random = torch.Generator().manual_seed(4)
    x = torch.randn(2, 2, COORDINATES, dtype=torch.float64, generator=random)
    weight = torch.randn(2, HIDDEN, HIDDEN, COORDINATES, dtype=torch.float64, generator=random).requires_grad_()
    bias = torch.randn(2, HIDDEN, COORDINATES, dtype=torch.float64, generator=random).requires_grad_()
    key, value = memory.key @ x, memory.value @ x
    z = torch.einsum("shp,shkp->skp", key, weight) + bias
    normal = torch.nn.functional.layer_norm(
        z.transpose(1, 2), (HIDDEN,), memory.norm_scale, memory.norm_shift, LAYER_NORM_EPSILON
    ).transpose(1, 2)
    inner = 0.5 * ((normal - (value - key)) ** 2).sum()
    slope_weight, slope_bias = torch.autograd.grad(inner, [weight, bias])
    gate = torch.sigmoid(torch.einsum("d,sdp->sp", memory.rate_weight, x) + memory.rate_bias)
    rate = (gate * (1 + memory.token_scale).clamp_min(0) / HIDDEN).unsqueeze(1)
    _, new_weight, new_bias = memory(x, weight, bias)
    assert torch.allclose(new_weight, weight - rate.unsqueeze(2) * slope_weight, atol=1e-12)
    assert torch.allclose(new_bias, bias - rate * slope_bias, atol=1e-12)


def paper_method() -> tuple[PaperMGG, torch.Tensor]:
    torch.manual_seed(0)
    model = AdaptableModel(groupnorm_cnn(classes=4, widths=(8,), group=4))
    frames = torch.randn(32, 1, 28, 28)
    with torch.no_grad():
        source = feature_statistics(model.forward_with_features(frames)[1])
    return PaperMGG(model, source, MetaGradientGenerator(2, 8)), frames


def test_the_loss_is_entropy_and_discrepancy_with_unbiased_deviations() -> None:
    method, frames = paper_method()
    stream = torch.tensor([0] * 5 + [1] * 3)
    forward = method.predict(frames[:8], stream, method.fresh(2))
    for s in (0, 1):
        mine = stream == s
        probability = forward.logits[mine].softmax(1)
        entropy = -(probability * probability.log()).sum(1).mean()
        std, mean = torch.std_mean(forward.features[mine], 0)
        apart = ((std - method.source.std) ** 2).sum() + ((mean - method.source.mean) ** 2).sum()
        assert torch.allclose(method.loss(forward)[s], entropy + 0.4 * apart / 64, rtol=1e-4)


def test_one_frame_gives_what_the_published_code_gives() -> None:
    method, frames = paper_method()
    update = method.update(method.predict(frames[:1], torch.zeros(1, dtype=torch.long), method.fresh(1)))
    assert bool(update.state["affine"].isnan().all())


def test_meta_training_moves_the_generator_and_keeps_its_best_epoch() -> None:
    method, frames = paper_method()
    before = {name: tensor.clone() for name, tensor in method.generator.state_dict().items()}
    seen: list[dict[str, torch.Tensor]] = []

    def check(subject: PaperMGG) -> float:
        seen.append({name: tensor.clone() for name, tensor in subject.generator.state_dict().items()})
        return [0.2, 0.9, 0.4][len(seen) - 1]

    meta_train_paper(method, list(frames[:12].split(2)), check, epochs=3, say=lambda text: None)
    assert len(seen) == 3
    assert all(torch.equal(t, seen[1][n]) for n, t in method.generator.state_dict().items())
    assert not torch.equal(before["output"], seen[0]["output"])
