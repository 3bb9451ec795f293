from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meta.affine import Affine, Estimate
from meta.gradient_frames import gradient_frames
from meta.inputs import Input, Inputs
from meta.learned import GeneratorSettings, LearnedOptimizer
from meta.method import Forward, finite_rows, narrowed
from meta.mgg import GRADIENT_SHARE, MGG
from meta.models import batchnorm_cnn, groupnorm_cnn
from meta.norms import AdaptableModel
from meta.objective import (
    Objective,
    SourceStatistics,
    deviation,
    discrepancy,
    entropy,
    feature_statistics,
    per_stream_mean,
    running,
)


def make_method(network: torch.nn.Module | None = None, **settings) -> MGG:
    torch.manual_seed(5)
    model = AdaptableModel(network or groupnorm_cnn(classes=5, widths=(8, 8), group=4))
    with torch.no_grad():
        logits, features = model.forward_with_features(torch.randn(64, 1, 12, 12))
        source = feature_statistics(features, logits.softmax(1))
    learned = LearnedOptimizer(GeneratorSettings(hidden=4, **settings), model).eval()
    for name, parameter in learned.named_parameters():
        parameter.requires_grad_(False)
        if name in ("anchor.expand", "rule.shortcut"):  # zero before training: nothing to see
            parameter.copy_(0.02 * torch.randn(parameter.shape))
    return MGG(model, source, learned, 5)


METHOD = make_method()


class Rows(torch.nn.Module):
    """Classifies each position of (B, ch, 2, 2), and takes the mean."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.permute(0, 2, 3, 1).flatten(0, 2)).view(len(x), 4, -1).mean(1)


def lived_in(streams: int, seed: int, method: MGG = METHOD):
    """States that have seen a few updates each, all different."""
    state = method.fresh(streams)
    random = torch.Generator().manual_seed(seed)
    for _ in range(2):
        frames = torch.randn(streams * 3, 1, 12, 12, generator=random)
        stream = torch.arange(streams).repeat_interleave(3)
        state = method.update(method.predict(frames, stream, state)).state
    return state


@given(st.lists(st.integers(1, 6), min_size=1, max_size=7), st.integers(0, 100))
def test_company_changes_nothing(sizes: list[int], seed: int) -> None:
    """Any composition of a pass gives each stream the predictions and next state it has alone."""
    streams = len(sizes)
    state = lived_in(streams, seed)
    frames = torch.randn(sum(sizes), 1, 12, 12, generator=torch.Generator().manual_seed(seed))
    stream = torch.arange(streams).repeat_interleave(torch.tensor(sizes))
    forward = METHOD.predict(frames, stream, state)
    together = METHOD.update(forward)
    for s in range(streams):
        mine = stream == s
        alone_state = {name: tensor[s : s + 1] for name, tensor in state.items()}
        alone_forward = METHOD.predict(frames[mine], torch.zeros(sizes[s], dtype=torch.long), alone_state)
        torch.testing.assert_close(forward.logits[mine], alone_forward.logits, rtol=1e-4, atol=1e-5)
        alone = METHOD.update(alone_forward)
        for name, tensor in alone.state.items():
            torch.testing.assert_close(together.state[name][s : s + 1], tensor, rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("predict", [METHOD.predict, METHOD.serve])
def test_a_stream_without_a_frame_in_the_pass_stays_as_it_is(predict) -> None:
    state = lived_in(2, 1)
    update = METHOD.update(predict(torch.randn(4, 1, 12, 12), torch.zeros(4, dtype=torch.long), state))
    assert all(torch.equal(tensor[1], state[name][1]) for name, tensor in update.state.items())
    assert not torch.equal(update.state["affine"][0], state["affine"][0])


def test_interleaved_frames_are_told_apart() -> None:
    state = lived_in(2, 0)
    frames = torch.randn(6, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    mixed = METHOD.update(METHOD.predict(frames, torch.tensor([0, 1, 0, 1, 1, 0]), state))
    order = torch.tensor([0, 2, 5, 1, 3, 4])
    sorted_ = METHOD.update(METHOD.predict(frames[order], torch.tensor([0, 0, 0, 1, 1, 1]), state))
    torch.testing.assert_close(mixed.state["affine"], sorted_.state["affine"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_as_served_a_quarter_of_the_frames_gives_the_gradient(interleaved: bool) -> None:
    """A single frame is all that there is: then it is the same update. Of more, all count in the statistics."""
    state, sizes = lived_in(3, 0), [1, 1, 16]
    frames = torch.randn(sum(sizes), 1, 12, 12, generator=torch.Generator().manual_seed(2))
    stream = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    if interleaved:
        stream = stream[torch.randperm(len(stream), generator=torch.Generator().manual_seed(3))]
    whole = METHOD.update(METHOD.predict(frames, stream, state))
    forward = METHOD.serve(frames, stream, state)
    assert not forward.logits.requires_grad
    found = METHOD.update(forward)
    for name, tensor in whole.state.items():
        torch.testing.assert_close(found.state[name][:2], tensor[:2], rtol=1e-3, atol=1e-5, msg=name)
    for name in ("feature_mean", "feature_square"):
        torch.testing.assert_close(found.state[name], whole.state[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.signals["novelty"], whole.signals["novelty"], rtol=1e-3, atol=1e-5)
    assert found.signals["frames"].tolist() == sizes
    assert not torch.allclose(found.state["affine"][2], whole.state["affine"][2], atol=1e-6)
    way = [(one.state["affine"] - state["affine"])[2] for one in (found, whole)]
    assert float(torch.cosine_similarity(*way, dim=0)) > 0.7


@pytest.mark.parametrize("interleaved", [False, True])
def test_training_makes_the_updates_that_sites_make(interleaved: bool) -> None:
    state, sizes = lived_in(3, 0), [1, 6, 16]
    frames = torch.randn(sum(sizes), 1, 12, 12, generator=torch.Generator().manual_seed(2))
    stream = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    if interleaved:
        stream = stream[torch.randperm(len(stream), generator=torch.Generator().manual_seed(3))]
    served = METHOD.update(METHOD.serve(frames, stream, state))
    whole = METHOD.predict(frames, stream, state)
    some, chosen = METHOD.subsampled(whole)
    slope, statistics, signals = METHOD.gradient(some, whole=whole)
    trained = METHOD.generate(some, slope.index_select(0, chosen), statistics, signals)
    for name, tensor in served.state.items():
        torch.testing.assert_close(trained.state[name].to(tensor.dtype), tensor, rtol=2e-3, atol=1e-5, msg=name)


def test_only_frames_that_give_a_gradient_are_kept_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no gradient follows is scaled in place."""
    frames, stream, state = torch.randn(16, 1, 12, 12), torch.zeros(16, dtype=torch.long), lived_in(1, 0)
    kept: list[int] = []
    apply = Affine.apply

    def note(x: torch.Tensor, *others: Any) -> Any:
        kept.append(len(x))
        return apply(x, *others)

    monkeypatch.setattr(Affine, "apply", note)
    assert not METHOD.serve(frames, stream, state).logits.requires_grad
    assert set(kept) == {4}
    kept.clear()
    METHOD.predict(frames, stream, state)
    assert set(kept) == {16}


@pytest.mark.parametrize("adapts", [None, [True, False, True], [False, True, False]])
def test_what_is_served_is_what_is_predicted(adapts: list[bool] | None) -> None:
    """Whichever frames have a graph, each is where it was, and so is what the last layer was given."""
    state, sizes = lived_in(3, 0), torch.tensor([5, 1, 16])
    frames = torch.randn(22, 1, 12, 12, generator=torch.Generator().manual_seed(2))
    stream = torch.arange(3).repeat_interleave(sizes)[torch.randperm(22, generator=torch.Generator().manual_seed(3))]
    plain = METHOD.predict(frames, stream, state)
    served = METHOD.serve(frames, stream, state, adapts)
    torch.testing.assert_close(served.logits, plain.logits.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(served.features, plain.features.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(served.head, plain.head, rtol=1e-4, atol=1e-5)
    assert served.gradient_forward is not None
    wanted = [2, 1, 4] if adapts is None else [few * one for few, one in zip([2, 1, 4], adapts, strict=True)]
    assert torch.bincount(served.gradient_forward.stream, minlength=3).tolist() == wanted
    if adapts is not None:  # The others' frames do not matter to an update.
        some = [row for row, one in enumerate(adapts) if one]
        alone = METHOD.update(METHOD.serve(frames, stream, state)).state["affine"][some]
        torch.testing.assert_close(METHOD.update(narrowed(served, some)).state["affine"], alone, rtol=1e-4, atol=1e-6)


def test_single_frames_are_served_with_their_graph() -> None:
    frames, stream = torch.randn(3, 1, 12, 12), torch.arange(3)
    forward = METHOD.serve(frames, stream, lived_in(3, 0))
    assert forward.logits.requires_grad
    assert len(METHOD.gradient(forward)[0]) == 3


def test_the_gradient_comes_from_frames_that_are_spread_evenly() -> None:
    stream = torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 0, 0])
    assert gradient_frames(stream, 3, 2).chosen.tolist() == [2, 5, 7, 9, 3]
    found = gradient_frames(stream, 3, 4)
    assert found.chosen.tolist() == [4, 8, 3]
    assert found.chosen_stream.tolist() == [0, 0, 1]
    assert (found.counts.tolist(), found.chosen_counts.tolist()) == ([8, 2, 0], [2, 1, 0])
    assert torch.cat([found.rest, found.chosen]).index_select(0, found.order).tolist() == list(range(10))
    assert gradient_frames(stream, 3, 4, [False, True, True]).chosen.tolist() == [3]


@pytest.mark.parametrize("size", [1, 2, 4, 5, 16, 64])
def test_the_gradient_is_that_of_a_quarter_and_of_one_frame_at_least(size: int) -> None:
    run: list[int] = []
    handle = METHOD.model.network.register_forward_pre_hook(lambda _, given: run.append(len(given[0])))
    try:
        stream = torch.zeros(size, dtype=torch.long)
        METHOD.update(METHOD.serve(torch.randn(size, 1, 12, 12), stream, METHOD.fresh(1)))
    finally:
        handle.remove()
    some = -(-size // GRADIENT_SHARE)
    assert run == ([size] if size == 1 else [size - some, some])


def test_fresh_streams_predict_as_the_source() -> None:
    frames = torch.randn(4, 1, 12, 12)
    forward = METHOD.predict(frames, torch.tensor([0, 0, 1, 1]), METHOD.fresh(2))
    torch.testing.assert_close(forward.logits, METHOD.model(frames))
    assert torch.equal(forward.answer.argmax(1), METHOD.model(frames).argmax(1))


def test_one_update_moves_each_coordinate_by_at_most_its_limits() -> None:
    method = make_method(anchor_rank=0)
    state = method.fresh(3)
    frames = 5 * torch.randn(9, 1, 12, 12)
    update = method.update(method.predict(frames, torch.arange(3).repeat(3), state))
    moved = (update.state["affine"] - state["affine"]).abs()
    assert 0 < moved.max() <= method.settings.step_limit + method.settings.push_limit


def test_frames_as_the_source_knows_them_leave_the_source_in_charge() -> None:
    method = make_method()
    method.learned.dose_weight.copy_(torch.tensor([2.0, 0.0, 0.0]))
    random = torch.Generator().manual_seed(8)
    doses = []
    for scale in (1.0, 4.0):
        state = method.fresh(1)
        for _ in range(12):
            frames = scale * torch.randn(16, 1, 12, 12, generator=random) + scale - 1
            update = method.update(method.predict(frames, torch.zeros(16, dtype=torch.long), state))
            state = update.state
        doses.append(float(update.signals["dose"]))
    assert doses[0] < doses[1]


@pytest.mark.parametrize("kind", ["group", "batch"])
@pytest.mark.parametrize("adapts", [None, [True, False, False], [False, False, False]])
def test_source_answers_in_the_same_pass_and_changes_nothing_else(kind: str, adapts: list[bool] | None) -> None:
    """Asked for none of the frames, for some, and for all."""
    method = METHOD if kind == "group" else make_method(batchnorm_cnn(5, widths=(8, 8)))
    state = lived_in(3, 8, method)
    random = torch.Generator().manual_seed(8)
    frames, stream = torch.randn(15, 1, 12, 12, generator=random), torch.randint(3, (15,), generator=random)

    def passed(asked: torch.Tensor | None):
        return method.serve(frames, stream, state, adapts, asked)

    plain = passed(None)
    assert plain.source_output is None
    for asked in (torch.tensor([], dtype=torch.long), torch.tensor([14, 3]), torch.arange(15)):
        forward = passed(asked)
        torch.testing.assert_close(forward.logits, plain.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(forward.features, plain.features, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(forward.head, plain.head, rtol=1e-4, atol=1e-5)
        assert {name: t.shape for name, t in forward.kept.items()} == {n: t.shape for n, t in plain.kept.items()}
        if not len(asked):
            assert forward.source_output is None
            continue
        logits, features = method.model.forward_with_features(frames[asked])
        torch.testing.assert_close(forward.source_output.logits, logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            forward.source_output.features[:, : features.shape[1]], features, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(forward.source_output.head, method.model.context.head, rtol=1e-4, atol=1e-5)


def test_a_last_layer_that_sees_something_else_than_frames_is_not_taken_for_one() -> None:
    """Here it sees four rows a frame."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, 2), torch.nn.GroupNorm(2, 8), torch.nn.AdaptiveAvgPool2d(2), Rows(8, 5)
    )
    method = make_method(network)
    frames, stream = torch.randn(8, 1, 12, 12), torch.zeros(8, dtype=torch.long)
    with torch.inference_mode():
        for asked in (None, torch.tensor([1])):
            forward = method.serve(frames, stream, method.fresh(1), [False], asked)
            assert forward.head is None
    assert forward.source_output.head is None
    assert method.serve(frames, stream, method.fresh(1), [True]).head is None


def test_no_micro_batch_replaces_more_than_half_of_the_window() -> None:
    state = METHOD.fresh(2)
    half = METHOD.settings.feature_window // 2
    frames = torch.randn(half, 1, 12, 12, generator=torch.Generator().manual_seed(6))
    stream = torch.tensor([0] * half + [1] * 3 * half)
    update = METHOD.update(METHOD.predict(torch.cat([frames, *[frames] * 3]), stream, state))
    torch.testing.assert_close(update.state["feature_mean"][0], update.state["feature_mean"][1], rtol=1e-4, atol=1e-5)


def test_watched_frames_move_what_is_known_and_not_the_affine() -> None:
    state = lived_in(2, 4)
    forward = METHOD.predict(torch.randn(6, 1, 12, 12), torch.tensor([0, 0, 0, 1, 1, 1]), state)
    watched, updated = METHOD.observe(forward), METHOD.update(forward).state
    assert set(watched) == set(updated)
    for name in ("affine", "offset", "memory_weight", "first_moment", "age", "feature_mean"):
        assert torch.equal(watched[name], state[name]), name
    for name in ("class_last", "class_mix", "class_stay"):
        assert torch.equal(watched[name], updated[name]), name
        assert not torch.equal(watched[name], state[name]), name


def test_source_is_asked_for_each_frame_alone() -> None:
    """A frame whose activations are not finite breaks no other's answer, also where layers keep moments."""
    method = make_method(batchnorm_cnn(5, widths=(8, 8)))
    frames, stream = torch.randn(6, 1, 12, 12), torch.tensor([0, 0, 0, 1, 1, 1])
    frames[1] = torch.nan
    with torch.inference_mode():
        forward = method.serve(frames, stream, method.fresh(2), [False] * 2, torch.arange(6))
    assert torch.isfinite(forward.source_output.logits).all(1).tolist() == [True, False, True, True, True, True]


def test_without_memory_of_gradients_updates_are_finite() -> None:
    method = make_method(momentum_decay=0.0, square_decay=0.0)
    forward = method.predict(torch.randn(4, 1, 12, 12), torch.zeros(4, dtype=torch.long), method.fresh(1))
    assert finite_rows(method.update(forward).state).all()


def test_the_given_state_is_left_alone() -> None:
    state = lived_in(2, 3)
    before = {name: tensor.clone() for name, tensor in state.items()}
    METHOD.update(METHOD.predict(torch.randn(4, 1, 12, 12), torch.tensor([0, 0, 1, 1]), state))
    for name, tensor in before.items():
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize(
    "frames", [torch.zeros(1, 1, 12, 12), torch.ones(1, 1, 12, 12) * 1e4, torch.zeros(8, 1, 12, 12)]
)
def test_single_and_constant_frames_give_finite_states(frames: torch.Tensor) -> None:
    state = METHOD.fresh(1)
    for _ in range(5):
        state = METHOD.update(METHOD.predict(frames, torch.zeros(len(frames), dtype=torch.long), state)).state
    assert finite_rows(state).all()


def test_a_poisoned_stream_is_seen_and_stays_alone() -> None:
    frames = torch.randn(6, 1, 12, 12)
    frames[2] = torch.nan
    state = lived_in(3, 1)
    stream = torch.tensor([0, 0, 1, 1, 2, 2])
    update = METHOD.update(METHOD.predict(frames, stream, state))
    assert finite_rows(update.state).tolist() == [True, False, True]
    clean = torch.cat([frames[:2], frames[4:]])
    others = {name: tensor[[0, 2]] for name, tensor in state.items()}
    expected = METHOD.update(METHOD.predict(clean, torch.tensor([0, 0, 1, 1]), others))
    torch.testing.assert_close(update.state["affine"][[0, 2]], expected.state["affine"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("class_filter", [False, True])
def test_the_gradient_written_out_is_that_of_the_loss(class_filter: bool) -> None:
    """Entropy and standardised distance of each stream, by autograd."""
    method = make_method(class_filter=class_filter, entropy_weight=0.7, discrepancy_weight=3.0)
    settings, known, counts = method.settings, method._source_features, torch.tensor([4.0, 1.0, 20.0, 0.0])
    stream = torch.arange(4).repeat_interleave(counts.long())
    forward = method.predict(torch.randn(25, 1, 12, 12), stream, method.fresh(4))
    # A feature that never varies: its deviation is clamped, and has no gradient.
    forward.features.data[:, 0] = known.mean[0]
    forward.state["feature_square"][:, 0] = known.mean[0] ** 2
    _, moved, signals = method.objective(forward)

    each, window = counts.clamp_min(1), settings.feature_window
    weight = each.clamp(max=window / 2)
    mean = running(forward.state["feature_mean"], per_stream_mean(forward.features, stream, each), weight, window)
    squares = per_stream_mean(forward.features**2, stream, each)
    square = running(forward.state["feature_square"], squares, weight, window)
    std = (square - mean**2).clamp_min(1e-5).sqrt()
    share = settings.class_share
    expected, expected_std = known.expected(share * moved["feature_classes"] + (1 - share) / method.classes)
    gaps = ((mean - expected) / known.scale) ** 2 + ((std - expected_std) / known.scale) ** 2
    distance = gaps[:, : method.model.feature_count].mean(1)
    loss = 0.7 * per_stream_mean(entropy(forward.logits), stream, each) + 3.0 * distance
    torch.testing.assert_close(signals["loss"], loss.detach())
    torch.testing.assert_close(moved["feature_square"], square.detach())
    (expected_gradient,) = torch.autograd.grad(loss.sum(), [forward.rows], retain_graph=True)
    torch.testing.assert_close(method.gradient(forward)[0], expected_gradient, rtol=1e-4, atol=1e-6)


def test_step_scale_scales_the_step() -> None:
    frames, stream, state = torch.randn(4, 1, 12, 12), torch.zeros(4, dtype=torch.long), METHOD.fresh(1)
    full = METHOD.update(METHOD.predict(frames, stream, state)).state["affine"] - METHOD.model.source_affine
    assert full.abs().max() > 0
    half_method = METHOD.for_site(0.5)
    half = half_method.update(half_method.predict(frames, stream, state)).state["affine"] - METHOD.model.source_affine
    torch.testing.assert_close(half, full / 2, rtol=1e-3, atol=1e-7)


def test_what_is_worked_out_for_a_site_changes_nothing() -> None:
    state = lived_in(3, seed=4)
    frames, stream = torch.randn(12, 1, 12, 12), torch.arange(3).repeat_interleave(4)
    site = METHOD.for_site(1.0)
    own, known = (method.update(method.serve(frames, stream, state)) for method in (METHOD, site))
    torch.testing.assert_close(known.state, own.state, rtol=0, atol=0)
    torch.testing.assert_close(known.signals, own.signals, rtol=0, atol=0)


def test_inputs_come_in_the_order_of_their_names() -> None:
    model, size = METHOD.model, METHOD.model.coordinates
    counts, norm, age = torch.tensor([4.0, 2.0]), torch.rand(2), torch.tensor([3.0, 9.0])
    gradient, power, first, offset = (torch.randn(2, size) for _ in range(4))
    gaps = {name: torch.randn(2, METHOD.source.mean.numel()) for name in ("gap_mean", "gap_std")}
    signals = {"entropy": torch.rand(2), "discrepancy": torch.rand(2), **gaps}
    given = counts, gradient, norm, power.abs(), (first, first.abs()), age, offset, signals
    names: tuple[Input, ...] = ("age", "raw", "entropy", "kind", "batch", "offset")
    together = Inputs(model, names, (0.9, 0.99), 5).of(*given)
    for row, name in enumerate(names):
        torch.testing.assert_close(together[:, row : row + 1], Inputs(model, (name,), (0.9, 0.99), 5).of(*given))
    torch.testing.assert_close(together[:, 0], age.rsqrt().unsqueeze(1).expand(-1, size))
    torch.testing.assert_close(together[:, 1], gradient.clamp(-3, 3))


def test_entropy_is_that_of_torch() -> None:
    logits = torch.randn(6, 5) * 3
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy(logits), expected)


def test_running_statistics_start_at_the_source_and_follow_the_frames() -> None:
    source = SourceStatistics(torch.zeros(3), torch.ones(3))
    mean = source.mean.expand(1, -1)
    assert discrepancy(mean, source.square.expand(1, -1), source).item() == pytest.approx(0, abs=1e-6)
    far = torch.full((1, 3), 4.0)
    off = discrepancy(torch.full((1, 3), -2.0), torch.full((1, 3), 4.0 + 9.0), source)  # by two deviations, three wide
    assert off.item() == pytest.approx(2**2 + 2**2)
    for _ in range(200):
        mean = running(mean, far, torch.tensor([1.0]), window=32).detach()
    torch.testing.assert_close(mean, far, rtol=0.01, atol=0)


def test_the_gaps_of_a_stream_are_those_of_its_running_statistics() -> None:
    """Of a window of four frames half are new, however many come; the last feature is outside of the distance."""
    source = SourceStatistics(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 1.0]))
    objective = Objective(source, 2, entropy_weight=1.0, discrepancy_weight=0.5, window=4, class_share=0.0)
    state = {
        "feature_mean": source.mean[None],
        "feature_square": source.square[None],
        "feature_classes": torch.ones(1, 2) / 2,
    }
    features, logits = torch.randn(6, 3) * 3 + 1, torch.randn(6, 2)
    forward = Forward(logits, features, None, torch.zeros(6, dtype=torch.long), torch.tensor([6.0]), state)
    _, moved, signals = objective(forward)
    kept = 0.75**2
    mean = kept * source.mean + (1 - kept) * features.mean(0)
    std = (kept * source.square + (1 - kept) * features.square().mean(0) - mean**2).sqrt()
    gap, wide = (mean - source.mean) / source.std, (std - source.std) / source.std
    squared = gap**2 + wide**2
    expected = {
        "entropy": entropy(logits).mean()[None],
        "discrepancy": squared[:2].mean()[None],
        "novelty": squared[2:],
        "gap_mean": gap[None],
        "gap_std": (std / source.std).log()[None],
    }
    expected["loss"] = expected["entropy"] + 0.5 * expected["discrepancy"]
    torch.testing.assert_close(signals, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved["feature_mean"], mean[None])


def test_running_statistics_do_not_depend_on_how_frames_are_batched() -> None:
    values = torch.ones(12, 2)
    one_by_one = torch.zeros(1, 2)
    for value in values:
        one_by_one = running(one_by_one, value[None], torch.tensor([1.0]), 32)
    at_once = running(torch.zeros(1, 2), values.mean(0, keepdim=True), torch.tensor([12.0]), 32)
    torch.testing.assert_close(one_by_one, at_once)


def test_per_stream_mean() -> None:
    values = torch.tensor([1.0, 3.0, 10.0])
    torch.testing.assert_close(
        per_stream_mean(values, torch.tensor([0, 0, 1]), torch.tensor([2.0, 1.0])), torch.tensor([2.0, 10.0])
    )


class Plain:
    """A correction that changes nothing, whatever its strength."""

    def under(self, strength: torch.Tensor) -> "Plain":
        return self

    def of(self, channels: slice, mean: torch.Tensor, square: torch.Tensor) -> Estimate:
        return Estimate.fixed(torch.ones_like(mean), torch.zeros_like(mean))


@pytest.mark.parametrize(("start", "slope"), [(1.0, 0.0), (-0.4, 3.0), (0.2, 0.5)])
def test_the_correction_of_single_frames_follows_the_dose(start: float, slope: float) -> None:
    method = make_method(correction_start=start, correction_slope=slope, dose_shift=-4.0)
    method.model.correction = Plain()
    frames, stream = torch.randn(8, 1, 12, 12), torch.arange(4).repeat(2)
    frames[stream == 3] *= 9
    update = method.update(method.serve(frames, stream, method.fresh(4)))
    dose = update.signals["dose"]
    torch.testing.assert_close(update.state["correction"], (start + slope * dose).clamp(0, 1))


def test_a_shifted_dose_goes_less_of_the_way_from_source() -> None:
    frames, stream = torch.randn(16, 1, 12, 12), torch.zeros(16, dtype=torch.long)
    whole, less = (
        method.update(method.serve(frames, stream, method.fresh(1)))
        for method in (METHOD, make_method(dose_shift=-2.0))
    )
    expected = torch.sigmoid(torch.logit(whole.signals["dose"].double()) - 2).float()
    torch.testing.assert_close(less.signals["dose"], expected, rtol=1e-4, atol=1e-5)
    source = METHOD.model.source_affine
    way = (whole.state["affine"] - source) * (less.signals["dose"] / whole.signals["dose"])
    torch.testing.assert_close(less.state["affine"] - source, way, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("classes_known", [True, False])
def test_channels_that_are_always_off_are_nothing_unusual(classes_known: bool) -> None:
    random = torch.Generator().manual_seed(0)
    features = torch.rand(64, 6, generator=random)
    features[:, 3:] = 0
    source = feature_statistics(features, torch.full((64, 2), 0.5) if classes_known else None)
    mean, std = source.expected(torch.full((1, 2), 0.5))
    torch.testing.assert_close(std, deviation(mean, source.square))
