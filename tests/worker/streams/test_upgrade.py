"""A stream's state under another bundle: carried where it means the same there, else from source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meta.bundle import Bundle, load_bundle, model_weights, write_bundle
from meta.bundle_folder import read_manifest
from meta.learned import GeneratorSettings, LearnedOptimizer
from schemas.config import Bundle as BundleSettings
from schemas.config import WorkerConfig
from schemas.errors import BundleError
from schemas.frame import Position
from schemas.policy import Policy
from schemas.state import GuardState, StreamHeader
from schemas.state_tensors import encode_tensors
from tests.worker.engine.test_engine import admit, batch, step
from worker.engine.engine import Engine
from worker.engine.header import next_header
from worker.guard.answer import answering
from worker.site.doctor import examine
from worker.streams.upgrade import GENERATORS_OWN, Upgrade


def variant(bundle: Bundle, origin: Path, folder: Path, *, labels: list[str] | None = None, **settings: object) -> Path:
    """The same model with another generator."""
    torch.manual_seed(11)
    chosen = GeneratorSettings.model_validate({**bundle.manifest.method.settings, **settings})
    learned = LearnedOptimizer(chosen, bundle.model)
    method = bundle.manifest.method.model_copy(update={"settings": chosen.model_dump(mode="json")})
    manifest = bundle.manifest.model_copy(update={"name": "newer", "method": method})
    parts = {
        "model": model_weights(origin),
        "generator": dict(learned.state_dict()),
        "statistics": bundle.method.source.as_tensors(),
    }
    write_bundle(folder, manifest, parts, labels or bundle.labels)
    return folder


@pytest.fixture
def lived(tiny_bundle: Bundle) -> tuple[StreamHeader, dict[str, torch.Tensor]]:
    """A stream after two updates under the tiny bundle."""
    engine = Engine(tiny_bundle)
    admit(engine, "cam")
    for seed in (1, 2):
        step(engine, [batch("cam", 8, seed)])
    header = StreamHeader(
        stream="cam",
        bundle=tiny_bundle.hash,
        method="mgg",
        positions={"frames/0": 41},
        step=2,
        events=5,
        approved=1,
        snapshot=2,
        guard=GuardState(trusted=False, resets=3),
    )
    return header, {name: tensor.clone() for name, tensor in engine.tensors("cam").items()}


def moved(lived, path: Path, previous: Path, on_change: str = "carry"):
    header, tensors = lived
    engine = Engine(load_bundle(path))
    settings = BundleSettings(path=path, on_change=on_change, previous=[previous], shadow_frames=20)
    return engine, Upgrade(settings, engine).moved(header, encode_tensors(tensors, header.step))


def test_the_same_model_and_generator_go_on_as_they_were(lived, tiny_bundle_path, tmp_path, tiny_bundle) -> None:
    path = tmp_path / "renamed"
    files = {f.name: f.read_bytes() for f in tiny_bundle_path.iterdir()}
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content.replace(b'"name": "tiny"', b'"name": "newer"'))
    engine, state = moved(lived, path, tiny_bundle_path)
    assert engine.bundle_hash != tiny_bundle.hash
    assert state.tensors is not None
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in lived[1].items())
    header = state.header
    assert (header.bundle, header.step, header.approved, header.positions) == (
        engine.bundle_hash,
        2,
        1,
        {"frames/0": 41},
    )
    assert header.guard == GuardState()
    assert header.probation == 0


def test_another_generator_gets_the_parameters_but_not_the_memory(lived, tiny_bundle_path, tmp_path, tiny_bundle):
    path = variant(tiny_bundle, tiny_bundle_path, tmp_path, hidden=6, class_filter=False)
    engine, state = moved(lived, path, tiny_bundle_path)
    assert read_manifest(path).model_hash == tiny_bundle.manifest.model_hash
    assert state.tensors is not None
    assert set(state.tensors) == set(engine.like)
    assert "another generator" in state.why
    assert tiny_bundle.hash in state.why
    assert not torch.equal(state.tensors["affine"], engine.like["affine"])
    for name, tensor in state.tensors.items():
        expected = engine.like[name] if name in GENERATORS_OWN else lived[1][name]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("change", ["labels", "method", "unknown", "expired", "reset"])
def test_what_means_something_else_starts_from_source(lived, tiny_bundle_path, tmp_path, tiny_bundle, change) -> None:
    labels = ["bolt", "nut", "washer", "other"] if change == "labels" else None
    path = variant(tiny_bundle, tiny_bundle_path, tmp_path / "new", labels=labels)
    header, tensors = lived
    if change == "method":
        header = header.model_copy(update={"method": "tent"})
    if change == "unknown":
        header = header.model_copy(update={"bundle": "0" * 16})
    engine = Engine(load_bundle(path))
    mode = "reset" if change == "reset" else "shadow"
    settings = BundleSettings(path=path, on_change=mode, previous=[tiny_bundle_path])
    blob = None if change == "expired" else encode_tensors(tensors, 2)
    state = Upgrade(settings, engine).moved(header, blob)
    assert state.tensors is None
    assert (state.header.step, state.header.approved, state.header.bundle) == (0, None, engine.bundle_hash)
    assert state.header.positions == {"frames/0": 41}
    assert state.header.probation == (0 if change == "reset" else 256)
    assert "belongs to bundle" in state.why
    expected = {"labels": "labels differ", "method": "methods differ", "unknown": "previous", "expired": "expired"}
    assert expected.get(change, "") in state.why


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_parameters_that_the_new_limits_would_hold_for_ever_are_not_carried(
    lived, tiny_bundle_path, tmp_path, tiny_bundle, factor: float
) -> None:
    """Every update of a stream beyond the limit is skipped."""
    path = variant(tiny_bundle, tiny_bundle_path, tmp_path)
    header, tensors = lived
    engine = Engine(load_bundle(path))
    distance = float((tensors["affine"] - engine.like["affine"]).norm())
    settings = BundleSettings(path=path, on_change="carry", previous=[tiny_bundle_path])
    state = Upgrade(settings, engine, factor * distance).moved(header, encode_tensors(tensors, 2))
    assert (state.tensors is None) == (factor < 1)
    assert (state.header.step, f"cannot be carried over: it is {distance:.3g} from source" in state.why) == (
        (0, True) if factor < 1 else (2, False)
    )


def test_source_answers_while_the_carried_parameters_are_on_probation(lived, tiny_bundle_path, tmp_path, tiny_bundle):
    _, state = moved(lived, variant(tiny_bundle, tiny_bundle_path, tmp_path), tiny_bundle_path, "shadow")
    header = state.header
    assert state.tensors is not None
    answers = []
    engine = Engine(tiny_bundle)
    admit(engine, "cam")
    for number in range(4):
        answers.append(answering(Policy(), header))
        frames = batch("cam", 8, number)
        frames = replace(
            frames,
            frames=[replace(f, position=Position("frames", 0, 8 * number + i)) for i, f in enumerate(frames.frames)],
        )
        header = next_header(header, engine.predict([frames]).predictions[0], applied=True)
    assert answers == ["source", "source", "source", "adapted"]


def test_previous_must_be_bundles(tmp_path: Path, tiny_bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"bundle\.previous: no bundle at"):
        Upgrade(BundleSettings(on_change="carry", previous=[tmp_path]), Engine(tiny_bundle))


def test_the_doctor_looks_at_previous_bundles_too(tiny_bundle_path: Path, tmp_path: Path) -> None:
    settings = BundleSettings(path=tiny_bundle_path, previous=(tiny_bundle_path, tmp_path / "absent"))
    findings = examine(WorkerConfig(bundle=settings))
    failed = next(found for found in findings if found.level == "failed")
    assert failed.subject == "bundle"
    assert failed.text.startswith(f"bundle.previous: no bundle at {tmp_path / 'absent'}: manifest.json is missing")
