"""An engine on a device that only pretends (`tests.placement`): every tensor is where it belongs, and every answer,
proposal and state is that of an engine on the CPU. No GPU has run any of this."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from meta.bundle import CPU, Bundle, load_bundle
from schemas.config import Guard as GuardSettings
from schemas.config import Method
from schemas.frame import Position
from schemas.state_tensors import decode_tensors, encode_tensors
from tests.placement import DEVICE, Placed, pretended_cuda, waited
from worker.batch.batcher import MicroBatch
from worker.decode.image import DecodedFrame
from worker.engine.engine import Engine
from worker.engine.judge import judge
from worker.engine.passes import Pass, Proposals
from worker.engine.warm_up import warm_up
from worker.guard.guard import Guard

BUNDLES = Path(__file__).parents[3] / "bundles"
GROUPNORM, BATCHNORM, VIT = (BUNDLES / f"fashion-mnist{kind}" for kind in ("", "-batchnorm", "-vit"))
NOW = datetime(2026, 1, 1, tzinfo=UTC)
# What is changed of methods, so that little shows all that they do.
OFTEN = {"cotta": {"augmentations": 2}, "rotta": {"every": 4}, "tent": {"statistics": "running"}}
STREAMS = ("adapts", "watched", "by-source", "approved", "hurried", "source-hurried")


def loaded(folder: Path, method: str, device: torch.device, corrected: bool = True) -> Bundle:
    """Laid out alike on both, for layouts differ in rounding. Without the correction BatchNorm has running moments."""
    bundle = load_bundle(folder, method=method, device=device)
    for name, value in OFTEN.get(method, {}).items():
        assert hasattr(bundle.method, name)
        setattr(bundle.method, name, value)
    if not corrected:
        bundle.model.correction = None
    if device == CPU:
        bundle.model.memory_format = torch.contiguous_format
        bundle.model.network.to(memory_format=torch.contiguous_format)
    assert bundle.model.memory_format is torch.contiguous_format
    return bundle


def batch(stream: str, count: int, seed: int, **about: Any) -> MicroBatch:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 255, (count, 28, 28), np.uint8)
    frames = [DecodedFrame(stream, Position("frames", 0, i), one, NOW, 0.0) for i, one in enumerate(pixels)]
    return MicroBatch(stream, frames, **({"adapt": True, "fold": True} | about))


def admit(engine: Engine, stream: str, tensors: Any = None, approved: Any = None) -> None:
    state = engine.begun(stream).model_copy(update={"tensors": tensors or engine.like})
    engine.admit(state, 1, tensors is not None, approved)


def stored(engine: Engine, stream: str) -> bytes:
    return encode_tensors(engine.tensors(stream), 0)


def told(passed: Pass, proposals: Proposals) -> list[Any]:
    """All that a pass says of its frames and streams, as plain values."""
    predictions = [
        (replace(o, batch=None, resident=None, observed=None), o.observed and asdict(o.observed))  # type: ignore[arg-type]
        for o in passed.predictions
    ]
    said = [(p.prediction.batch.stream, p.row, p.update, p.signals, p.finite, p.layers) for p in proposals.proposals]
    return [predictions, said]


def story(bundle: Bundle) -> Iterator[Any]:
    """What an engine says and keeps from the first frame of some streams to the return of one that went."""
    engine, guard = Engine(bundle), Guard(GuardSettings(), bundle.manifest.limits)
    warm_up(engine, bundle.manifest.preprocess)
    for stream in STREAMS:
        admit(engine, stream)
    approved = {name: engine.tensors("adapts")[name].clone() for name in engine.source}
    for turn, count in enumerate((1, 6, 6)):  # single frames: with a graph; more: some run again for the gradient
        engine.resident("approved").approved = approved if turn else None
        batches = [
            batch("adapts", count, 10 * turn),
            batch("watched", 3, 10 * turn + 1, adapt=False),
            batch("by-source", count, 10 * turn + 2, answer="source"),
            batch("approved", count, 10 * turn + 3, answer="approved"),
            batch("hurried", 2, 10 * turn + 4, adapt=False, hurried=True),
            batch("source-hurried", 2, 10 * turn + 5, adapt=False, hurried=True, answer="source"),
        ]
        passed = engine.predict(batches)
        proposals = engine.adapt(passed)
        yield told(passed, proposals)
        for proposal in proposals.proposals:
            judgement = judge(engine, guard, proposal.prediction, proposals, proposal)
            yield judgement.ruling, judgement.header.model_dump()
            engine.resident(proposal.prediction.batch.stream).header = judgement.header
        moving = [proposal for proposal in proposals.proposals if proposal.update]
        if turn == 1:
            proposals.shrink(moving[0], 0.25)
        if turn == 2:
            proposals.replace(moving[0], engine.like)
        engine.accept(proposals, [proposal for proposal in proposals.proposals if proposal.finite])
        yield [stored(engine, stream) for stream in STREAMS]
        approved = {name: engine.tensors("by-source")[name].clone() for name in engine.source}
    yield from back_and_forth(engine, approved)
    yield from without_source(bundle)


def back_and_forth(engine: Engine, approved: Any) -> Iterator[Any]:
    content = stored(engine, "approved")
    engine.release(["approved"])
    admit(engine, "approved", decode_tensors(content, 0, engine.like), approved)
    yield stored(engine, "approved") == content
    engine.replace("watched", engine.tensors("approved"))
    engine.replace("adapts", engine.like)
    engine.reserve(64)
    yield [stored(engine, stream) for stream in STREAMS]
    yield engine.distances(engine.tensors("watched")["affine"][None], engine.like["affine"][None])
    alone = engine.predict([batch("approved", 4, 99, adapt=False, answer="approved")])
    yield told(alone, engine.adapt(alone))
    assert all(type(t) is torch.Tensor for t in (*engine.like.values(), *engine.tensors("watched").values()))


def without_source(bundle: Bundle) -> Iterator[Any]:
    """Where source is never asked, but answers."""
    engine = Engine(bundle, source_share=0)
    for stream in STREAMS[:3]:
        admit(engine, stream)
    passed = engine.predict(
        [
            batch("adapts", 5, 50),
            batch("watched", 3, 51, adapt=False),
            batch("by-source", 4, 52, answer="source"),
        ]
    )
    yield told(passed, engine.adapt(passed))


def alike(one: Any, other: Any) -> bool:
    """Equal, where not-a-number equals itself."""
    return repr(one) == repr(other)


CASES = [(folder, "mgg", True) for folder in (GROUPNORM, BATCHNORM, VIT, BUNDLES / "fashion-mnist-paper")]
CASES += [(BATCHNORM, method, method != "mgg") for method in get_args(Method)]


@pytest.mark.parametrize(("folder", "method", "corrected"), CASES, ids=lambda value: getattr(value, "name", str(value)))
def test_the_pretended_device_says_what_the_cpu_says(folder: Path, method: str, corrected: bool) -> None:
    expected = list(story(loaded(folder, method, CPU, corrected)))
    with pretended_cuda():
        bundle = loaded(folder, method, DEVICE, corrected)
        assert all(isinstance(tensor, Placed) for tensor in bundle.model.state_dict().values())
        found = list(story(bundle))
    assert len(found) == len(expected)
    for moment, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert alike(one, other), moment


def test_group_normalisation_has_its_input_as_a_gpu_wants_it_whatever_the_network_makes() -> None:
    with pretended_cuda():
        bundle = loaded(GROUPNORM, "mgg", DEVICE)
        bundle.model.memory_format = torch.channels_last
        bundle.model.network.to(memory_format=torch.channels_last)
        engine = Engine(bundle, source_share=0)
        admit(engine, "adapts")
        proposals = engine.adapt(engine.predict([batch("adapts", 6, 1)]))
    assert proposals.proposals[0].finite


def test_the_loop_waits_for_nothing_that_the_device_has_still_to_do() -> None:
    with pretended_cuda():
        engine = Engine(load_bundle(GROUPNORM, device=DEVICE))
        limits = engine.bundle.manifest.limits.model_copy(update={"generated_gradient_norm": 1e-6})
        guard = Guard(GuardSettings(), limits)
        admit(engine, "adapts")
        admit(engine, "by-source")
        waited.clear()
        gathered = engine.gather([batch("adapts", 6, 1), batch("by-source", 2, 2, adapt=False, answer="source")])
        assert not waited
        passed = engine.forward(gathered)
        proposals = engine.adapt(passed)
        assert 0 < waited.total() <= 25
        waited.clear()
        updating, watched = proposals.proposals
        assert judge(engine, guard, updating.prediction, proposals, updating).ruling.decision == "partial"
        assert judge(engine, guard, watched.prediction, proposals, watched).ruling.decision == "skipped"
        engine.accept(proposals, proposals.proposals)
        assert not waited


def test_the_pretended_device_refuses_what_a_gpu_refuses() -> None:
    with pretended_cuda():
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        for wrong in (
            lambda: there + here,
            lambda: torch.cat([here, there]),
            lambda: there.index_select(0, torch.tensor([1])),
            lambda: torch.stack([there.sum(), here.sum()]),
            lambda: torch.nn.functional.linear(here, there),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        for wrong in (there.numpy, lambda: np.asarray(there)):
            with pytest.raises(TypeError, match="to numpy"):
                wrong()
        there[0], there[1:] = 5, torch.tensor([6.0, 7.0])
        assert there.tolist() == there.cpu().tolist() == here.copy_(there).tolist() == [5, 6, 7]
        assert (there * 2).device == there.new_zeros(2).device == torch.zeros_like(there).device == DEVICE
    assert not isinstance(here, Placed)
