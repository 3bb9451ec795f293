"""Signals of a pass, their running means, and what becomes of them when parameters go back."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from meta.bundle import Bundle
from meta.proxies import SHADOW, SIGNALS, WINDOW, Observed, Observer, as_source, fold, rank_among
from schemas.state import RunningProxies

ENTROPIES = [0.1, 0.2, 0.3, 0.4]


@pytest.fixture
def observer(tiny_bundle: Bundle) -> Observer:
    return Observer(tiny_bundle.model, tiny_bundle.statistics, 0.3, ENTROPIES)


def seen(
    observer: Observer, bundle: Bundle, moved: float = 0.0, streams: int = 2
) -> tuple[list[Observed], torch.Tensor]:
    torch.manual_seed(0)
    frames, stream = torch.randn(streams * 8, 1, 28, 28), torch.arange(streams).repeat_interleave(8)
    state = bundle.method.fresh(streams)
    state["affine"] = state["affine"] + moved * torch.randn_like(state["affine"][0])
    forward = bundle.method.predict(frames, stream, state)
    chosen = torch.arange(4)  # of the first stream only
    return observer.observe(frames, forward, chosen)[0], forward.logits.detach()


def test_signals_are_means_over_each_streams_own_frames(observer: Observer, tiny_bundle: Bundle) -> None:
    (first, second), logits = seen(observer, tiny_bundle, 0.3)
    for one, own in zip((first, second), logits.split(8), strict=True):
        highest = own.softmax(1).amax(1)
        assert one.own["confidence"] == pytest.approx(float(highest.mean()), abs=1e-5)
        assert one.own["above"] == pytest.approx(float((highest >= 0.3).float().mean()))
        assert one.own["distance"] > 0
    assert (first.shadowed, second.shadowed) == (4, 0)
    assert (second.rank, second.flipped) == (None, None)
    assert set(first.own) | set(first.shadow) <= set(SIGNALS)


def test_parameters_of_source_agree_with_source(observer: Observer, tiny_bundle: Bundle) -> None:
    (first, _), _ = seen(observer, tiny_bundle)
    assert (first.shadow["flips"], first.shadow["moved"], first.flipped) == (0, 0, 0)
    assert first.own["distance"] == 0
    assert first.shadow["gap"] == pytest.approx(0, abs=1e-6)
    (moved, _), _ = seen(observer, tiny_bundle, 3.0)
    assert moved.shadow["gap"] != 0
    assert moved.shadow["source_confidence"] == first.shadow["source_confidence"]


def test_ranks_lie_among_those_of_clean_frames() -> None:
    ranks = rank_among(torch.tensor(ENTROPIES), torch.tensor([0.0, 0.25, 0.3, 9.0]))
    assert ranks.tolist() == pytest.approx([-0.5, 0.0, 0.125, 0.5])


def test_running_means_are_plain_at_first_and_then_forget() -> None:
    proxies, values = RunningProxies(), [0.0, 1.0]
    for value in values:
        one = Observed(16, {"confidence": value}, 8, {"flips": value})
        proxies = fold(proxies, one, {}, None)
    assert proxies.signals == {"confidence": 0.5, "flips": 0.5}
    assert proxies.shadowed == 16
    one = Observed(16, {"confidence": 0.5}, 0, {})
    late = proxies.model_copy(update={"frames": 10_000})
    assert fold(late, one, {}, None).signals == {"confidence": 0.5, "flips": 0.5}
    late.signals["confidence"] = 0.0
    assert fold(late, one, {}, None).signals["confidence"] == pytest.approx(0.5 * 16 / WINDOW)


def test_what_source_said_fades_with_the_frames_in_between() -> None:
    def after(between: int) -> RunningProxies:
        frames = 4_000 + between
        before = RunningProxies(frames=frames, signals={"flips": 0.0}, shadowed=500, shadowed_at=4_000)
        return fold(before, Observed(16, {}, 16, {"flips": 1.0}), {}, None)

    assert after(0).signals["flips"] == pytest.approx(16 / WINDOW)
    assert after(240).signals["flips"] == pytest.approx(1 - math.exp(-1))
    assert after(0).shadowed_at == 4_016
    unseen = fold(after(0), Observed(16, {}, 0, {}), {}, None)
    assert unseen.shadowed_at == 4_016
    old = RunningProxies(frames=9_000, signals={"flips": 0.0}, shadowed=500)  # as older versions stored it
    assert fold(old, Observed(16, {}, 16, {"flips": 1.0}), {}, None).signals["flips"] == pytest.approx(16 / WINDOW)


def test_features_that_move_show_where_they_move(tiny_bundle: Bundle, observer: Observer) -> None:
    model = tiny_bundle.model
    frames, stream = torch.randn(16, 1, 28, 28), torch.zeros(16, dtype=torch.long)
    forward = tiny_bundle.method.predict(frames, stream, tiny_bundle.method.fresh(1))
    last = model.feature_count - model.layers[-1].feature_count
    moved = replace(forward, features=forward.features.detach().clone(), logits=forward.logits.detach() + 3)
    moved.features[:, last : model.feature_count] += 50
    none = torch.empty(0, dtype=torch.long)
    (plain,), (odd,) = (observer.observe(frames, one, none)[0] for one in (forward, moved))
    assert odd.own["discrepancy_last"] > plain.own["discrepancy_last"] + 1
    assert odd.own["discrepancy_middle"] == pytest.approx(plain.own["discrepancy_middle"])
    assert odd.own["energy"] == pytest.approx(plain.own["energy"] + 3, abs=1e-4)
    assert odd.own["confidence"] == pytest.approx(plain.own["confidence"], abs=1e-5)


def test_signals_that_are_not_finite_are_left_out() -> None:
    proxies = fold(RunningProxies(), Observed(8, {}, 0, {}), {"novelty": float("nan"), "dose": 0.5}, None)
    assert set(proxies.signals) == {"dose"}
    fold(RunningProxies(), Observed(8, {}, 0, {}), {"novelty": -5.0, "loss": 3.0}, None)


def test_parameters_that_went_back_are_known_by_what_source_did() -> None:
    signals = dict.fromkeys(SIGNALS, 0.25) | dict.fromkeys(SHADOW, 0.75)
    before = RunningProxies(frames=900, shadowed=100, signals=signals, accuracy=0.2, low=0.1, source_accuracy=0.8)
    after = as_source(before)
    assert after.accuracy == 0.8
    assert after.low is None
    assert after.signals["confidence"] == after.signals["source_confidence"] == 0.75
    assert (after.signals["flips"], after.signals["distance"]) == (0, 0)
    assert "dose" not in after.signals
    assert after.frames < WINDOW
    assert after.shadowed_at is None
