"""The attack suite's own parts: what it serves goes through guard and engine, and what it reports is what happened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from meta.benchmark.corruptions import TEST
from meta.benchmark.proxies import as_shift, spearman
from meta.data import LabelledImages
from worker.benchmark.guard import NAN_MARK, WINDOW, Bench, recovery
from worker.benchmark.guard_attacks import ATTACKS, other_images


@pytest.fixture
def pool() -> LabelledImages:
    random = np.random.default_rng(0)
    return LabelledImages(random.integers(0, 255, (64, 28, 28), np.uint8), np.arange(64) % 4)


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_have_the_frames_asked_for(name: str, pool: LabelledImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DRIFTKEEL_CIFAR10", raising=False)
    attack, _ = ATTACKS[name]
    frames = attack(pool, 40, np.random.default_rng(1))
    assert frames.shape == (40, 28, 28)
    assert frames.dtype == np.uint8
    assert np.array_equal(frames, attack(pool, 40, np.random.default_rng(1)))


def test_the_record_says_what_the_wrong_camera_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DRIFTKEEL_CIFAR10", str(tmp_path))
    assert other_images() == "drawn textures"
    (tmp_path / "test.npz").touch()
    assert other_images() == "CIFAR-10 test images in grey"
    monkeypatch.delenv("DRIFTKEEL_CIFAR10")
    assert other_images() == "drawn textures"


def test_frames_that_make_no_numbers_change_nothing(tiny_bundle, pool: LabelledImages) -> None:
    bench = Bench(tiny_bundle)
    served = bench.serve({"a": pool.images[:32]})["a"]
    assert (len(served.answers), served.decisions["applied"]) == (32, 2)
    before = {name: tensor.clone() for name, tensor in bench.engine.tensors("a").items()}
    broken = pool.images[32:48].copy()
    broken[3] = NAN_MARK
    served = bench.serve({"a": broken})["a"]
    assert dict(served.reasons) == {"not finite": 1}
    assert all(torch.equal(tensor, before[name]) for name, tensor in bench.engine.tensors("a").items())


def test_a_camera_that_hangs_stops_teaching(tiny_bundle, pool: LabelledImages) -> None:
    served = Bench(tiny_bundle).serve({"a": np.repeat(pool.images[:1], 64, 0), "b": pool.images})
    assert served["a"].decisions["applied"] == 0
    assert served["b"].decisions["applied"] > 0


def test_recovery_is_where_no_window_falls_behind_any_more() -> None:
    source, right = np.ones(1_000, bool), np.ones(1_000, bool)
    assert recovery(right, source) == 0
    right[:40] = False
    # From the frame on at which the window holds no more than five points of these.
    assert recovery(right, source) == 40 - int(0.05 * WINDOW)
    right[-20:] = False
    assert recovery(right, source) is None


def test_corruptions_as_shifts_leave_what_has_no_severity(pool: LabelledImages) -> None:
    images = torch.from_numpy(pool.images[:4]).unsqueeze(1).float() / 255
    severity = torch.tensor([0.0, 0.3, 1.0, 0.0])
    shifted = as_shift(TEST["contrast"])(images, severity, torch.rand(4), torch.Generator().manual_seed(0))
    changed = [not torch.equal(a, b) for a, b in zip(images, shifted, strict=True)]
    assert changed == [False, True, True, False]
    assert shifted[2].std() < shifted[1].std()


def test_rank_correlation() -> None:
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([2.0, 3, 4, 99])) == pytest.approx(1)
    assert spearman(np.array([1.0, 1, 2, 2]), np.array([1.0, 2, 3, 4])) == pytest.approx(0.8944, abs=1e-4)
    assert spearman(np.zeros(4), np.arange(4.0)) == 0
