"""Who shares a pass changes nothing: predictions, gradients and next states are those of a stream alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from meta.bundle import Bundle, load_bundle
from meta.correction import Correction
from meta.learned import GeneratorSettings, LearnedOptimizer
from meta.mgg import MGG
from meta.norms import AdaptableModel
from meta.objective import feature_statistics
from tests.worker.engine.test_engine import admit, batch
from worker.batch.batcher import MicroBatch
from worker.decode.pixels import normalise_pixels
from worker.engine.engine import Engine


class Tokens(nn.Module):
    """LayerNorm and RMSNorm over the last dimension, as in a transformer."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Conv2d(1, 8, 7, stride=7), norm(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(x).flatten(2).transpose(1, 2)).relu().mean(1))


def convolutional(norm: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2),
        norm,
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


NETWORKS = {
    "GroupNorm": lambda: convolutional(nn.GroupNorm(2, 8)),
    "BatchNorm": lambda: convolutional(nn.BatchNorm2d(8)),
    "InstanceNorm": lambda: convolutional(nn.InstanceNorm2d(8, affine=True)),
    "LayerNorm": lambda: Tokens(nn.LayerNorm),
    "RMSNorm": lambda: Tokens(nn.RMSNorm),
}


def any_correction(features: int) -> Correction:
    """That changes every frame, each by what it shows."""
    random = torch.Generator().manual_seed(6)
    wide = 2 * features
    return Correction(
        mean=0.1 * torch.randn(features, generator=random),
        deviation=torch.rand(features, generator=random) + 0.5,
        reduce=0.3 * torch.randn(wide, 3, generator=random),
        expand=0.3 * torch.randn(wide, 3, generator=random),
        bias=0.1 * torch.randn(wide, generator=random),
        spread=torch.full((wide,), 0.01),
    )


def bundle_with(network: str, folder: Path) -> Bundle:
    """The tiny bundle around another network; the generator's gradient memory in float32, to compare closely."""
    torch.manual_seed(5)
    tiny = load_bundle(folder)
    name, _, corrected = network.partition(", ")
    model = AdaptableModel(NETWORKS[name]())
    if corrected:
        model.correction = any_correction(model.feature_count)
    with torch.no_grad():
        source = feature_statistics(model.forward_with_features(torch.randn(64, 1, 28, 28))[1])
    learned = LearnedOptimizer(GeneratorSettings(memory_precision="float32"), model)
    for parameter in learned.parameters():
        parameter.requires_grad_(False)
    return Bundle(tiny.manifest, tiny.labels, model, MGG(model, source, learned, 4))


def run(engine: Engine, batches: list[MicroBatch]) -> dict[str, tuple[list[list[float]], dict[str, float]]]:
    """One step; each stream's confidences and signals."""
    passed = engine.predict(batches)
    proposals = engine.adapt(passed)
    engine.accept(proposals, proposals.proposals)
    signals = {p.prediction.batch.stream: p.signals for p in proposals.proposals if p.update}
    return {o.batch.stream: (o.top_confidence, signals.get(o.batch.stream, {})) for o in passed.predictions}


def close(found: object, expected: object) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("network", [*NETWORKS, "BatchNorm, corrected", "LayerNorm, corrected"])
@settings(max_examples=12)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=8), min_size=1, max_size=4),
    st.integers(0, 1 << 16),
)
def test_company_changes_nothing(
    network: str, tiny_bundle_path: Path, rounds: list[list[tuple[int, bool]]], seed: int
) -> None:
    bundle = bundle_with(network, tiny_bundle_path)
    together = Engine(bundle)
    names = [f"stream-{i}" for i in range(8)]
    admit(together, *names)
    alone = {name: Engine(bundle) for name in names}
    for name, engine in alone.items():
        admit(engine, name)
    for number, sizes in enumerate(rounds):
        batches = [
            batch(name, count, seed + 31 * number + i, adapt)
            for i, (name, (count, adapt)) in enumerate(zip(names, sizes, strict=False))
            if count
        ]
        if not batches:
            continue
        results = run(together, batches)
        for work in batches:
            confidences, signals = run(alone[work.stream], [work])[work.stream]
            close(results[work.stream][0], confidences)
            for name, value in signals.items():
                close(results[work.stream][1][name], value)
    for name, engine in alone.items():
        for part, tensor in engine.tensors(name).items():
            torch.testing.assert_close(together.tensors(name)[part], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("streams", [1, 2, 64, 512])
def test_any_number_of_streams(tiny_bundle_path: Path, streams: int) -> None:
    bundle = bundle_with("GroupNorm", tiny_bundle_path)
    together = Engine(bundle)
    names = [f"stream-{i}" for i in range(streams)]
    admit(together, *names)
    work = [batch(name, 1 + i % 5, i) for i, name in enumerate(names)]
    run(together, work)
    for i in {0, streams // 2, streams - 1}:
        alone = Engine(bundle)
        admit(alone, names[i])
        run(alone, [work[i]])
        for part, tensor in alone.tensors(names[i]).items():
            torch.testing.assert_close(together.tensors(names[i])[part], tensor, rtol=1e-3, atol=1e-4)


def test_corrected_streams_answer_as_source_until_an_update_and_where_source_is_asked(tiny_bundle_path: Path) -> None:
    bundle = bundle_with("BatchNorm, corrected", tiny_bundle_path)
    engine = Engine(bundle)
    admit(engine, "a")
    work = batch("a", 6, 1)
    pixels = normalise_pixels([frame.pixels for frame in work.frames], bundle.manifest.preprocess)
    source = (bundle.model(pixels) / bundle.manifest.calibration.temperature).softmax(1).topk(3, 1).values
    hurried = replace(work, adapt=False, hurried=True)
    close(run(engine, [hurried])["a"][0], source.tolist())
    run(engine, [work])
    asked = run(engine, [replace(work, answer="source", adapt=False)])["a"][0]
    close(asked, source.tolist())
    adapted = run(engine, [hurried])["a"][0]
    assert not torch.allclose(torch.tensor(adapted), source, atol=1e-3)
