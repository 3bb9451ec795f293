import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from meta.baselines import BASELINES, Baseline, Setup, build
from meta.baselines.base import Adam, Sgd, position_in_stream, uniforms
from meta.baselines.entropy import shuffle_patches
from meta.baselines.own import Oracle
from meta.baselines.roid import soft_likelihood_ratio
from meta.benchmark.user_code import check_streams_apart
from meta.method import State, finite_rows
from meta.models import batchnorm_cnn, groupnorm_cnn
from meta.norms import AdaptableModel
from meta.objective import feature_statistics
from schemas.errors import BundleError

CLASSES, SIDE = 5, 8


def make_setup(kind: str) -> Setup:
    torch.manual_seed(3)
    network = {
        "group": lambda: groupnorm_cnn(CLASSES, widths=(8, 8), group=4),
        "batch": lambda: batchnorm_cnn(CLASSES, widths=(8, 8)),
    }[kind]()
    # A head that is sure of itself: methods with thresholds on entropy then use some of the frames.
    network[-1].weight.data *= 6
    model = AdaptableModel(network)
    frames = torch.randn(64, 1, SIDE, SIDE)
    with torch.no_grad():
        source = feature_statistics(model.forward_with_features(frames)[1])
    return Setup(model, source, CLASSES, torch.zeros(1), torch.ones(1), frames, (1, SIDE, SIDE))


SETUPS = {kind: make_setup(kind) for kind in ("group", "batch")}
FAST: dict[str, dict] = {
    "cotta": {"augmentations": 2},
    "rotta": {"capacity": 6, "every": 4, "rate": 0.5},
    "deyo": {"drop": 0.0},
}


def make(name: str, kind: str, **options) -> Baseline:
    if "step_size" in BASELINES[name].published:
        options = {"step_size": 0.002 if name == "sgd" else 0.02} | options
    return build(name, SETUPS[kind], **{**FAST.get(name, {}), **options})


METHODS = {(name, kind): make(name, kind) for name in BASELINES for kind in SETUPS}
METHODS |= {("bn", kind): make("bn", "batch", statistics=kind, amount=4.0) for kind in ("batch", "prior", "running")}
METHODS[("tent", "running")] = make("tent", "batch", statistics="running", amount=8.0)


def drawn(count: int, seed: int) -> Tensor:
    return torch.randn(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def advance(method: Baseline, frames: Tensor, stream: Tensor, state: State) -> tuple[Tensor, State]:
    forward = method.predict(frames, stream, state)
    if isinstance(method, Oracle):
        method.labels = (frames.flatten(1).sum(1).abs() * 10).long() % CLASSES
    return forward.logits.detach(), method.update(forward).state


def lived_in(method: Baseline, streams: int, steps: int = 3) -> State:
    state = method.fresh(streams)
    for step in range(steps):
        stream = torch.arange(streams).repeat_interleave(3)
        _, state = advance(method, drawn(3 * streams, step), stream, state)
    return state


@pytest.mark.parametrize("key", METHODS, ids="-".join)
@settings(max_examples=6)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 50))
def test_company_changes_nothing(key: tuple[str, str], sizes: list[int], seed: int) -> None:
    """Any composition of a pass gives each stream the predictions and the next state it has alone."""
    method = METHODS[key]
    state = lived_in(method, len(sizes))
    frames = drawn(sum(sizes), seed)
    stream = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    shuffled = torch.randperm(len(stream), generator=torch.Generator().manual_seed(seed))
    stream = stream[shuffled]
    logits, together = advance(method, frames, stream, state)
    for s, size in enumerate(sizes):
        mine = stream == s
        alone_state = {name: tensor[s : s + 1] for name, tensor in state.items()}
        expected, alone = advance(method, frames[mine], torch.zeros(size, dtype=torch.long), alone_state)
        torch.testing.assert_close(logits[mine], expected, rtol=1e-3, atol=2e-3)
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name][s : s + 1], tensor, rtol=1e-2, atol=2e-3, msg=name)


@pytest.mark.parametrize("key", [key for key in METHODS if key[0] != "oracle"], ids="-".join)
def test_the_check_of_users_own_methods_lets_them_pass(key: tuple[str, str]) -> None:
    assert check_streams_apart(key[0], METHODS[key], drawn(12, 6))


@pytest.mark.parametrize("key", METHODS, ids="-".join)
@pytest.mark.parametrize("count", [1, 4])
def test_single_and_constant_frames_of_one_class_give_finite_states(key: tuple[str, str], count: int) -> None:
    method = METHODS[key]
    for value in (0.0, 1.0, 5.0):
        state = method.fresh(1)
        for _ in range(5):
            frames = torch.full((count, 1, SIDE, SIDE), value)
            logits, state = advance(method, frames, torch.zeros(count, dtype=torch.long), state)
            assert logits.isfinite().all()
        assert finite_rows(state).all()


@pytest.mark.parametrize("key", METHODS, ids="-".join)
def test_a_poisoned_stream_stays_alone(key: tuple[str, str]) -> None:
    """NaN frames of one stream: the others go on as if it were not there."""
    method = METHODS[key]
    frames, stream = drawn(6, 9), torch.tensor([0, 0, 1, 1, 2, 2])
    frames[2:4] = torch.nan
    state = lived_in(method, 3)
    logits, together = advance(method, frames, stream, state)
    kept = torch.tensor([0, 1, 4, 5])
    others = {name: tensor[[0, 2]] for name, tensor in state.items()}
    expected, alone = advance(method, frames[kept], torch.tensor([0, 0, 1, 1]), others)
    torch.testing.assert_close(logits[kept], expected, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(together["affine"][[0, 2]], alone["affine"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("key", METHODS, ids="-".join)
def test_the_given_state_is_left_alone_and_shapes_stay(key: tuple[str, str]) -> None:
    method = METHODS[key]
    state = lived_in(method, 2)
    before = {name: tensor.clone() for name, tensor in state.items()}
    _, after = advance(method, drawn(8, 4), torch.arange(2).repeat(4), state)
    assert after.keys() == state.keys() == method.fresh(1).keys()
    for name, tensor in before.items():
        assert torch.equal(state[name], tensor), name
        assert (after[name].shape, after[name].dtype) == (tensor.shape, tensor.dtype), name


@pytest.mark.parametrize("key", METHODS, ids="-".join)
def test_no_frames_change_nothing(key: tuple[str, str]) -> None:
    """An empty batch, and a stream without frames in a pass of others."""
    method = METHODS[key]
    state = lived_in(method, 2)
    logits, after = advance(method, drawn(0, 1), torch.zeros(0, dtype=torch.long), state)
    assert logits.shape == (0, CLASSES)
    _, partly = advance(method, drawn(3, 1), torch.zeros(3, dtype=torch.long), state)
    assert finite_rows(after).all()
    assert finite_rows(partly).all()
    if key[0] != "sar":  # Its recovery looks at the mean loss so far, whatever the frames.
        torch.testing.assert_close(after["affine"], state["affine"])
        for name, tensor in state.items():
            torch.testing.assert_close(partly[name][1], tensor[1], msg=name)


@pytest.mark.parametrize("name", ["tent", "sgd", "roid"])
def test_frozen_and_half_precision_weights_adapt_all_the_same(name: str) -> None:
    """A model that was shipped with gradients off, in half precision, or both."""
    torch.manual_seed(0)
    network = batchnorm_cnn(CLASSES, widths=(8, 8)).half().requires_grad_(False)
    setup = Setup(AdaptableModel(network), SETUPS["batch"].source, CLASSES, torch.zeros(1), torch.ones(1))
    method = build(name, setup, step_size=0.01)
    _, state = advance(method, drawn(8, 1), torch.zeros(8, dtype=torch.long), method.fresh(1))
    assert state["affine"].dtype == torch.float32
    assert (state["affine"] - setup.model.source_affine).abs().max() > 1e-5


@pytest.mark.parametrize("key", METHODS, ids="-".join)
def test_frames_that_are_only_predicted_leave_the_parameters_alone(key: tuple[str, str]) -> None:
    """As the worker does it for frames it does not adapt on: in inference mode, predict and observe."""
    method = METHODS[key]
    state = lived_in(method, 2)
    frames, stream = drawn(6, 8), torch.arange(2).repeat(3)
    with torch.inference_mode():
        forward = method.predict(frames, stream, state)
        after = method.observe(forward)
    torch.testing.assert_close(forward.answer, method.predict(frames, stream, state).answer, rtol=1e-4, atol=1e-4)
    assert after.keys() == state.keys()
    assert torch.equal(after["affine"], state["affine"])
    if key[0] == "neo":
        assert after["seen"].tolist() == [12, 12]
    if "norm_mean" in state:
        assert not torch.equal(after["norm_mean"], state["norm_mean"])


@pytest.mark.parametrize("name", sorted(set(BASELINES) - {"source", "bn", "lame", "neo"}))
def test_streams_may_have_step_sizes_of_their_own(name: str) -> None:
    """As if each had its method to itself: that is how tuning tries several at once."""
    sizes = (0.001, 0.004)
    method = make(name, "group")
    state = method.fresh(2) | {"step_size": torch.tensor(sizes)}
    alone = [make(name, "group", step_size=size) for size in sizes]
    states = [one.fresh(1) for one in alone]
    for step in range(3):
        frames, stream = drawn(8, step), torch.arange(2).repeat(4)
        _, state = advance(method, frames, stream, state)
        for s, one in enumerate(alone):
            _, states[s] = advance(one, frames[s::2], torch.zeros(4, dtype=torch.long), states[s])
    for s in range(2):
        torch.testing.assert_close(state["affine"][s : s + 1], states[s]["affine"], rtol=1e-3, atol=1e-4)
    assert state["step_size"].tolist() == pytest.approx(sizes)


LEARNING = sorted(set(BASELINES) - {"source", "bn", "lame", "neo"})


@pytest.mark.parametrize("name", LEARNING)
def test_learners_move_and_fresh_streams_are_the_source(name: str) -> None:
    method = METHODS[name, "group"]
    frames, stream = drawn(16, 5), torch.zeros(16, dtype=torch.long)
    state = method.fresh(1)
    if name != "cotta" and name != "roid":  # These predict through augmentations and a prior.
        torch.testing.assert_close(method.predict(frames, stream, state).logits, method.model(frames))
    for _ in range(4):
        _, state = advance(method, frames, stream, state)
    assert (state["affine"] - method.model.source_affine).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["tent", "eata", "deyo", "sar", "roid"])
def test_entropy_methods_lower_the_entropy(name: str) -> None:
    method = make(name, "group", step_size=0.003)
    frames, stream = drawn(32, 5), torch.zeros(32, dtype=torch.long)
    state = method.fresh(1)
    first = method.update(method.predict(frames, stream, state)).signals["entropy"]
    for _ in range(8):
        _, state = advance(method, frames, stream, state)
    assert method.update(method.predict(frames, stream, state)).signals["entropy"] < first


def test_tent_is_tent() -> None:
    """Against torch's own BatchNorm in training mode and torch's own Adam."""
    network = batchnorm_cnn(CLASSES, widths=(8, 8)).eval()
    model = AdaptableModel(copy.deepcopy(network))
    setup = Setup(model, SETUPS["batch"].source, CLASSES, torch.zeros(1), torch.ones(1))
    method, state = build("tent", setup), None
    network.requires_grad_(False).train()
    affine = [p.requires_grad_() for m in network.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    optimizer = torch.optim.Adam(affine, 1e-3)
    state = method.fresh(1)
    for step in range(5):
        frames = drawn(6, step)
        logits, state = advance(method, frames, torch.zeros(6, dtype=torch.long), state)
        expected = network(frames)
        torch.testing.assert_close(logits, expected.detach(), rtol=1e-3, atol=1e-4)
        torch.distributions.Categorical(logits=expected).entropy().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(state["affine"][0], torch.cat([p.detach() for p in affine]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Sgd(0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
        (Adam(), lambda p: torch.optim.Adam(p, 0.1)),
    ],
)
def test_optimizers_are_those_of_torch(ours, theirs) -> None:
    parameter = nn.Parameter(torch.randn(7))
    optimizer, state, at = theirs([parameter]), ours.fresh(1, 7), parameter.detach().clone()[None]
    for _ in range(6):
        parameter.grad = torch.randn(7)
        direction, state = ours.direction(state, parameter.grad[None])
        at = at - 0.1 * direction
        optimizer.step()
    torch.testing.assert_close(at[0], parameter.detach())


def test_eata_skips_what_is_unsure_or_redundant() -> None:
    method = make("eata", "group")
    unsure = method.predict(drawn(4, 1), torch.zeros(4, dtype=torch.long), method.fresh(1))
    method.limit = 0.0
    _, active, _ = method.loss(unsure)
    assert not active.any()
    method.limit = 10.0
    state = method.fresh(1)
    frames = drawn(1, 1).expand(4, -1, -1, -1)
    _, state = advance(method, frames, torch.zeros(4, dtype=torch.long), state)
    assert state["steps"].item() == 1
    _, state = advance(method, frames, torch.zeros(4, dtype=torch.long), state)
    assert state["steps"].item() == 1


def test_sar_recovers_where_its_loss_is_too_low() -> None:
    method = make("sar", "group")
    state = lived_in(method, 2)
    method.floor = 1e9
    _, after = advance(method, drawn(6, 3), torch.tensor([0, 0, 0, 1, 1, 1]), state)
    torch.testing.assert_close(after["affine"], method.fresh(2)["affine"])
    assert after["mean_loss"].tolist() == [-1.0, -1.0]
    assert make("sar", "group").floor == pytest.approx(0.2 * math.log(CLASSES) / math.log(1_000))


def test_rotta_keeps_a_balanced_memory() -> None:
    """Twenty frames of one class and five of others, six places: no class has more than its share and one."""
    method = make("rotta", "group", capacity=10, every=1_000)
    state = method.fresh(1)
    labels = torch.tensor([0] * 20 + [1, 2, 3, 4, 1])
    zero = torch.zeros(1, dtype=torch.long)
    for label in labels:
        method._remember(state, zero, drawn(1, 0), label[None], torch.tensor([0.1]))
    counts = torch.bincount(state["label"][0][state["label"][0] >= 0].long(), minlength=CLASSES)
    assert counts.tolist() == [2, 2, 1, 1, 1]


def test_rotta_still_learns_at_every_nth_frame_after_as_many_frames_as_float32_counts() -> None:
    method, stream = make("rotta", "group", every=4), torch.zeros(1, dtype=torch.long)
    _, state = advance(method, drawn(1, 0), stream, method.fresh(1))
    state["seen"][:] = 2**24 - 3
    learned = []
    for number in range(8):
        before = state["student"]
        _, state = advance(method, drawn(1, number), stream, state)
        learned.append(not torch.equal(state["student"], before))
    assert learned == [False, False, True, False] * 2


@pytest.mark.parametrize(("name", "kind"), [("cotta", "group"), ("deyo", "group"), ("roid", "group")])
def test_chance_goes_on_after_as_many_updates_as_float32_counts(name: str, kind: str) -> None:
    method, stream = make(name, kind), torch.zeros(1, dtype=torch.long)
    _, state = advance(method, drawn(1, 0), stream, method.fresh(1))
    state["age"][:] = 2**24 - 2
    ages = []
    for number in range(4):
        _, state = advance(method, drawn(1, number), stream, state)
        ages.append(int(state["age"]))
    assert ages == [2**24 - 1, 0, 1, 2]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tent", {"step_size": -1.0}, "step_size -1.0 is below 0"),
        ("tent", {"step_size": math.nan}, "step_size nan"),
        ("tent", {"statistics": "bach"}, "statistics 'bach' is none of source, batch, prior, running"),
        ("neo", {"centre": "sorce"}, "centre 'sorce' is neither origin nor source"),
    ],
)
def test_options_that_a_method_does_not_have(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, SETUPS["group"], **options)


def test_a_method_that_keeps_frames_needs_their_shape() -> None:
    setup = replace(SETUPS["group"], frame_shape=())
    build("tent", setup)
    with pytest.raises(ValueError, match=r"give their shape \(ch, h, w\) as frame_shape"):
        build("rotta", setup)


def test_lame_agrees_with_its_neighbours() -> None:
    """One unsure frame among sure ones of the same look takes their label."""
    method = make("lame", "group")
    logits = torch.tensor([[4.0, 0.0]] * 5 + [[0.0, 0.4]])
    smooth = method._smoothed(logits, torch.ones(6, 3) / math.sqrt(3), torch.zeros(6, dtype=torch.long), 1)
    assert smooth.argmax(1).tolist() == [0] * 6
    torch.testing.assert_close(smooth.exp().sum(1), torch.ones(6))


def test_lame_with_one_neighbour_is_switched_off() -> None:
    """A frame is its own first neighbour."""
    method, frames, stream = make("lame", "group", neighbours=1), drawn(12, 0), torch.zeros(12, dtype=torch.long)
    labels = method.predict(frames, stream, method.fresh(1)).answer.argmax(1)
    assert torch.equal(labels, SETUPS["group"].model(frames).argmax(1))


@pytest.mark.parametrize("case", range(40))
def test_lame_is_the_same_in_large_company_and_in_company_that_takes_long(case: int) -> None:
    """Distances of many frames are worked out in another way; and near ties go on as long as there are rounds."""
    method, random = make("lame", "group"), torch.Generator().manual_seed(case)
    own, others = (5 * case) % 16 + 1, 40
    logits = torch.cat([torch.randn(own, 5, generator=random) * 0.01, torch.randn(others, 5, generator=random) * 1e-4])
    near = torch.randn(1 if case % 2 else own, 64, generator=random) / 8 + 1
    features = torch.cat([near.expand(own, -1), torch.randn(others, 64, generator=random)])
    features = torch.nn.functional.normalize(features, dim=1)
    stream = torch.arange(2).repeat_interleave(torch.tensor([own, others]))
    together = method._smoothed(logits, features, stream, 2)[:own]
    alone = method._smoothed(logits[:own], features[:own], stream[:own], 1)
    torch.testing.assert_close(together.exp(), alone.exp(), rtol=0, atol=1e-4)


def test_neo_subtracts_the_running_mean() -> None:
    method = make("neo", "group")
    frames = drawn(6, 1)
    state = method.fresh(1)
    zero = torch.zeros(3, dtype=torch.long)
    _, state = advance(method, frames[:3], zero, state)
    logits, state = advance(method, frames[3:], zero, state)
    assert state["seen"].item() == 6
    everything = make("neo", "group").predict(frames, torch.zeros(6, dtype=torch.long), method.fresh(1))
    torch.testing.assert_close(logits, everything.logits[3:], rtol=1e-4, atol=1e-3)


def test_neo_keeps_the_start_of_a_stream_without_frames() -> None:
    method = make("neo", "group", centre="source")
    state = method.fresh(2)
    _, after = advance(method, drawn(3, 0), torch.zeros(3, dtype=torch.long), state)
    assert all(torch.equal(after[name][1], tensor[1]) for name, tensor in state.items())


def test_soft_likelihood_ratio_by_hand() -> None:
    p = torch.tensor([0.7, 0.2, 0.1])
    expected = -sum(v * math.log(v / (1 - v) + 1e-5) for v in p.tolist())
    assert soft_likelihood_ratio(p.log()[None]).item() == pytest.approx(expected, rel=1e-4)


def test_shuffled_patches_are_the_same_patches() -> None:
    frames = drawn(3, 2)
    mixed = shuffle_patches(frames, 4, torch.tensor([1, 2, 3]))
    assert not torch.equal(mixed, frames)
    torch.testing.assert_close(mixed.flatten(1).sort(1).values, frames.flatten(1).sort(1).values)
    assert shuffle_patches(torch.randn(2, 3, 7, 9), 4, torch.tensor([1, 2])).shape == (2, 3, 7, 9)


def test_chance_depends_on_the_key_alone_and_is_even() -> None:
    many = uniforms(torch.arange(2_000), 5)
    torch.testing.assert_close(uniforms(torch.tensor([17, 3]), 5), many[[17, 3]])
    assert many.min() >= 0
    assert many.max() < 1
    assert many.mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.corrcoef(many.T).fill_diagonal_(0).abs().max() < 0.1


def test_position_in_stream() -> None:
    assert position_in_stream(torch.tensor([2, 0, 2, 2, 0, 1])).tolist() == [0, 0, 1, 2, 1, 0]


def test_methods_on_features_need_a_linear_classifier() -> None:
    model = AdaptableModel(nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    setup = Setup(model, SETUPS["group"].source, 3, torch.zeros(1), torch.ones(1))
    for name in ("neo", "lame"):
        with pytest.raises(BundleError, match="no linear layer"):
            build(name, setup)


class Squeezed(nn.Module):
    """A linear classifier, if any, registered before the linear layers of a squeeze-and-excitation block."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.head: nn.Module = nn.Linear(6, 3) if linear else nn.Conv2d(6, 3, 1)
        self.first, self.norm = nn.Conv2d(1, 6, 3), nn.GroupNorm(2, 6)
        self.squeeze = nn.Sequential(nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 6), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x))
        x = x * self.squeeze(x.mean((2, 3)))[:, :, None, None]
        return self.head(x.mean((2, 3))) if isinstance(self.head, nn.Linear) else self.head(x).mean((2, 3))


def test_the_classifier_is_the_linear_layer_with_an_output_per_class() -> None:
    frames, stream = torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    model = AdaptableModel(Squeezed(linear=True))
    setup = Setup(model, SETUPS["group"].source, 3, torch.zeros(1), torch.ones(1), None, (1, 8, 8))
    method = build("neo", setup)
    assert method.predict(frames, stream, method.fresh(1)).answer.shape == (4, 3)
    convolved = AdaptableModel(Squeezed(linear=False))
    with pytest.raises(BundleError, match="no linear layer with an output for each class"):
        build("neo", Setup(convolved, SETUPS["group"].source, 3, torch.zeros(1), torch.ones(1)))


class TwoHeads(Squeezed):
    """A second head is registered last and runs, too; or there is more behind the classifier than nothing."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__(linear=True)
        self.factor, self.other = factor, nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.other(x.new_zeros(len(x), 6))
        return super().forward(x) * self.factor


@pytest.mark.parametrize("name", ["neo", "lame"])
def test_the_classifier_is_the_layer_whose_output_is_the_answer(name: str) -> None:
    def setup(factor: float) -> Setup:
        model = AdaptableModel(TwoHeads(factor))
        return Setup(model, SETUPS["group"].source, 3, torch.zeros(1), torch.ones(1), None, (1, 8, 8))

    with pytest.raises(BundleError, match="the output of none of its linear layers as it is"):
        build(name, setup(2.0))
    with pytest.raises(ValueError, match="as frame_shape of the Setup"):
        build(name, replace(setup(1.0), frame_shape=()))
    known = setup(1.0)
    assert build(name, known).head is known.model.network.head


def test_the_oracle_asks_for_its_labels() -> None:
    method = build("oracle", SETUPS["group"])
    with pytest.raises(ValueError, match="needs the labels"):
        method.update(method.predict(drawn(2, 1), torch.zeros(2, dtype=torch.long), method.fresh(1)))
