"""Controls of the benchmark: a source trained on simulated shifts, the class filter alone, no gradient memory."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from meta import data
from meta.baselines import BASELINES, Baseline, Setup, configured
from meta.baselines.filtered import FilteredSgd, FilteredSource, FilteredTent
from meta.benchmark.controls import without_memory
from meta.benchmark.datasets import DataSet
from meta.benchmark.plan import BenchmarkConfig, cells_of
from meta.benchmark.sources import ModelConfig, SourceModel, open_source, parts, shown_parts
from meta.bundle import load_bundle
from meta.data import LabelledImages
from meta.generator import MetaGradientGenerator
from meta.method import State
from meta.mgg import MGG
from meta.models import groupnorm_cnn
from meta.norms import AdaptableModel
from meta.objective import feature_statistics
from meta.paper import PaperMGG, PaperSettings
from meta.temporal import BELIEF, filter_classes
from schemas.errors import BundleError

# --- a source trained on simulated shifts ---


def stripes(count: int) -> LabelledImages:
    """Stripes across or down, wide or narrow, which is the class."""
    labels = np.arange(count) % 4
    images = np.random.default_rng(count).integers(0, 60, (count, 28, 28)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        lit = np.arange(28) // (1 if label % 2 else 4) % 2 * 150
        image += (lit if label // 2 else lit[:, None]).astype(np.uint8)
    return LabelledImages(images, labels.astype(np.int64))


STRIPES = DataSet("stripes", ("a", "b", "c", "d"), (0.5,), (0.25,), lambda: stripes(240), lambda: stripes(60))


def opened(cache: Path, said: list[str] | None = None, **changes: object) -> SourceModel:
    arguments = {"classes": 4, "widths": [8, 8], "group": 4}
    plain = {"name": "small", "data": "stripes", "architecture": "groupnorm-cnn", "arguments": arguments, "epochs": 1}
    said = [] if said is None else said
    return open_source(ModelConfig.model_validate(plain | changes), STRIPES, cache, said.append)


def test_a_bundle_with_the_labels_in_another_order_is_refused(tmp_path: Path, tiny_bundle_path: Path) -> None:
    """Its answers would be compared with those of other classes; labels by other names may mean the same."""
    config = ModelConfig(name="small", data="stripes", bundle=tiny_bundle_path)
    ordered = replace(STRIPES, labels=("bolt", "nut", "other", "washer"))
    with pytest.raises(BundleError, match=r"another order than stripes \('nut' where that has 'bolt'\); .*000-first"):
        open_source(config, ordered, tmp_path, print)
    open_source(config, STRIPES, tmp_path, print)


def logits(source: SourceModel) -> torch.Tensor:
    with torch.no_grad():
        return source.setup.model(torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(1)))


def test_a_source_is_trained_on_simulated_shifts_once_and_the_same_every_time(tmp_path: Path) -> None:
    first = logits(opened(tmp_path / "one", shift_steps=3))
    said: list[str] = []
    torch.testing.assert_close(logits(opened(tmp_path / "one", said, shift_steps=3)), first)
    assert said == []
    torch.testing.assert_close(logits(opened(tmp_path / "two", shift_steps=3)), first, rtol=1e-4, atol=1e-5)
    for changes in ({}, {"shift_steps": 4}, {"shift_steps": 3, "seed": 1}):
        assert not torch.allclose(logits(opened(tmp_path / "one", **changes)), first)


def test_a_bundles_source_is_trained_further(tmp_path: Path, tiny_bundle_path: Path) -> None:
    as_it_is = opened(tmp_path, bundle=tiny_bundle_path)
    trained = opened(tmp_path, bundle=tiny_bundle_path, shift_steps=40)
    assert as_it_is.clean_accuracy < 0.6 < trained.clean_accuracy
    # Its generator serves it as it serves any other net: without the anchor.
    method = trained.generator(load_bundle(tiny_bundle_path))
    assert isinstance(method, MGG)
    assert method.learned.anchor is None
    assert len(list((tmp_path / "sources").iterdir())) == 1


def test_images_that_trained_it_serve_nothing_else(tmp_path: Path) -> None:
    before, after = opened(tmp_path).tuning, opened(tmp_path, shift_steps=2).tuning
    assert len(after) < len(before)
    np.testing.assert_array_equal(after.images, before.images[-len(after) :])


def test_of_fashion_mnist_it_sees_what_meta_training_sees() -> None:
    rows = np.arange(data.CALIBRATION_PART[1])
    shown, rest = shown_parts(parts(LabelledImages(rows, rows))[1])
    assert (shown.labels[0], shown.labels[-1] + 1) == data.META_PART
    assert (rest.labels[0], rest.labels[-1] + 1) == data.CALIBRATION_PART


def keys(bundle: Path, model: dict | None = None, generator: dict | None = None) -> set[str]:
    plan = {
        "data": {"d": {"kind": "fashion-mnist"}},
        "models": [{"name": "m", "data": "d", "bundle": str(bundle)} | (model or {})],
        "generators": [{"variant": "ours", "bundle": str(bundle)} | (generator or {})],
        "runs": [{"methods": ["source", "mgg"]}],
    }
    return {cell.key for cell in cells_of(BenchmarkConfig.model_validate(plan), {("d", "m"): False})}


def test_controls_have_results_of_their_own_and_others_keep_theirs(tiny_bundle_path: Path) -> None:
    plain = keys(tiny_bundle_path)
    assert keys(tiny_bundle_path, {"shift_steps": 0}, {"memory": True}) == plain
    assert not keys(tiny_bundle_path, {"shift_steps": 1}) & plain
    assert len(keys(tiny_bundle_path, generator={"memory": False}) & plain) == 1  # the source's
    assert "shift_steps" not in ModelConfig(name="m", data="d").content()


# --- the class filter alone ---


@pytest.fixture
def setup() -> Setup:
    torch.manual_seed(0)
    network = groupnorm_cnn(4, widths=(8, 8), group=4)
    network[-1].weight.data *= 6  # sure of itself, so that the filter and Tent have something to go by
    model = AdaptableModel(network)
    with torch.no_grad():
        source = feature_statistics(model.forward_with_features(torch.randn(64, 1, 12, 12))[1])
    return Setup(model, source, 4, torch.zeros(1), torch.ones(1), None, (1, 12, 12))


def passes(method: Baseline, adapt: bool = True) -> tuple[list[torch.Tensor], list[torch.Tensor], State]:
    """Logits and answers to two streams that repeat themselves, and the last state."""
    random = torch.Generator().manual_seed(2)
    shown = torch.randn(2, 1, 12, 12, generator=random).repeat_interleave(8, 0)
    stream, state = torch.arange(2).repeat_interleave(8), method.fresh(2)
    seen, answers = [], []
    for _ in range(6):
        forward = method.predict(shown + torch.randn(shown.shape, generator=random), stream, state)
        seen.append(forward.logits.detach())
        answers.append(forward.answer)
        state = method.update(forward).state if adapt else method.observe(forward)
    return seen, answers, state


@pytest.mark.parametrize("kind", [FilteredSource, FilteredSgd, FilteredTent])
def test_a_filtered_baseline_adapts_as_without_and_answers_as_the_filter(kind: type[Baseline], setup: Setup) -> None:
    plain = BASELINES[kind.name.removeprefix("filtered-")]
    expected, _, without = passes(configured(plain, setup))
    seen, answers, state = passes(configured(kind, setup))
    assert set(state) == set(without) | set(BELIEF)
    for name, tensor in without.items():
        torch.testing.assert_close(state[name], tensor)
    torch.testing.assert_close(seen, expected)
    belief = {name: tensor for name, tensor in configured(kind, setup).fresh(2).items() if name in BELIEF}
    for each, answer in zip(seen, answers, strict=True):
        probability, belief = filter_classes(each, torch.arange(2).repeat_interleave(8), torch.full((2,), 8.0), belief)
        torch.testing.assert_close(answer.exp(), probability)
    torch.testing.assert_close({name: state[name] for name in BELIEF}, belief)
    assert not torch.allclose(answers[-1].softmax(1), seen[-1].softmax(1), atol=0.01)


def test_a_filtered_baseline_that_only_watches_learns_of_classes(setup: Setup) -> None:
    method = configured(FilteredTent, setup)
    _, _, state = passes(method, adapt=False)
    fresh = method.fresh(2)
    torch.testing.assert_close(state["affine"], fresh["affine"])
    assert not torch.allclose(state["class_mix"], fresh["class_mix"])


# --- no gradient memory ---


def test_without_memory_what_is_in_it_changes_nothing(tiny_bundle_path: Path) -> None:
    method = load_bundle(tiny_bundle_path).method
    assert isinstance(method, MGG)
    cut = without_memory(method)

    def moved(subject: MGG, memory: float) -> torch.Tensor:
        state = subject.fresh(1)
        state = state | {name: t + memory for name, t in state.items() if name.startswith("memory_")}
        frames = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        affine = subject.update(subject.predict(frames, torch.zeros(16, dtype=torch.long), state)).state["affine"]
        return affine - subject.model.source_affine

    torch.testing.assert_close(moved(cut, 0.5), moved(cut, 0.0), rtol=0, atol=0)
    assert bool((moved(cut, 0.0) != 0).any())
    assert not torch.equal(moved(method, 0.5), moved(method, 0.0))  # the given one still has its own


def test_the_papers_generator_has_nothing_but_its_memory(setup: Setup) -> None:
    paper = PaperMGG(setup.model, setup.source, MetaGradientGenerator(2, 4), PaperSettings())
    with pytest.raises(BundleError, match="memory: false"):
        without_memory(paper)
