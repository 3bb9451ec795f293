"""What was put out for frames that are held is not worked out again, and nothing else comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meta.bundle import Bundle
from tests.worker.engine.test_engine import admit, batch
from tests.worker.engine.test_engine_properties import NETWORKS, bundle_with, close
from worker.batch.batcher import MicroBatch
from worker.engine.engine import Engine


def held(stream: str, count: int, seed: int = 0) -> MicroBatch:
    """That is only predicted now, and comes again."""
    return replace(batch(stream, count, seed, adapt=False), fold=False)


def more(before: MicroBatch, count: int, adapt: bool = True, fold: bool = True) -> MicroBatch:
    """The same frames, and so many behind them."""
    fresh = batch(before.stream, count, len(before.frames) + 100).frames
    return MicroBatch(before.stream, before.frames + fresh, adapt, fold)


def step(engine: Engine, batches: list[MicroBatch]) -> dict[str, list[list[float]]]:
    """One step as a worker makes it: what is held changes nothing. Each stream's confidences."""
    passed = engine.predict(batches)
    proposals = engine.adapt(passed)
    engine.accept(proposals, [one for one in proposals.proposals if one.prediction.batch.fold])
    for prediction in passed.predictions:
        prediction.resident.header.events += prediction.batch.fold
        if not prediction.batch.fold:
            prediction.resident.seen = prediction.seen
    return {prediction.batch.stream: prediction.top_confidence for prediction in passed.predictions}


@contextmanager
def counted(bundle: Bundle) -> Iterator[list[int]]:
    """How many frames the model runs on, call by call."""
    run: list[int] = []
    handle = bundle.model.network.register_forward_pre_hook(lambda _, given: run.append(len(given[0])))
    yield run
    handle.remove()


def anew(work: MicroBatch) -> MicroBatch:
    """Frames that look the same and are others."""
    return replace(work, frames=[replace(frame) for frame in work.frames])


Round = list[tuple[int, bool, bool]]


@pytest.mark.parametrize("network", [*NETWORKS, "BatchNorm, corrected", "LayerNorm, corrected"])
@settings(max_examples=12)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.booleans()), min_size=3, max_size=3),
        min_size=2,
        max_size=5,
    )
)
def test_that_frames_were_held_changes_nothing(network: str, tiny_bundle_path: Path, rounds: list[Round]) -> None:
    bundle = bundle_with(network, tiny_bundle_path)
    remembers, forgets = Engine(bundle), Engine(bundle)
    names = ["a", "b", "c"]
    waiting: dict[str, MicroBatch] = {}
    for engine in (remembers, forgets):
        admit(engine, *names)
    for number, sizes in enumerate(rounds):
        batches = []
        for name, (count, adapt, fold) in zip(names, sizes, strict=True):
            before = waiting.pop(name, MicroBatch(name, [], False, False))
            frames = before.frames + batch(name, count, 10 * number + count).frames
            if frames:
                batches.append(MicroBatch(name, frames, adapt and fold, fold))
        if not batches:
            continue
        waiting |= {work.stream: work for work in batches if not work.fold}
        found, expected = step(remembers, batches), step(forgets, [anew(work) for work in batches])
        for name, confidences in expected.items():
            close(found[name], confidences)
    for name in names:
        for part, tensor in forgets.tensors(name).items():
            torch.testing.assert_close(remembers.tensors(name)[part], tensor, rtol=1e-3, atol=1e-4)


def test_held_frames_are_run_again_only_where_they_give_a_gradient(tiny_bundle: Bundle) -> None:
    engine = Engine(tiny_bundle, source_share=0)
    admit(engine, "a", "b")
    first, other = held("a", 2), held("b", 3)
    with counted(tiny_bundle) as run:
        step(engine, [first, other])
        second = more(first, 1, adapt=False, fold=False)
        step(engine, [second])
        step(engine, [more(second, 1), more(other, 5)])
    # Of four frames the third gives the gradient, and of eight the third and the seventh.
    assert run == [5, 1, 1 + 4, 1 + 2]


def test_a_pass_of_nothing_new_runs_a_single_frame(tiny_bundle: Bundle) -> None:
    """Not every model can run on none."""
    engine = Engine(tiny_bundle, source_share=0)
    admit(engine, "a")
    first = held("a", 3)
    with counted(tiny_bundle) as run:
        before = step(engine, [first])
        again = step(engine, [more(first, 0, adapt=False)])
    assert run == [3, 1]
    close(again["a"], before["a"])


@pytest.mark.parametrize("change", ["event", "claim", "other frames"])
def test_what_has_changed_since_is_worked_out_anew(tiny_bundle: Bundle, change: str) -> None:
    engine, fresh = Engine(tiny_bundle, source_share=0), Engine(tiny_bundle, source_share=0)
    for one in (engine, fresh):
        admit(one, "a")
    first = held("a", 3)
    step(engine, [first])
    after = more(first, 1)
    if change == "other frames":
        after = anew(after)
    moved = {name: tensor.clone() for name, tensor in engine.like.items()}
    moved["affine"] *= 1.5
    if change == "claim":
        engine.release(["a"])
        admit(engine, "a")
    if change != "other frames":
        engine.replace("a", moved)
        fresh.replace("a", moved)
    if change == "event":
        engine.resident("a").header.events += 1  # A command changes nothing without one.
    with counted(tiny_bundle) as run:
        found = step(engine, [after])
    assert run == [3, 1]
    close(found["a"], step(fresh, [anew(after)])["a"])


def test_only_what_is_held_is_kept_and_only_until_it_is_used(tiny_bundle: Bundle) -> None:
    engine = Engine(tiny_bundle)
    admit(engine, "a", "b", "c")
    first = held("a", 2)
    step(engine, [first, batch("b", 60), held("c", 3)])
    seen = engine.resident("a").seen
    assert engine.resident("b").seen is None
    assert seen is not None
    features = seen.output.features
    assert features.untyped_storage().nbytes() == features.numel() * features.element_size()
    step(engine, [more(first, 4)])
    assert engine.resident("a").seen is None


def test_what_was_kept_goes_with_frames_that_are_hurried(tiny_bundle: Bundle) -> None:
    engine = Engine(tiny_bundle)
    admit(engine, "a")
    first = held("a", 2)
    step(engine, [first])
    assert engine.resident("a").seen is not None
    step(engine, [replace(more(first, 1, adapt=False), hurried=True)])
    assert engine.resident("a").seen is None
