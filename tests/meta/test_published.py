"""The methods of papers beside plain loops over one stream: a network in train mode, torch's optimizers, Python lists.

Each loop is the published algorithm, with the deviations that the class's docstring names. Chance is shared: which
patches are shuffled and which views are seen is drawn as the class draws it.
"""

import copy
import math
from collections.abc import Callable
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta.baselines import Setup, build
from meta.baselines.augment import augmented
from meta.baselines.entropy import shuffle_patches
from meta.baselines.teachers import Cotta, Rotta
from meta.models import batchnorm_cnn
from meta.norms import AdaptableModel
from meta.objective import feature_statistics

CLASSES, FRAMES, STEP = 10, 16, 1e-2
SURE = 0.4 * math.log(CLASSES)
PLAIN = torch.zeros(1), torch.ones(1)  # mean and deviation of frames that are not standardised


def network() -> nn.Module:
    torch.manual_seed(3)
    net = batchnorm_cnn(CLASSES, 1, widths=(8, 8))
    net[-1].weight.data *= 8  # sure of itself: thresholds on entropy let some frames pass
    for _ in range(20):
        net(torch.randn(64, 1, 8, 8))
    return net.eval()


@pytest.fixture
def setup() -> Setup:
    model = AdaptableModel(network())
    frames = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        source = feature_statistics(model.forward_with_features(frames)[1])
    return Setup(model, source, CLASSES, *PLAIN, frames, (1, 8, 8))


class Net:
    """The network with the statistics of its batch, and its scales and shifts."""

    def __init__(self) -> None:
        self.network = network().requires_grad_(False)
        self.affine: list[Tensor] = []
        for layer in self.network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
                self.affine += [layer.weight.requires_grad_(), layer.bias.requires_grad_()]
        self.source = [part.detach().clone() for part in self.affine]

    def __call__(self, frames: Tensor) -> Tensor:
        return self.network(frames)

    @torch.no_grad()
    def set(self, parts: list[Tensor]) -> None:
        for mine, part in zip(self.affine, parts, strict=True):
            mine.copy_(part)

    def flat(self) -> Tensor:
        return torch.cat([part.detach().flatten() for part in self.affine])


def entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


def keys(turn: int) -> Tensor:
    """Those of the chance of each frame in a stream's update."""
    return turn * 65_536 + torch.arange(FRAMES)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


Loop = Callable[[Tensor], tuple[Tensor, Tensor]]  # frames to the answer, and to the affine that answers next


def eata(setup: Setup) -> Loop:
    net = Net()
    optimizer = torch.optim.Adam(net.affine, STEP)
    fisher = [torch.zeros_like(part) for part in net.affine]
    batches = setup.source_frames.split(64)
    for frames in batches:
        logits = net(frames)
        slopes = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), net.affine)
        fisher = [one + slope**2 / len(batches) for one, slope in zip(fisher, slopes, strict=True)]
    usual: Tensor | None = None

    def step(frames: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal usual
        logits = net(frames)
        used = logits[entropy(logits) < SURE]
        if usual is not None:
            used = used[F.cosine_similarity(usual[None], used.detach().softmax(1), dim=1).abs() < 0.4]
        if len(used):
            mean = used.detach().softmax(1).mean(0)
            usual = mean if usual is None else 0.9 * usual + 0.1 * mean
            loss = (entropy(used) / torch.exp(entropy(used).detach() - SURE)).mean()
            pairs = zip(fisher, net.affine, net.source, strict=True)
            descend(optimizer, loss + sum((one * (now - then) ** 2).sum() for one, now, then in pairs))
        return logits.detach(), net.flat()

    return step


def sar(setup: Setup) -> Loop:
    net = Net()
    optimizer = torch.optim.SGD(net.affine, STEP, momentum=0.9)
    usual: float | None = None

    def step(frames: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal usual, optimizer
        logits = net(frames)
        reliable = entropy(logits.detach()) < SURE
        if bool(reliable.any()):
            slopes = torch.autograd.grad(entropy(logits)[reliable].mean(), net.affine)
            norm = torch.cat([slope.flatten() for slope in slopes]).norm() + 1e-12
            here = [part.detach().clone() for part in net.affine]
            net.set([part + 0.05 * slope / norm for part, slope in zip(here, slopes, strict=True)])
            second = entropy(net(frames))[reliable]
            second = second[second < SURE]
            if len(second):
                loss = second.mean()
                optimizer.zero_grad()
                loss.backward()
                net.set(here)
                optimizer.step()
                value = float(loss.detach())
                usual = value if usual is None else 0.9 * usual + 0.1 * value
            else:
                net.set(here)
        if usual is not None and usual < 0.2 * math.log(CLASSES) / math.log(1_000):
            net.set(net.source)
            optimizer, usual = torch.optim.SGD(net.affine, STEP, momentum=0.9), None
        return logits.detach(), net.flat()

    return step


def deyo(setup: Setup) -> Loop:
    net = Net()
    optimizer, turns = torch.optim.Adam(net.affine, STEP), count()

    def step(frames: Tensor) -> tuple[Tensor, Tensor]:
        logits, chance = net(frames), keys(next(turns))
        unsure = entropy(logits.detach()) < 0.5 * math.log(CLASSES)
        if bool(unsure.any()):
            with torch.no_grad():
                broken = net(shuffle_patches(frames[unsure], 4, chance[unsure])).softmax(1)
            whole = logits.detach()[unsure].softmax(1)
            label = whole.argmax(1, keepdim=True)
            drop = (whole.gather(1, label) - broken.gather(1, label)).squeeze(1)
            used, drop = entropy(logits[unsure])[drop > 0.2], drop[drop > 0.2]
            if len(used):
                weight = 1 / torch.exp(used.detach() - SURE) + 1 / torch.exp(-drop)
                descend(optimizer, (used * weight).mean())
        return logits.detach(), net.flat()

    return step


def roid(setup: Setup) -> Loop:
    net = Net()
    optimizer, turns = torch.optim.Adam(net.affine, STEP), count()
    usual = torch.full((CLASSES,), 1 / CLASSES)

    def to_range(values: Tensor) -> Tensor:
        return (values - values.min()) / (values.max() - values.min())

    def step(frames: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal usual
        logits, chance = net(frames), keys(next(turns))
        p = logits.detach().softmax(1)
        diverse = to_range(1 - F.cosine_similarity(usual[None], p, dim=1))
        weight = torch.exp(diverse * to_range(-entropy(logits.detach())) * 3)
        kept = diverse >= diverse.mean()
        usual = 0.9 * usual + 0.1 * p.mean(0)
        clipped = logits.softmax(1).clamp(0, 0.99)
        likelihood = -(clipped * torch.log(clipped / (1 - clipped) + 1e-5)).sum(1)
        view, own = net(augmented(frames[kept], *PLAIN, chance[kept])), logits[kept]
        agree = -((own.softmax(1) * view.log_softmax(1)).sum(1) + (view.softmax(1) * own.log_softmax(1)).sum(1)) / 2
        descend(optimizer, ((likelihood[kept] + agree) * weight[kept]).sum() / FRAMES)
        net.set([0.99 * now + 0.01 * then for now, then in zip(net.affine, net.source, strict=True)])
        prior = p.mean(0)
        smooth = max(1 / FRAMES, 1 / CLASSES) / prior.max()
        return logits.detach() * (prior + smooth) / (1 + smooth * CLASSES), net.flat()

    return step


def cotta(setup: Setup) -> Loop:
    net, teacher, anchor = Net(), Net(), Net()
    optimizer, turns = torch.optim.Adam(net.affine, STEP), count()

    def step(frames: Tensor) -> tuple[Tensor, Tensor]:
        logits, chance = net(frames), 4 * keys(next(turns))
        with torch.no_grad():
            assert float(anchor(frames).softmax(1).amax(1).mean()) < 0.92
            wanted = torch.stack([teacher(augmented(frames, *PLAIN, chance + view)) for view in range(4)]).mean(0)
        descend(optimizer, -(wanted.softmax(1) * logits.log_softmax(1)).sum(1).mean())
        teacher.set([0.9 * old + 0.1 * new for old, new in zip(teacher.affine, net.affine, strict=True)])
        return wanted, teacher.flat()

    return step


LOOPS = {"eata": eata, "sar": sar, "deyo": deyo, "roid": roid, "cotta": cotta}
OPTIONS = {"cotta": {"augmentations": 4}}


@pytest.mark.parametrize("name", LOOPS)
def test_a_method_is_the_published_loop(setup: Setup, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cotta, "decay", 0.9)  # or twenty turns would not show what the teacher does
    monkeypatch.setattr(Cotta, "restore", 0.0)  # a draw of its own
    loop = LOOPS[name](setup)
    method = build(name, setup, step_size=STEP, **OPTIONS.get(name, {}))
    state, stream = method.fresh(1), torch.zeros(FRAMES, dtype=torch.long)
    random = torch.Generator().manual_seed(5)
    for turn in range(20):
        frames = torch.randn(FRAMES, 1, 8, 8, generator=random) * (1 + 0.1 * (turn % 3)) + 0.2 * (turn % 4)
        forward = method.predict(frames, stream, state)
        state = method.update(forward).state
        answer, affine = loop(frames)
        torch.testing.assert_close(forward.answer, answer, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(state["affine"][0], affine, rtol=1e-3, atol=1e-4)
    assert float((state["affine"] - setup.model.source_affine).abs().max()) > 0.5 * STEP


class Memory:
    """RoTTA's, as lists: per class [frame, uncertainty, age]."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.items: list[list[list[float]]] = [[] for _ in range(CLASSES)]

    def add(self, frame: float, label: int, uncertainty: float) -> None:
        sizes = [len(items) for items in self.items]
        if sizes[label] >= self.capacity / CLASSES:
            room = self._make_room([label], uncertainty)
        elif sum(sizes) >= self.capacity:
            room = self._make_room([c for c, size in enumerate(sizes) if size == max(sizes)], uncertainty)
        else:
            room = True
        if room:
            self.items[label].append([frame, uncertainty, 0])
        for item in (item for items in self.items for item in items):
            item[2] += 1

    def _make_room(self, labels: list[int], uncertainty: float) -> bool:
        worst = max((self._score(*item[1:]), c, i) for c in labels for i, item in enumerate(self.items[c]))
        if worst[0] > self._score(uncertainty, 0):
            self.items[worst[1]].pop(worst[2])
            return True
        return False

    def _score(self, uncertainty: float, age: float) -> float:
        return 1 / (1 + math.exp(-age / self.capacity)) + uncertainty / math.log(CLASSES)


def test_rottas_memory_holds_what_lists_would(setup: Setup) -> None:
    method, lists = Rotta(setup, capacity=16, every=1_000_000), Memory(16)
    state, one = copy.deepcopy(method.fresh(1)), torch.zeros(1, dtype=torch.long)
    random = torch.Generator().manual_seed(2)
    often = torch.tensor([8.0, 4, 2, 1, 1, 1, 0.5, 0.5, 0.2, 0.1])
    for turn in range(400):
        label = torch.multinomial(often, 1, generator=random)
        uncertainty = torch.rand(1, generator=random) * math.log(CLASSES)
        lists.add(turn, int(label), float(uncertainty))
        method._remember(state, one, torch.full((1, 1, 8, 8), float(turn)), label, uncertainty)
        rows = zip(state["frames"][0, :, 0, 0, 0], state["label"][0], state["frame_age"][0], strict=True)
        found = sorted((int(frame), int(kind), int(age)) for frame, kind, age in rows if kind >= 0)
        assert found == sorted((frame, c, age) for c in range(CLASSES) for frame, _, age in lists.items[c])
