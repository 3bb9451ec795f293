import copy
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from torch import nn

from meta.bundle import load_bundle
from meta.models import build_network
from meta.norms import AdaptableModel
from meta.proxies import SIGNALS
from schemas.config import Guard as GuardSettings
from schemas.frame import Position
from schemas.state import RunningProxies, StreamHeader, decode_header, encode_header
from schemas.state_tensors import StreamState
from worker.batch.batcher import MicroBatch
from worker.decode.image import DecodedFrame
from worker.decode.pixels import blank_frames, normalise_pixels
from worker.engine.engine import Engine
from worker.engine.header import next_header, next_proxies
from worker.engine.judge import judge
from worker.engine.passes import BatchPrediction, Fixed
from worker.engine.predictions import answer_fixed
from worker.guard.guard import Guard


def batch(stream: str, count: int, seed: int = 0, adapt: bool = True) -> MicroBatch:
    random = np.random.default_rng(seed)
    frames = [
        DecodedFrame(
            stream, Position("frames", 0, i), random.integers(0, 255, (28, 28), np.uint8), datetime.now(UTC), 0.0
        )
        for i in range(count)
    ]
    return MicroBatch(stream, frames, adapt, fold=True)


def admit(engine: Engine, *streams: str) -> None:
    for stream in streams:
        engine.admit(engine.begun(stream), token=1, stored=False)


@pytest.fixture
def engine(tiny_bundle) -> Engine:
    engine = Engine(tiny_bundle)
    admit(engine, "a", "b", "c")
    return engine


def step(engine: Engine, batches: list[MicroBatch]) -> None:
    passed = engine.predict(batches)
    proposals = engine.adapt(passed)
    engine.accept(proposals, proposals.proposals)


def test_predictions_are_those_before_the_update(engine: Engine, tiny_bundle) -> None:
    work = batch("a", 6)
    passed = engine.predict([work])
    pixels = normalise_pixels([f.pixels for f in work.frames], tiny_bundle.manifest.preprocess)
    expected = tiny_bundle.model(pixels).argmax(1).tolist()
    assert [row[0] for row in passed.predictions[0].top_index] == expected
    assert all(sum(row) <= 1.0001 for row in passed.predictions[0].top_confidence)


def test_nothing_changes_before_accept_and_only_what_is_accepted(engine: Engine) -> None:
    before = {s: {n: t.clone() for n, t in engine.tensors(s).items()} for s in "ab"}
    passed = engine.predict([batch("a", 6, 1), batch("b", 5, 2)])
    proposals = engine.adapt(passed)
    for s in "ab":
        assert all(torch.equal(t, before[s][n]) for n, t in engine.tensors(s).items())
    engine.accept(proposals, [p for p in proposals.proposals if p.prediction.batch.stream == "b"])
    assert all(torch.equal(t, before["a"][n]) for n, t in engine.tensors("a").items())
    assert not torch.equal(engine.tensors("b")["affine"], before["b"]["affine"])


def test_company_and_slots_do_not_matter(tiny_bundle) -> None:
    alone, together = Engine(tiny_bundle), Engine(tiny_bundle)
    admit(alone, "b")
    admit(together, *(f"other-{i}" for i in range(40)), "b")
    for round_ in range(3):
        step(alone, [batch("b", 5, round_)])
        step(together, [batch("other-3", 7, 90 + round_), batch("b", 5, round_), batch("other-9", 2, 50)])
    for name, tensor in alone.tensors("b").items():
        torch.testing.assert_close(together.tensors("b")[name], tensor, rtol=2e-3, atol=2e-4)


def test_frames_without_an_update_leave_the_parameters(engine: Engine) -> None:
    before = {n: t.clone() for n, t in engine.tensors("a").items()}
    passed = engine.predict([batch("a", 2, adapt=False)])
    assert len(passed.predictions[0].top_index) == 2
    (seen,) = engine.adapt(passed).proposals
    assert not seen.update
    engine.accept(engine.adapt(passed), [seen])
    after = engine.tensors("a")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert "class_last" in changed
    assert not changed & {
        "affine",
        "offset",
        "feature_mean",
        "first_moment",
        "second_moment",
        "memory_weight",
        "memory_bias",
        "age",
    }


def test_an_engine_that_does_not_observe_changes_nothing(tiny_bundle) -> None:
    engine = Engine(tiny_bundle, observe=False)
    admit(engine, "a")
    passed = engine.predict([batch("a", 2, adapt=False)])
    assert engine.adapt(passed).proposals == []
    assert all(torch.equal(t, engine.like[n]) for n, t in engine.tensors("a").items())


def test_released_slots_are_used_again_and_start_clean(engine: Engine) -> None:
    step(engine, [batch("a", 6)])
    engine.release(["a", "unknown"])
    assert "a" not in engine
    admit(engine, "d")
    for name, tensor in engine.like.items():
        assert torch.equal(engine.tensors("d")[name], tensor)


def test_least_recent_streams_go_first(engine: Engine) -> None:
    step(engine, [batch("a", 4)])
    assert engine.least_recent(1, keep=set()) == ["b"]
    assert engine.least_recent(2, keep={"b"}) == ["c", "a"]
    assert engine.least_recent(0, keep=set()) == []


def test_broken_parameters_are_seen_before_they_spread(engine: Engine) -> None:
    engine.tensors("a")["affine"][0] = torch.nan
    passed = engine.predict([batch("a", 4), batch("b", 4)])
    proposals = engine.adapt(passed)
    assert [p.finite for p in proposals.proposals] == [False, True]
    header = next_header(engine.resident("a").header, passed.predictions[0], applied=False)
    assert header.proxies.frames == 0
    StreamHeader.model_validate_json(header.model_dump_json())


def test_header_counts_and_chains(engine: Engine) -> None:
    first = next_header(engine.resident("a").header, engine.predict([batch("a", 4)]).predictions[0], applied=True)
    assert (first.frames, first.step, first.events, first.positions) == (4, 1, 1, {"frames/0": 3})
    second = next_header(first, engine.predict([batch("a", 6)]).predictions[0], applied=False)
    assert (second.frames, second.step, second.events) == (10, 1, 2)
    assert second.folded not in ("", first.folded)


def test_the_chain_of_frames_is_the_same_however_they_are_batched(engine: Engine) -> None:
    frames = batch("a", 6).frames

    def chain(*parts: list[DecodedFrame]) -> str:
        header = engine.resident("a").header
        for part in parts:
            (prediction,) = engine.predict([MicroBatch("a", part, adapt=False, fold=True)]).predictions
            header = next_header(header, prediction, applied=False)
        return header.folded

    assert chain(frames) == chain(frames[:2], frames[2:])
    assert len({chain(frames), chain(frames[:2]), chain(frames[::-1]), chain(frames, frames[5:])}) == 4


def test_probation_ends_with_its_last_frame(engine: Engine) -> None:
    header = engine.resident("a").header.model_copy(update={"probation": 5})
    left = []
    for count in (4, 4, 4):
        header = next_header(header, engine.predict([batch("a", count)]).predictions[0], applied=True)
        left.append(header.probation)
    assert left == [1, 0, 0]


@pytest.mark.parametrize("signal", ["mean_confidence", "mean_entropy"])
def test_answers_that_are_not_finite_change_no_proxies(engine: Engine, signal: str) -> None:
    prediction = engine.predict([batch("a", 4)]).predictions[0]
    before = RunningProxies(frames=9, confidence=0.5, entropy=1.0)
    assert next_proxies(before, prediction, {}, None) != before
    for wrong in (float("nan"), float("inf")):
        assert next_proxies(before, replace(prediction, **{signal: wrong}), {}, None) == before


def test_proxies_are_running_means(engine: Engine) -> None:
    predictions = [engine.predict([batch("a", count, count)]).predictions[0] for count in (4, 6)]
    proxies = engine.resident("a").header.proxies
    for prediction in predictions:
        proxies = next_proxies(proxies, prediction, {"novelty": 1.0}, None)
    assert (proxies.frames, proxies.shadowed, proxies.generated) == (10, 10, 10)
    means = [o.mean_confidence for o in predictions]
    assert proxies.confidence == pytest.approx(0.4 * means[0] + 0.6 * means[1])
    assert set(proxies.signals) == set(SIGNALS) - {"dose"}
    for name in ("confidence", "odd", "marginal", "dropout"):
        expected = 0.4 * predictions[0].observed.own[name] + 0.6 * predictions[1].observed.own[name]
        assert proxies.signals[name] == pytest.approx(expected)


def test_a_sample_of_the_frames_is_answered_by_source_too(engine: Engine) -> None:
    """All of a new stream's; later every sixteenth micro-batch; the same in every repetition."""
    step(engine, [batch("a", 16, 1)])
    work = batch("a", 12, 2)
    passed = engine.predict([work, batch("b", 3, 3)])
    frames = normalise_pixels([f.pixels for f in work.frames], engine.bundle.manifest.preprocess)
    logits = engine.bundle.model(frames)
    seen = passed.predictions[0].observed
    assert seen.shadowed == 12
    assert seen.shadow["source_confidence"] == pytest.approx(float(logits.softmax(1).amax(1).mean()), abs=1e-5)
    answers = torch.tensor([row[0] for row in passed.predictions[0].top_index])
    assert seen.flipped == int((answers != logits.argmax(1)).sum())
    assert list(passed.predictions[0].source_index) == logits.argmax(1).tolist()
    header = engine.resident("a").header
    asked = []
    for events in range(32):
        changed = {"events": events, "proxies": RunningProxies(frames=1_000)}
        engine.resident("a").header = header.model_copy(update=changed)
        asked.append(engine.predict([work]).predictions[0].observed.shadowed)
    assert sorted(asked) == [0] * 30 + [12] * 2
    assert list(passed.predictions[1].source_index) != [None] * 3  # of a new stream
    assert asked[:16] == asked[16:]
    engine.resident("a").header.guard.watchful = 1
    assert engine.predict([work]).predictions[0].observed.shadowed == 12


@pytest.mark.parametrize(("old", "passes"), [(0, [24, 24]), (2, [32])])
def test_source_makes_no_pass_much_larger(engine: Engine, old: int, passes: list[int]) -> None:
    """Three new streams, all of whose frames it is asked for; and one beside two that are not new."""
    for stream in "abc"[:old]:
        resident = engine.resident(stream)
        resident.header = resident.header.model_copy(update={"events": 1, "proxies": RunningProxies(frames=1_000)})
        assert not engine._asks(batch(stream, 8), resident.header)
    sizes: list[int] = []
    hook = engine.bundle.model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    works = [batch(stream, 8, number, adapt=False) for number, stream in enumerate("abc")]
    told = engine.predict(works).predictions[2]
    hook.remove()
    assert sizes == passes
    logits = engine.bundle.model(
        normalise_pixels([f.pixels for f in works[2].frames], engine.bundle.manifest.preprocess)
    )
    assert list(told.source_index) == logits.argmax(1).tolist()


def test_without_a_source_share_source_is_never_asked(tiny_bundle) -> None:
    engine = Engine(tiny_bundle, source_share=0)
    admit(engine, "a")
    seen = engine.predict([batch("a", 4)]).predictions[0].observed
    assert (seen.shadowed, seen.flipped, seen.rank) == (0, None, None)


def test_blank_frames_are_told_from_dark_ones() -> None:
    random = np.random.default_rng(0)
    noisy = random.normal(8, 4, (28, 28)).clip(0, 255).astype(np.uint8)
    dots = np.full((28, 28), 200, np.uint8)
    dots[:2, :2] = 0
    assert blank_frames(np.stack([np.full((28, 28), 77, np.uint8), noisy, dots])).tolist() == [True, False, False]
    colour = np.tile(np.array([10, 90, 200], np.uint8), (1, 300, 300, 1))
    assert blank_frames(colour).tolist() == [True]


@pytest.mark.parametrize("adapt", [True, False])
def test_source_and_approved_parameters_answer_beside_those_that_adapt(engine: Engine, adapt: bool) -> None:
    """Whoever answers, the same parameters adapt, and the means are theirs."""
    step(engine, [batch("a", 6, 1), batch("b", 6, 2), batch("c", 6, 3)])
    for stream in "abc":
        engine.resident(stream).header.step = 5
    tensors = {name: t.clone() for name, t in engine.tensors("b").items()}
    approved = {"affine": tensors["affine"] * 1.3}
    engine.resident("b").approved, engine.resident("b").header.approved = approved, 3
    works = [batch(stream, 6, seed, adapt) for seed, stream in enumerate("abc", 4)]
    plain = engine.predict(works)
    passed = engine.predict(
        [replace(works[0], answer="source"), replace(works[1], answer="approved"), works[2]],
    )
    model, preprocess = engine.bundle.model, engine.bundle.manifest.preprocess
    temperature = engine.bundle.manifest.calibration.temperature
    for prediction, rows, parameters, at in (
        (passed.predictions[0], model.source_affine.expand(6, -1), "source", 0),
        (passed.predictions[1], approved["affine"].expand(6, -1), "approved", 3),
    ):
        pixels = normalise_pixels([f.pixels for f in prediction.batch.frames], preprocess)
        expected = (model(pixels, rows) / temperature).softmax(1).topk(3)
        assert prediction.top_index == expected.indices.tolist()
        assert torch.allclose(torch.tensor(prediction.top_confidence), expected.values, atol=1e-5)
        assert (prediction.parameters, prediction.step) == (parameters, at)
    assert passed.predictions[2].top_confidence == plain.predictions[2].top_confidence
    assert [(o.parameters, o.step) for o in plain.predictions] == [("adapted", 5)] * 3
    assert [o.signals for o in passed.predictions] == [o.signals for o in plain.predictions]
    assert passed.predictions[1].top_confidence != plain.predictions[1].top_confidence


@pytest.mark.parametrize(("share", "asked", "fixed"), [(1 / 16, 8, 3), (0, 0, 7)])
def test_where_source_answers_it_is_run_once(tiny_bundle, share: float, asked: int, fixed: int) -> None:
    """Its answers are what the estimate knows of it, too."""
    engine = Engine(tiny_bundle, source_share=share)
    for stream in "abc":
        admit(engine, stream)
    answers = ("source", "approved", "adapted")
    works = [replace(batch(s, n), answer=a) for s, n, a in zip("abc", (4, 3, 1), answers, strict=True)]
    part = engine.gather(works).passive
    assert part is not None
    assert len(part.shadow) == asked  # streams are new, so all are asked for
    assert part.fixed is not None
    assert len(part.fixed.frames) == fixed
    told = engine.predict(works).predictions[0]
    assert list(told.source_index) == ([top[0] for top in told.top_index] if asked else [None] * 4)


def test_approved_normalisation_statistics_answer_too() -> None:
    """A BatchNorm model that was approved is its affine and its running statistics, and needs no other frames."""
    network = build_network("batchnorm-cnn", {"classes": 4, "channels": 1, "widths": [8, 8]})
    moved = copy.deepcopy(network)
    for norm in filter(lambda module: isinstance(module, nn.BatchNorm2d), moved.modules()):
        norm.running_mean += 0.3
        norm.running_var *= 1.5
    model = AdaptableModel(network)
    frames = torch.randn(5, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    source = {"affine": model.source_affine, "norm_mean": model.source_mean, "norm_variance": model.source_variance}
    approved = {
        "affine": model.source_affine * 1.2,
        "norm_mean": model.source_mean + 0.3,
        "norm_variance": model.source_variance * 1.5,
    }
    both = {name: torch.stack([source[name], approved[name]]) for name in source}
    answers = answer_fixed(model, frames, Fixed(torch.arange(5), torch.tensor([0, 1, 0, 1, 1]), both))
    torch.testing.assert_close(answers[[0, 2]], model(frames[[0, 2]]))
    expected = AdaptableModel(moved)(frames[[1, 3, 4]], approved["affine"].expand(3, -1))
    torch.testing.assert_close(answers[[1, 3, 4]], expected)


@pytest.mark.parametrize("answer", ["adapted", "source"])
def test_hurried_frames_are_answered_by_one_bare_forward_and_teach_nothing(engine: Engine, answer) -> None:
    """Under overload: no class filter, no question to source, and in the state nothing but the position moves."""
    engine.resident("a").header.step = 1
    model, moved = engine.bundle.model, engine.tensors("a")["affine"].add_(0.3)
    hurried = replace(batch("a", 6, adapt=False), answer=answer, hurried=True)
    passed = engine.predict([batch("b", 4), hurried, batch("c", 4, adapt=False)])
    prediction = next(one for one in passed.predictions if one.batch is hurried)
    rows = (moved if answer == "adapted" else model.source_affine).expand(6, -1)
    pixels = normalise_pixels([frame.pixels for frame in hurried.frames], engine.bundle.manifest.preprocess)
    with torch.inference_mode():
        expected = (model(pixels, rows) / engine.bundle.manifest.calibration.temperature).softmax(1).topk(3, 1)
    assert prediction.top_index == expected.indices.tolist()
    assert torch.tensor(prediction.top_confidence).allclose(expected.values, atol=1e-5)
    assert prediction.parameters == answer
    assert prediction.observed is None
    assert {p.prediction.batch.stream for p in engine.adapt(passed).proposals} == {"b", "c"}


def test_a_large_micro_batch_gives_drift_detection_several_signals(engine: Engine) -> None:
    """A mean over 64 frames spreads half as far as one over 16, and would hide what it is compared with."""
    large = replace(batch("a", 40), adapt=False)
    (prediction,) = engine.predict([large]).predictions
    drift = next_header(engine.resident("a").header, prediction, applied=False, drift_frames=8).drift
    assert drift is not None
    assert (drift.seen, drift.rested) == (5, 5)
    assert drift.variance[0] > 0


def test_another_method_is_observed_by_its_answers_and_no_accuracy_is_made_up(tiny_bundle_path) -> None:
    engine = Engine(load_bundle(tiny_bundle_path, method="tent"))
    admit(engine, "a", "b")
    predictions = engine.predict([batch("a", 6), replace(batch("b", 5), adapt=False)]).predictions
    for prediction in predictions:
        assert prediction.observed is not None
        assert prediction.observed.flipped == 0  # nothing has adapted yet
        assert None not in prediction.source_index
        header = next_header(prediction.resident.header, prediction, True, 0, _proxies(engine, prediction))
        assert header.proxies.confidence > 0
        assert engine.estimate(header).estimated_accuracy is None
        assert engine.estimate(header).flip_rate == 0


def test_the_state_of_an_earlier_release_under_another_method_goes_on(tiny_bundle_path) -> None:
    """It has no signals, and its numbers were those of confidence."""
    engine = Engine(load_bundle(tiny_bundle_path, method="tent"))
    begun = engine.begun("a")
    old = begun.header.model_copy(
        update={"step": 40, "frames": 500, "proxies": RunningProxies(frames=500, confidence=0.99, entropy=0.1)}
    )
    engine.admit(StreamState(header=decode_header(encode_header(old)), tensors=begun.tensors), 1, stored=True)
    guard = Guard(GuardSettings(), engine.bundle.limits, engine.bundle.source_accuracy)
    passed = engine.predict([batch("a", 6)])
    proposals = engine.adapt(passed)
    (prediction,) = passed.predictions
    found = judge(engine, guard, prediction, proposals, proposals.proposals[0])
    assert found.ruling.apply
    assert found.header.proxies.frames == 506
    assert engine.estimate(found.header).estimated_accuracy is None


def _proxies(engine: Engine, prediction: BatchPrediction) -> RunningProxies:
    return next_proxies(prediction.resident.header.proxies, prediction, {}, engine.accuracy_model)
