import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from copy import copy
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from meta.baselines import Setup, build
from meta.benchmark import accuracy as driver
from meta.benchmark.corruptions import TEST, TUNING
from meta.benchmark.datasets import Cifar10C, DataConfig, Pool, open_dataset, read_archive
from meta.benchmark.plan import BenchmarkConfig, cells_of, read_benchmark
from meta.benchmark.report import Journal, Record, run_file, write_report
from meta.benchmark.run import load_frames, run_streams, source_hits
from meta.benchmark.streams import SETTINGS, Stream, make_streams
from meta.benchmark.tables import Entry, Place, Results, markdown, plot, read_records
from meta.bundle import Bundle
from meta.data import LabelledImages
from meta.imports import import_from
from meta.method import Method
from meta.models import groupnorm_cnn
from meta.norms import AdaptableModel
from meta.objective import feature_statistics
from schemas.errors import BundleError, ConfigError, DataError
from tests.conftest import make_tiny_bundle

SHIFTS = list(TEST)
LABELS = np.arange(300) % 10


def blobs(count: int, side: int = 12, channels: int = 3) -> LabelledImages:
    """Four classes of a colour each, which a small net learns in seconds."""
    random = np.random.default_rng(7)
    labels = np.arange(count) % 4
    colours = np.array([[150, 0, 0], [0, 150, 0], [0, 0, 150], [75, 75, 75]])[labels][:, None, None]
    images = (random.integers(0, 60, (count, side, side, 3)) + colours).astype(np.uint8)
    return LabelledImages(images if channels == 3 else images[..., 0], labels.astype(np.int64))


@pytest.fixture
def setup() -> Setup:
    torch.manual_seed(0)
    model = AdaptableModel(groupnorm_cnn(4, 1, widths=(8, 8), group=4))
    with torch.no_grad():
        source = feature_statistics(model.forward_with_features(torch.randn(64, 1, 12, 12))[1])
    return Setup(model, source, 4, torch.tensor([0.2]), torch.tensor([0.3]), None, (1, 12, 12))


# --- streams ---


@pytest.mark.parametrize("setting", SETTINGS)
def test_streams_are_the_same_every_time_and_differ_by_seed(setting) -> None:
    def made(seed: int) -> list[Stream]:
        return make_streams(setting, seed, SHIFTS, LABELS, 90, 900)

    for first, second in zip(made(0), made(0), strict=True):
        np.testing.assert_array_equal(first.image, second.image)
        np.testing.assert_array_equal(first.condition, second.condition)
    assert any((a.image != b.image).any() for a, b in zip(made(0), made(1), strict=True))
    for stream in made(1):
        assert len(stream.image) == len(stream.condition)
        assert stream.image.max() < len(LABELS)
        assert set(stream.condition) == set(range(len(stream.conditions)))


def test_every_shift_gets_its_frames() -> None:
    for setting in ("continual", "timed", "mixed", "correlated", "recurring"):
        (stream,) = make_streams(setting, 0, SHIFTS, LABELS, 100, 900)
        assert stream.conditions == tuple((shift, 5) for shift in SHIFTS)
        assert np.bincount(stream.condition).tolist() == [100] * 15
    assert [len(s) for s in make_streams("reset", 0, SHIFTS, LABELS, 100, 900)] == [100] * 15
    assert sum(len(s) for s in make_streams("long", 0, SHIFTS, LABELS, 100, 900)) == 900


def test_courses_of_settings() -> None:
    (gradual,) = make_streams("gradual", 0, ["fog"], LABELS, 90, 900)
    severities = np.array([severity for _, severity in gradual.conditions])[gradual.condition]
    assert severities[::10].tolist() == [1, 2, 3, 4, 5, 4, 3, 2, 1]
    (recurring,) = make_streams("recurring", 0, SHIFTS[:3], LABELS, 100, 900)
    assert recurring.condition[::10].tolist() == [0, 1, 2] * 10
    (healthy,) = make_streams("healthy", 0, SHIFTS, LABELS, 100, 900)
    assert healthy.conditions == (("clean", 0),)
    (mixed,) = make_streams("mixed", 0, SHIFTS, LABELS, 100, 900)
    assert len(set(mixed.condition[:16])) > 5


def test_correlated_labels_come_in_runs_and_are_the_same_labels() -> None:
    (plain,) = make_streams("continual", 0, ["fog"], LABELS, 200, 900)
    (runs,) = make_streams("correlated", 0, ["fog"], LABELS, 200, 900)
    assert len(set(runs.image)) == 200

    def repeats(stream: Stream) -> float:
        labels = LABELS[stream.image]
        return float((labels[1:] == labels[:-1]).mean())

    assert repeats(runs) > 0.7 > 0.3 > repeats(plain)


# --- running ---


def test_correlated_labels_of_many_classes_share_a_hundred_slots() -> None:
    """As in RoTTA: in a slot for each of 200 classes, runs of a label would be shorter."""
    labels = np.arange(4_000) % 200
    (stream,) = make_streams("correlated", 0, SHIFTS[:1], labels, 4_000, 4_000)
    runs = 1 + int((np.diff(labels[stream.image]) != 0).sum())
    assert 2_300 < runs < 2_900  # 3,350 in 200 slots


def test_results_are_those_of_each_stream_alone(setup: Setup, tmp_path: Path) -> None:
    """Streams of different lengths in one run, against one run each; and batches cut as they should be."""
    pool = Pool(blobs(60, channels=1), tmp_path, None)
    conditions = [("fog", 5), ("contrast", 5)]
    frames = load_frames(pool, conditions, setup.mean, setup.std)
    random = np.random.default_rng(0)
    streams = [
        Stream("continual", 0, tuple(conditions), random.integers(0, 2, size), random.integers(0, 60, size))
        for size in (37, 50, 8, 16)
    ]
    method = build("adam", setup, step_size=0.01)
    together = run_streams(method, streams, frames, 8)
    for stream, right in zip(streams, together.right, strict=True):
        (alone,) = run_streams(method, [stream], frames, 8).right
        assert (alone == right).mean() > 0.95
    assert together.refused == 0


def test_the_source_method_is_the_source_lookup(setup: Setup, tmp_path: Path) -> None:
    pool = Pool(blobs(40, channels=1), tmp_path, None)
    frames = load_frames(pool, [("clean", 0), ("fog", 3)], setup.mean, setup.std)
    stream = Stream("mixed", 0, (("fog", 3), ("clean", 0)), np.arange(40) % 2, np.arange(40))
    (right,) = run_streams(build("source", setup), [stream], frames, 7).right
    hits = source_hits(setup.model, frames, [stream])
    codes = np.array([1, 0])[stream.condition]
    np.testing.assert_array_equal(right, hits[codes, stream.image])


def test_updates_that_are_not_finite_are_refused_and_counted(setup: Setup, tmp_path: Path) -> None:
    pool = Pool(blobs(40, channels=1), tmp_path, None)
    frames = load_frames(pool, [("clean", 0)], setup.mean, setup.std)
    stream = Stream("healthy", 0, (("clean", 0),), np.zeros(40, int), np.arange(40))
    method = build("tent", setup, step_size=float("inf"))
    outcome = run_streams(method, [stream], frames, 8)
    assert outcome.refused == 5
    (expected,) = run_streams(build("source", setup), [stream], frames, 8).right
    np.testing.assert_array_equal(outcome.right[0], expected)


def test_a_slow_method_adapts_on_every_cth_batch(setup: Setup, tmp_path: Path) -> None:
    pool = Pool(blobs(40, channels=1), tmp_path, None)
    frames = load_frames(pool, [("clean", 0)], setup.mean, setup.std)
    stream = Stream("timed", 0, (("clean", 0),), np.zeros(40, int), np.arange(40))
    method = build("tent", setup)
    seen = []
    update = method.update
    method.update = lambda forward: (seen.append(len(forward.logits)), update(forward))[1]  # type: ignore[method-assign]
    run_streams(method, [stream], frames, 4, adapt_every=3)
    assert len(seen) == 4  # batches 0, 3, 6 and 9 of ten


def test_ours_makes_several_updates_of_a_large_batch(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """As a worker does; a baseline makes one."""
    pool = Pool(blobs(60, channels=1, side=28), tmp_path, None)
    frames = load_frames(pool, [("clean", 0)], torch.tensor([0.2]), torch.tensor([0.3]))
    stream = Stream("healthy", 0, (("clean", 0),), np.zeros(60, int), np.arange(60))
    tent = build(
        "tent", Setup(tiny_bundle.model, tiny_bundle.statistics, 4, frames.mean, frames.std, None, (1, 28, 28))
    )

    def updates(method: Method, batch: int) -> list[int]:
        seen = []
        method = copy(method)
        update = method.update
        method.update = lambda forward: (seen.append(len(forward.logits)), update(forward))[1]  # type: ignore[method-assign]
        run_streams(method, [stream], frames, batch)
        return seen

    assert updates(tiny_bundle.method, 64) == updates(tiny_bundle.method, 16) == [16, 16, 16, 12]
    assert updates(tiny_bundle.method, 8) == [8] * 7 + [4]
    assert updates(tent, 64) == [60]


# --- data ---


def test_shifted_frames_are_made_once(tmp_path: Path) -> None:
    pool = Pool(blobs(20), tmp_path, None)
    first = pool.images("fog", 2)
    (file,) = tmp_path.rglob("fog-2.npy")
    stamp = file.stat().st_mtime_ns
    np.testing.assert_array_equal(Pool(blobs(20), tmp_path, None).images("fog", 2), first)
    assert file.stat().st_mtime_ns == stamp
    Pool(blobs(16), tmp_path, None).images("fog", 2)
    assert len(list(tmp_path.rglob("fog-2.npy"))) == 2


def test_an_archive_of_jpeg_frames(tmp_path: Path) -> None:
    files = []
    for i in range(3):
        path = tmp_path / f"{i}.jpg"
        Image.fromarray(np.full((32, 32, 3), 60 * i, np.uint8)).save(path)
        files.append(np.frombuffer(path.read_bytes(), np.uint8))
    offset = np.cumsum([0, *map(len, files)])
    path = tmp_path / "test.npz"
    np.savez(path, jpeg=np.concatenate(files), offset=offset, label=np.array([3, 1, 2], np.uint8))
    data = read_archive(path)
    assert data.labels.tolist() == [3, 1, 2]
    np.testing.assert_allclose(data.images.mean((1, 2, 3)), [0, 60, 120], atol=2)

    np.savez(path, jpeg=np.zeros(9, np.uint8), offset=np.array([0, 5, 9]), label=np.array([1, 2], np.uint8))
    with pytest.raises(DataError, match="cannot be decoded"):
        read_archive(path)
    np.savez(path, jpeg=np.zeros(9, np.uint8), offset=np.array([0, 99]), label=np.array([1, 2], np.uint8))
    with pytest.raises(DataError, match="do not fit"):
        read_archive(path)
    with pytest.raises(DataError, match="no archive"):
        read_archive(tmp_path / "missing.npz")
    for damaged in (b"", b"nothing of the kind", path.read_bytes()[:-40]):
        (tmp_path / "damaged.npz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"damaged.npz is no archive of images and labels"):
            read_archive(tmp_path / "damaged.npz")


def cifar_10_c(folder: Path, shifts: tuple[str, ...] = ("fog", "brightness")) -> Cifar10C:
    """Four images, grey as the severity."""
    for name in shifts:
        np.save(
            folder / f"{name}.npy",
            np.tile(np.repeat(np.arange(5, dtype=np.uint8), 4)[:, None, None, None], (32, 32, 3)),
        )
    np.save(folder / "labels.npy", np.tile(np.arange(4, dtype=np.uint8), 5))
    return Cifar10C(folder)


def test_the_folder_of_cifar_10_c(tmp_path: Path) -> None:
    folder = cifar_10_c(tmp_path)
    assert folder.shifted("fog", 3)[:, 0, 0, 0].tolist() == [2] * 4
    assert folder.unshifted().labels.tolist() == [0, 1, 2, 3]
    with pytest.raises(DataError, match=r"snow.npy cannot be read"):
        folder.shifted("snow", 1)
    (tmp_path / "snow.npy").touch()
    with pytest.raises(DataError, match=r"snow.npy cannot be read"):
        folder.shifted("snow", 1)


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("fog", lambda images: images / 255, r"float64 \(20, 32, 32, 3\)"),
        ("fog", lambda images: images.transpose(0, 3, 1, 2), r"uint8 \(20, 3, 32, 32\)"),
        ("fog", lambda images: images[:4], r"uint8 \(4, 32, 32, 3\)"),
        ("labels", lambda labels: labels[:18], r"uint8 \(18,\)"),
        ("labels", lambda labels: np.eye(10)[labels], r"float64 \(20, 10\)"),
        ("labels", lambda labels: labels + 10, "labels up to 13"),
    ],
)
def test_arrays_that_are_none_of_cifar_10_c(
    tmp_path: Path, name: str, change: Callable[[np.ndarray], np.ndarray], found: str
) -> None:
    """Numbers from 0 to 1, for example, would be black frames, and all results wrong."""
    folder = cifar_10_c(tmp_path)
    np.save(tmp_path / f"{name}.npy", change(np.load(tmp_path / f"{name}.npy")))
    with pytest.raises(DataError, match=rf"{name}\.npy has {found}; CIFAR-10-C has"):
        folder.shifted("fog", 5)


def image_folder(root: Path) -> DataConfig:
    for split, label, i in [(s, c, i) for s in ("train", "test") for c in ("nut", "bolt") for i in range(3)]:
        (root / split / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 30), 40 * i, np.uint8)).save(root / split / label / f"{i}.png")
    return DataConfig(kind="image-folder", path=root, size=16)


def test_a_folder_of_images(tmp_path: Path) -> None:
    dataset = open_dataset("parts", image_folder(tmp_path))
    assert dataset.labels == ("bolt", "nut")
    assert dataset.test().images.shape == (6, 16, 16, 3)
    assert sorted(dataset.train().labels.tolist()) == [0, 0, 0, 1, 1, 1]
    with pytest.raises(
        DataError, match=r"test: expected one folder per class, .* has such folders in train/ and in test/"
    ):
        open_dataset("parts", DataConfig(kind="image-folder", path=tmp_path / "train"))


def test_what_else_lies_in_a_folder_of_images_is_left_out(tmp_path: Path) -> None:
    config = image_folder(tmp_path)
    (tmp_path / "test" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "test" / "nut" / "more").mkdir()
    (tmp_path / "train" / "nut" / ".DS_Store").write_bytes(b"\0")
    dataset = open_dataset("parts", config)
    assert dataset.labels == ("bolt", "nut")
    assert sorted(dataset.test().labels.tolist()) == sorted(dataset.train().labels.tolist()) == [0, 0, 0, 1, 1, 1]


def test_a_class_of_which_a_folder_has_no_images_is_named(tmp_path: Path) -> None:
    dataset = open_dataset("parts", image_folder(tmp_path))
    (tmp_path / "train" / "nut").rename(tmp_path / "train" / "nuts")
    with pytest.raises(DataError, match=r"train/nut has no images, and test/ has that class"):
        dataset.train()


def test_cifar_10_says_where_it_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DRIFTKEEL_CIFAR10", raising=False)
    with pytest.raises(DataError, match=r"as path, or in \$DRIFTKEEL_CIFAR10"):
        open_dataset("cifar10", DataConfig(kind="cifar10")).test()
    with pytest.raises(DataError, match=r"as train, or in \$DRIFTKEEL_CIFAR10"):
        open_dataset("c", DataConfig(kind="cifar10-c", path=tmp_path)).train()
    with pytest.raises(ValueError, match="train is for the kind cifar10-c"):
        DataConfig(kind="cifar10", train=tmp_path)

    with pytest.raises(DataError, match=r"has neither data_batch_1\.bin, .*, nor train\.npz$"):
        open_dataset("c", DataConfig(kind="cifar10-c", path=tmp_path, train=tmp_path)).train()


def binary_batch(colour: int, labels: list[int]) -> bytes:
    """As CIFAR-10's binary version has it: red of 200, green of `colour`, blue of 0."""
    return b"".join(bytes([label]) + b"\xc8" * 1024 + bytes([colour]) * 1024 + b"\0" * 1024 for label in labels)


def test_cifar_10_as_it_is_published(tmp_path: Path) -> None:
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}.bin").write_bytes(binary_batch(i, [i, 9]))
    (tmp_path / "test_batch.bin").write_bytes(binary_batch(7, [0]))
    data = open_dataset("cifar10", DataConfig(kind="cifar10", path=tmp_path))
    train = data.train()
    assert train.images.shape == (10, 32, 32, 3)
    assert train.labels.tolist() == [1, 9, 2, 9, 3, 9, 4, 9, 5, 9]
    assert train.images[2, 5, 7].tolist() == [200, 2, 0]
    assert data.test().images[0, 31, 0].tolist() == [200, 7, 0]
    (tmp_path / "data_batch_3.bin").write_bytes(b"too short")
    with pytest.raises(DataError, match=r"data_batch_3\.bin is no batch .* it has 9 bytes"):
        data.train()
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_3\.bin cannot be read: No such file"):
        data.train()


def test_an_archive_of_whole_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", images=blobs(6).images, labels=[0, 1, 2, 3, 0, 1])
    data = open_dataset("c", DataConfig(kind="cifar10-c", path=tmp_path, train=tmp_path))
    np.testing.assert_array_equal(data.train().images, blobs(6).images)
    assert data.train().labels.tolist() == [0, 1, 2, 3, 0, 1]
    for images in (blobs(6, channels=1).images, blobs(6).images.astype(np.float32), blobs(5).images):
        np.savez(tmp_path / "train.npz", images=images, labels=[0, 1, 2, 3, 0, 1])
        with pytest.raises(DataError, match=r"train\.npz has images .*; it takes uint8"):
            data.train()
    np.savez(tmp_path / "train.npz", images=np.array([{"code": 1}], dtype=object), labels=[0])
    with pytest.raises(DataError, match="no archive of images and labels"):
        data.train()


def test_an_option_of_data_that_is_not_used_leaves_results_as_they_are(tmp_path: Path) -> None:
    plain = DataConfig(kind="cifar10-c", path=tmp_path)
    assert plain.content() == {"kind": "cifar10-c", "path": str(tmp_path), "size": 32}
    assert DataConfig(kind="cifar10-c", path=tmp_path, train=tmp_path).content() != plain.content()


def test_a_model_is_trained_and_tuned_beside_the_folder_of_cifar_10_c(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DRIFTKEEL_CIFAR10", raising=False)
    monkeypatch.setenv("DRIFTKEEL_CACHE", str(tmp_path / "cache"))
    published, own = tmp_path / "CIFAR-10-C", tmp_path / "own"
    published.mkdir()
    own.mkdir()
    shifted = np.tile(blobs(40, side=32).images, (5, 1, 1, 1))
    for shift in TEST:
        np.save(published / f"{shift}.npy", shifted)
    np.save(published / "labels.npy", np.tile(blobs(40).labels, 5).astype(np.uint8))
    np.savez(own / "train.npz", images=blobs(400, side=32).images, labels=blobs(400).labels)
    arguments = {"classes": 10, "channels": 3, "widths": [8, 8]}
    plan = small_plan(
        data={"c": {"kind": "cifar10-c", "path": str(published), "train": str(own)}},
        models=[{"name": "small", "data": "c", "architecture": "groupnorm-cnn", "arguments": arguments, "epochs": 4}],
        runs=[{"methods": ["source", "tent"], "batches": [8], "settings": ["continual"], "seeds": [0]}],
        threads=1,
    )
    report = tmp_path / "out.json"
    assert driver.run_accuracy(plan, report, "test", driver.Progress([].append)) == 0
    assert {r["variant"] for r in json.loads(report.read_text())} == {"", "published", "tuned"}


# --- the plan ---


def small_plan(**changes) -> BenchmarkConfig:
    content = {
        "pool": 40,
        "frames": 20,
        "long_frames": 40,
        "tuning_frames": 10,
        "data": {"blobs": {"kind": "image-folder", "path": "blobs"}},
        "models": [
            {
                "name": "small",
                "data": "blobs",
                "architecture": "groupnorm-cnn",
                "arguments": {"classes": 4, "channels": 3, "widths": [8, 8]},
                "epochs": 15,
            }
        ],
        "runs": [{"methods": ["source", "tent", "oracle"], "batches": [8], "settings": ["continual", "timed"]}],
    } | changes
    return BenchmarkConfig.model_validate(content)


def test_cells_of_a_plan() -> None:
    cells = cells_of(small_plan(), {("blobs", "small"): False})
    assert [cell.name for cell in cells] == [
        "blobs/small/b8/source",
        "blobs/small/b8/tent-published",
        "blobs/small/b8/tent-tuned",
        "blobs/small/b8/oracle",
    ]
    without = cells_of(small_plan(runs=[{"methods": ["bn"]}]), {("blobs", "small"): False})
    assert without == []
    assert len(cells_of(small_plan(runs=[{"methods": ["bn"]}]), {("blobs", "small"): True})) == 2
    assert {c.key for c in cells}.isdisjoint(
        c.key for c in cells_of(small_plan(frames=21), {("blobs", "small"): False})
    )


def test_options_that_differ_in_step_size_are_tried_together() -> None:
    grid = [{"step_size": s, "pull": p} for s in (1, 2) for p in (0, 1)] + [{"neighbours": n} for n in (1, 3)]
    groups = driver._differing_in_step(grid)
    assert [len(group) for group in groups] == [2, 2, 1, 1]
    assert all(len({options.get("pull") for options in group}) == 1 for group in groups)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": [{"methods": ["adabn"]}]}, "unknown methods"),
        ({"runs": [{"models": ["vit"]}]}, "unknown models"),
        ({"runs": [{"batches": [0]}]}, r"runs\.0\.batches\.0\s+Input should be greater than 0"),
        ({"models": [{"name": "small", "data": "imagenet"}]}, "not in the data section"),
        ({"models": [{"name": "small", "data": "blobs", "bundle": "b", "weights": "w"}]}, "both a bundle and weights"),
    ],
)
def test_mistakes_in_a_plan(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_plan(**changes)


def test_mistakes_in_the_file_of_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    with pytest.raises(ConfigError, match=r"plan\.yaml: No such file or directory$"):
        read_benchmark(path)
    path.write_text("runs: []\nmodles: []\n")
    with pytest.raises(ConfigError, match=r"plan\.yaml: "):
        read_benchmark(path)


OWN = """
import torch

from meta.baselines import Baseline
from meta.baselines.plain import Source
from meta.method import Update
from meta.objective import entropy, per_stream_mean

class Mine(Baseline):
    name = "mine"
    published = {"step_size": 1e-3, "statistics": "source"}

    def loss(self, forward):
        loss = per_stream_mean(entropy(forward.logits), forward.stream, forward.counts)
        return loss, loss.detach() > 0, {}

class Still(Source):
    # no gradient, and nothing to choose from
    name = "still"

class Signs(Mine):
    # of a size that no stream's state says
    name = "signs"
    steps = (0.0, 0.3)

    def step(self, forward, loss, gradient, active, memory):
        affine = forward.state["affine"] - self.step_size * gradient.sign()
        new = forward.state | {"affine": affine}
        return Update(new, self.signals(forward, loss, gradient, gradient.sign(), new))

class Mixing(Mine):
    # more even answers, over whoever shares the pass
    name = "mixing"

    def loss(self, forward):
        loss, active, memory = super().loss(forward)
        even = forward.logits.softmax(1).mean(0)
        return loss + 10 * (even * even.log()).sum(), active, memory

class Scalar(Mine):
    name = "scalar"

    def loss(self, forward):
        return entropy(forward.logits).mean(), forward.counts > 0, {}

class Rowless(Mine):
    name = "rowless"

    def memory(self, streams):
        return {"usual": torch.zeros(self.classes)}

class Endless(Mine):
    # nothing found yet is infinitely far
    name = "endless"

    def memory(self, streams):
        return {"nearest": torch.full((streams, self.classes), torch.inf)}

class Overflowing(Mine):
    name = "overflowing"

    def memory(self, streams):
        return {"total": torch.ones(streams)}

    def loss(self, forward):
        loss, active, _ = super().loss(forward)
        return loss, active, {"total": forward.state["total"] * 1e30}

class Later(Overflowing):
    # only after what the check sees
    name = "later"

    def loss(self, forward):
        loss, active, _ = Mine.loss(self, forward)
        return loss, active, {"total": forward.state["total"] * 1e12}

class Drawn(Mine):
    # by chance, as torch draws
    name = "drawn"

    def loss(self, forward):
        loss, active, memory = super().loss(forward)
        return loss * torch.rand(()) * torch.randn_like(loss), active, memory

nothing = 1
"""


@pytest.fixture
def own_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A module in the current folder, of which nobody knows later."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "some_methods.py"
    path.write_text(OWN)
    (tmp_path / "broken_methods.py").write_text("import not_there\n")
    (tmp_path / "no_python.py").write_text("class Mine(\n")
    yield path
    sys.modules.pop("some_methods", None)


def own_plan(name: str = "mine") -> BenchmarkConfig:
    runs = [{"methods": ["source", name], "batches": [8], "settings": ["continual"]}]
    return small_plan(own_methods={name: f"some_methods:{name.title()}"}, runs=runs)


def test_a_method_of_the_users_own_has_cells_like_any(own_module: Path) -> None:
    cells = cells_of(own_plan(), {("blobs", "small"): False})
    assert [cell.name for cell in cells] == [f"blobs/small/b8/{m}" for m in ("source", "mine-published", "mine-tuned")]


def test_a_method_with_nothing_to_choose_from_is_not_tuned(own_module: Path) -> None:
    cells = cells_of(own_plan("still"), {("blobs", "small"): False})
    assert [cell.name for cell in cells] == [f"blobs/small/b8/{m}" for m in ("source", "still-published")]


def test_changed_code_makes_new_results(own_module: Path) -> None:
    def keys() -> list[str]:
        sys.modules.pop("some_methods", None)
        importlib.invalidate_caches()
        return [cell.key for cell in cells_of(own_plan(), {("blobs", "small"): False})]

    before = keys()
    assert keys() == before
    own_module.write_text(OWN.replace("1e-3", "0.002"))
    source, *mine = keys()
    assert source == before[0]
    assert not set(mine) & set(before)


def test_another_model_in_the_same_folder_makes_new_results(
    own_module: Path, tmp_path: Path, tiny_bundle_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle_path, bundle)
    import_from(tmp_path)
    manifest = json.loads((bundle / "manifest.json").read_text())

    def key() -> str:
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        models = [{"name": "small", "data": "blobs", "bundle": str(bundle)}]
        plan = small_plan(models=models, factories=["some_methods:build"], runs=[{"methods": ["source"]}])
        (cell,) = cells_of(plan, {("blobs", "small"): False})
        return cell.key

    keys = [key()]
    manifest["calibration"]["temperature"] = 1.5  # concerns no method of the benchmark
    assert key() == keys[0]
    manifest["files"]["model.safetensors"]["sha256"] = 64 * "0"
    keys.append(key())
    manifest["model"]["architecture"] = "some_methods:build"
    keys.append(key())
    own_module.write_text(OWN + "\n")
    keys.append(key())
    assert len(set(keys)) == 4


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("no_such_module:Mine", r"cannot import 'no_such_module'.*; install it, or run in the folder it lies in$"),
        ("some_methods:Other", "has no 'Other'"),
        ("some_methods", "not of the form module:name"),
        ("./some_methods.py:Mine", "not of the form module:name"),
        ("some_methods:nothing", "no subclass"),
        ("broken_methods:Mine", r"cannot import 'broken_methods'.*No module named 'not_there'\); correct it"),
        ("no_python:Mine", r"cannot import 'no_python'.*; correct it"),
    ],
)
def test_a_method_that_cannot_be_had_is_named(own_module: Path, where: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_plan(own_methods={"mine": where})


def test_a_method_cannot_take_the_place_of_another(own_module: Path) -> None:
    with pytest.raises(ValueError, match=r"\['tent'\] are names of methods"):
        small_plan(own_methods={"tent": "some_methods:Mine"})


# --- from data to report ---


@pytest.fixture
def blob_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The data set of the small plan, and a cache of its own."""
    root = tmp_path / "blobs"
    for split, count in (("train", 400), ("test", 60)):
        data = blobs(count)
        for i, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
            (root / split / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / split / str(label) / f"{i}.png")
    monkeypatch.setenv("DRIFTKEEL_CACHE", str(tmp_path / "cache"))
    return root


def test_a_method_of_the_users_own_from_data_to_report(own_module: Path, blob_data: Path, tmp_path: Path) -> None:
    blobs_at = {"blobs": {"kind": "image-folder", "path": str(blob_data), "size": 12}}
    plan = own_plan().model_copy(update={"threads": 1, "data": small_plan(data=blobs_at).data})
    report = tmp_path / "out.json"
    assert driver.run_accuracy(plan, report, "test", driver.Progress([].append)) == 0
    found = {(r["method"], r["variant"]) for r in json.loads(report.read_text())}
    assert found == {("source", ""), ("mine", "published"), ("mine", "tuned")}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixing", "what a stream gets depends on who shares its pass"),
        ("scalar", r"its loss is \(\) and which take a step \(3,\); both must be \(3,\)"),
        ("rowless", r"'usual' of its state is \(4,\) for 3 streams"),
        ("endless", r"'nearest' of its state is not finite before the first update"),
        ("overflowing", r"'total' of its state is not finite after two updates"),
    ],
)
def test_a_method_whose_results_would_be_wrong_is_refused(
    own_module: Path, blob_data: Path, tmp_path: Path, name: str, message: str
) -> None:
    """By a mean over all frames of a pass, or a state whose updates are all refused, and without any error."""
    blobs_at = {"blobs": {"kind": "image-folder", "path": str(blob_data), "size": 12}}
    plan = own_plan(name).model_copy(update={"threads": 1, "data": small_plan(data=blobs_at).data})
    with pytest.raises(ConfigError, match=f"own_methods: '{name}': .*(?:{message})"):
        driver.run_accuracy(plan, tmp_path / "out.json", "test", driver.Progress([].append), only=name)


def test_a_method_that_draws_as_it_likes_is_told_so(own_module: Path, blob_data: Path, tmp_path: Path) -> None:
    blobs_at = {"blobs": {"kind": "image-folder", "path": str(blob_data), "size": 12}}
    plan = own_plan("drawn").model_copy(update={"threads": 1, "data": small_plan(data=blobs_at).data})
    said: list[str] = []
    assert driver.run_accuracy(plan, tmp_path / "out.json", "test", driver.Progress(said.append), only="drawn-pub") == 0
    assert any("drawn-published: the same frames give something else each time" in line for line in said)


def test_updates_that_a_run_refuses_are_told(own_module: Path, blob_data: Path, tmp_path: Path) -> None:
    blobs_at = {"blobs": {"kind": "image-folder", "path": str(blob_data), "size": 12}}
    plan = own_plan("later").model_copy(update={"threads": 1, "data": small_plan(data=blobs_at).data})
    said: list[str] = []
    assert driver.run_accuracy(plan, tmp_path / "out.json", "test", driver.Progress(said.append), only="later-pub") == 0
    assert re.search(r"later-published: .*, [1-9]\d* updates refused as not finite$", said[-1])


def test_a_step_of_the_users_own_is_tuned(own_module: Path, blob_data: Path, tmp_path: Path) -> None:
    """Of two step sizes one changes nothing and one ruins the model: they must not look the same."""
    blobs_at = {"blobs": {"kind": "image-folder", "path": str(blob_data), "size": 12}}
    plan = own_plan("signs").model_copy(update={"threads": 1, "data": small_plan(data=blobs_at).data})
    report = tmp_path / "out.json"
    assert driver.run_accuracy(plan, report, "test", driver.Progress([].append), only="signs-tuned") == 0
    (cell,) = json.loads(run_file(report).read_text())["cells"]
    still, ruined = (one["accuracy"] for one in cell["tried"])
    assert still > ruined
    assert cell["options"] == {"step_size": 0.0}


def test_a_plan_without_cells_is_refused(blob_data: Path, tmp_path: Path) -> None:
    plan = small_plan(runs=[{"methods": ["bn"]}])
    with pytest.raises(ConfigError, match="the plan has no cells"):
        driver.run_accuracy(plan, tmp_path / "out.json", "test", driver.Progress([].append))


def test_a_benchmark_from_data_to_report(blob_data: Path, tmp_path: Path) -> None:
    plan = small_plan(data={"blobs": {"kind": "image-folder", "path": str(blob_data), "size": 12}}, threads=1)
    report = tmp_path / "out.json"
    said: list[str] = []
    progress = driver.Progress(said.append)
    with pytest.raises(ConfigError, match=r"--only tint: none of the plan's 4 cells, such as blobs/small/"):
        driver.run_accuracy(plan, report, "test", progress, only="tint")
    assert driver.run_accuracy(plan, report, "test", progress, stop_after_s=0) == 3
    assert {r["method"] for r in json.loads(report.read_text())} == {"source"}
    assert driver.run_accuracy(plan, report, "test", progress, only="tent-tuned") == 0
    found = {(r["method"], r["variant"]) for r in json.loads(report.read_text())}
    assert found == {("source", ""), ("tent", "tuned")}
    assert driver.run_accuracy(plan, report, "test", progress) == 0
    records, made = (json.loads(path.read_text()) for path in (report, run_file(report)))
    # Four cells, two settings, fifteen shifts, three seeds.
    assert len(records) == 4 * 2 * 15 * 3
    for record in records:
        assert set(record) == set(Record.__annotations__)
        assert 0 <= record["accuracy"] <= 1
        if record["method"] == "source":
            assert record["accuracy"] == record["source_accuracy"]
    assert made["models"][0]["clean_accuracy"] > 0.7
    tuned = next(cell for cell in made["cells"] if cell["name"].endswith("tent-tuned"))
    assert tuned["options"] in [one["options"] for one in tuned["tried"]]
    assert tuned["relative_cost"] > 1
    # Everything is in the report: the same command again runs nothing and writes the same records.
    report.with_suffix(".jsonl").unlink()
    said.clear()
    driver.run_accuracy(plan, report, "test", progress)
    assert json.loads(report.read_text()) == records
    assert not any("/b8/" in line for line in said)


def test_weights_of_an_earlier_training_take_its_place(blob_data: Path, tmp_path: Path) -> None:
    data = {"blobs": {"kind": "image-folder", "path": str(blob_data), "size": 12}}
    runs = [{"methods": ["source"], "batches": [8], "settings": ["continual"], "seeds": [0]}]
    trained = small_plan(data=data, runs=runs, threads=1)
    report, said = tmp_path / "out.json", []
    driver.run_accuracy(trained, report, "test", driver.Progress(said.append))
    assert any("training small" in line for line in said)
    (cached,) = (tmp_path / "cache" / "benchmark" / "sources").iterdir()
    weights = cached.rename(tmp_path / "small.safetensors")
    plan = small_plan(data=data, runs=runs, threads=1)
    model = plan.models[0].model_copy(update={"weights": weights})
    plan = plan.model_copy(update={"models": (model,)})
    said.clear()
    again = tmp_path / "again.json"
    driver.run_accuracy(plan, again, "test", driver.Progress(said.append))
    assert json.loads(again.read_text()) == json.loads(report.read_text())
    assert not any("training" in line for line in said)

    def key() -> str:
        return cells_of(plan, {("blobs", "small"): False})[0].key

    keys = [cells_of(trained, {("blobs", "small"): False})[0].key, key()]
    other = groupnorm_cnn(classes=4, channels=3, widths=[8, 16])
    weights.write_bytes(safetensors.torch.save(other.state_dict()))
    keys.append(key())
    assert len(set(keys)) == 3
    with pytest.raises(BundleError, match=r"small\.safetensors has no weights of groupnorm-cnn: size mismatch"):
        driver.run_accuracy(plan, again, "test", driver.Progress(said.append))
    weights.write_bytes(b"no weights")
    with pytest.raises(BundleError, match=r"small\.safetensors has no weights of groupnorm-cnn"):
        driver.run_accuracy(plan, again, "test", driver.Progress(said.append))
    weights.unlink()
    with pytest.raises(ConfigError, match=r"weights .*small\.safetensors cannot be read: No such file"):
        key()


def test_a_bundle_of_the_users_own_architecture_is_measured(blob_data: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    make_tiny_bundle(bundle, channels=3, side=12)
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["model"]["architecture"] = "meta.models:groupnorm_cnn"  # as if it were not built in
    path.write_text(json.dumps(manifest))
    plan = small_plan(
        data={"blobs": {"kind": "image-folder", "path": str(blob_data), "size": 12}},
        models=[{"name": "small", "data": "blobs", "bundle": str(bundle)}],
        generators=[{"variant": "ours", "bundle": str(bundle)}],
        runs=[{"methods": ["source", "mgg"], "batches": [8], "settings": ["continual"], "seeds": [0]}],
        threads=1,
    )
    report = tmp_path / "out.json"
    with pytest.raises(BundleError, match="the plan of 'driftkeel benchmark accuracy' under factories"):
        driver.run_accuracy(plan, report, "test", driver.Progress([].append))
    plan = plan.model_copy(update={"factories": ("meta.models:groupnorm_cnn",)})
    assert driver.run_accuracy(plan, report, "test", driver.Progress([].append)) == 0
    assert {r["method"] for r in json.loads(report.read_text())} == {"source", "mgg"}


def test_a_bundle_for_other_frames_is_refused(blob_data: Path, tmp_path: Path, tiny_bundle_path: Path) -> None:
    plan = small_plan(
        data={"blobs": {"kind": "image-folder", "path": str(blob_data), "size": 12}},
        models=[{"name": "small", "data": "blobs", "bundle": str(tiny_bundle_path)}],
    )
    with pytest.raises(BundleError, match="not blobs's"):
        driver.run_accuracy(plan, tmp_path / "out.json", "test", driver.Progress(lambda _: None))


def test_how_many_frames_ours_learns_from_makes_new_results_of_larger_batches(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle_path: Path
) -> None:
    def keys() -> dict[int, str]:
        generators = [{"variant": "ours", "bundle": str(tiny_bundle_path)}]
        plan = small_plan(generators=generators, runs=[{"methods": ["mgg"], "batches": [16, 64]}])
        return {cell.batch: cell.key for cell in cells_of(plan, {("blobs", "small"): False})}

    before = keys()
    monkeypatch.setattr("meta.benchmark.plan.MOST_FRAMES", 32)
    after = keys()
    assert (after[16] == before[16], after[64] == before[64]) == (True, False)


@pytest.mark.parametrize(
    "made",
    ['{"cells": [{"key": "a"}], "models": []}', '{"cells": [{"key": "a", "records": 2}], "models": []}', "[]", None],
)
def test_another_file_is_not_taken_for_a_report(tmp_path: Path, made: str | None) -> None:
    report = tmp_path / "out.json"
    report.write_text(json.dumps([record("tent", "published", "fog", 0.1, 0.5, 0)]))
    if made is not None:
        run_file(report).write_text(made)
    with pytest.raises(ConfigError, match=r"out\.json with out\.run\.json beside it is no accuracy report"):
        Journal.beside(report)


def test_the_journal_survives_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    journal = Journal(path)
    journal.add("a", value=1)
    with path.open("a") as file:
        file.write('{"key": "b", "val')
    journal = Journal(path)
    assert journal.get("b") is None
    journal.add("b", value=2)
    again = Journal(path)
    assert (again.get("a"), again.get("b")) == ({"key": "a", "value": 1}, {"key": "b", "value": 2})


# --- tables ---


def record(method: str, variant: str, shift: str, accuracy: float, source: float, seed: int = 0) -> Record:
    return Record(
        data="d",
        model="m",
        setting="continual",
        shift=shift,
        severity=5,
        batch=16,
        method=method,
        variant=variant,
        seed=seed,
        accuracy=accuracy,
        source_accuracy=source,
    )


def test_tables_by_hand(tmp_path: Path) -> None:
    rows = [
        ("source", "", 0.5, 0.3),
        ("tent", "published", 0.6, 0.2),
        ("mgg", "ours", 0.6, 0.4),
        ("oracle", "", 0.7, 0.5),
    ]
    records = []
    for method, variant, fog, snow in rows:
        for seed in (0, 1):
            records.append(record(method, variant, "fog", fog + 0.02 * seed, 0.5 + 0.02 * seed, seed))
            records.append(record(method, variant, "snow", snow, 0.3, seed))
    results = Results(records)
    place, tent, mgg = Place("d", "m", 16), Entry("tent", "published"), Entry("mgg", "ours")
    mean, deviation = results.accuracy(place, mgg, "continual")
    assert mean == pytest.approx(50.5)
    assert deviation == pytest.approx(0.5 * 2**0.5)
    assert results.spread(place, tent) == pytest.approx(10)
    assert results.spread(place, mgg) == pytest.approx(0)
    assert results.worst(place, tent) == (pytest.approx(-10), "continual, snow 5")
    assert results.oracle_share(place, mgg) == pytest.approx(50)
    assert results.best_baseline(place, "continual", "published") == (tent, pytest.approx(40.5))
    text = markdown(results)
    assert "| mgg (ours) | 50.5 ± 0.7 | 0.0 | +10.0 (continual, fog 5) | 50% |" in text
    assert "| continual | tent 40.5 |" in text
    assert "| d, m, 16 | +10.0 | 0 of 2 |" in text
    for name in ("plot.svg", "plot.png"):
        plot(results, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1_000


def test_what_two_cells_measured_counts_once(tmp_path: Path) -> None:
    """A cell of seed 0, and later one of two seeds: the report has each seed once, and can be gone on from."""
    report = tmp_path / "out.json"
    journal = Journal(tmp_path / "out.jsonl")
    first, later = (
        [("tent", "published", "fog", 0.1, 0.5, 0)],
        [("tent", "published", "fog", 0.4, 0.5, s) for s in (0, 1)],
    )
    for key, rows in (("few", first), ("many", later)):
        journal.add(key, name=key, records=[record(*row) for row in rows])
    write_report(report, journal, ["few", "many"], "command", {}, [])
    records = read_records(report)
    assert [(r["seed"], r["accuracy"]) for r in records] == [(0, 0.4), (1, 0.4)]
    assert set(Journal.beside(report).entries) == {"few", "many"}
    with pytest.raises(DataError, match="1 results are there twice"):
        Results([*records, records[0]])


def test_spread_and_share_are_those_of_drift_alone() -> None:
    """A method that was run on more settings is compared on the same ones."""
    rows = [record("mgg", "ours", shift, 0.6, 0.5, 0) for shift in ("fog", "snow")]
    healthy = [record("mgg", "ours", shift, accuracy, 0.5, 0) for shift, accuracy in (("fog", 0.1), ("snow", 0.9))]
    healthy = [Record(**{**row, "setting": "healthy"}) for row in healthy]
    results, place, entry = Results(rows + healthy), Place("d", "m", 16), Entry("mgg", "ours")
    assert results.spread(place, entry) == pytest.approx(0)
    assert results.worst(place, entry) == (pytest.approx(-40), "healthy, fog 5")


def test_a_setting_where_the_oracle_gains_little_does_not_decide_the_share() -> None:
    records = []
    for setting, best, ours in (("continual", 0.9, 0.7), ("correlated", 0.52, 0.6)):
        for method, variant, accuracy in (("oracle", "", best), ("mgg", "ours", ours)):
            records.append(Record(**{**record(method, variant, "fog", accuracy, 0.5), "setting": setting}))
    results, place = Results(records), Place("d", "m", 16)
    assert results.oracle_share(place, Entry("mgg", "ours")) == pytest.approx(100 * (20 + 10) / (40 + 2))
    assert results.oracle_share(place, Entry("tent", "tuned")) is None


def test_a_margin_has_the_deviation_of_the_difference_seed_by_seed() -> None:
    """Seeds that are hard for both say nothing of who is ahead."""
    place, ours = Place("d", "m", 16), Entry("mgg", "ours")
    tent, mgg = [0.5, 0.7, 0.9], [0.52, 0.72, 0.89]
    rows = [record("tent", "tuned", "fog", accuracy, 0.5, seed) for seed, accuracy in enumerate(tent)]
    rows += [record("mgg", "ours", "fog", accuracy, 0.5, seed) for seed, accuracy in enumerate(mgg)]
    mean, deviation = Results(rows).margin(place, ours, "continual")
    assert (mean, deviation) == (pytest.approx(1.0), pytest.approx(3**0.5))
    assert "| d, m, 16 | +1.0 ± 1.7 |" in markdown(Results(rows))
    assert Results(rows[1:]).margin(place, ours, "continual") == (pytest.approx(71 - 80), 0.0)


def test_a_cell_that_loses_just_what_is_tolerated_is_not_counted() -> None:
    rows = [record("tent", "tuned", "fog", 0.8, 0.8)]
    rows += [record("mgg", "ours", "fog", 0.8, 0.805), record("mgg", "ours", "snow", 0.8, 0.806)]
    assert 100 * (0.8 - 0.805) < -0.5  # by the rounding of floats alone
    assert markdown(Results(rows)).count("| 1 of 2 |") == 1


def test_tuning_and_test_shifts_are_apart() -> None:
    assert set(driver.TEST) == set(TEST)
    assert not set(TEST) & set(TUNING)


def test_each_model_is_measured_with_its_own_generator() -> None:
    bundle = Path(__file__).parents[2] / "bundles/fashion-mnist"
    config = BenchmarkConfig.model_validate(
        {
            "data": {"d": {"kind": "fashion-mnist"}},
            "models": [{"name": name, "data": "d", "bundle": str(bundle)} for name in ("one", "two")],
            "generators": [
                {"variant": "ours", "bundle": str(bundle), "models": ["d/one"]},
                {"variant": "ours", "bundle": f"{bundle}-batchnorm", "models": ["d/two"]},
            ],
            "runs": [{"methods": ["mgg"], "seeds": [0]}],
        }
    )
    cells = cells_of(config, {("d", "one"): False, ("d", "two"): False})
    assert [config.generator(cell).bundle.name for cell in cells] == ["fashion-mnist", "fashion-mnist-batchnorm"]
