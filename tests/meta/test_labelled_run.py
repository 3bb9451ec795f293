"""Simulated streams with known truth, and what the benchmark of the estimate makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meta.benchmark.proxies import SPANS, WindowTable, _best_possible
from meta.bundle import Bundle
from meta.labelled_run import FRAMES, WINDOW_STEPS, LabelledRun, cameras, run_labelled
from meta.proxies import SIGNALS, Observer
from meta.shifts import TUNING
from meta.source import Preprocessing


@pytest.fixture
def watched(tiny_bundle: Bundle) -> LabelledRun:
    images = torch.randint(0, 256, (60, 1, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
    line = cameras(images, torch.arange(60) % 4, TUNING, 3, torch.Generator().manual_seed(1))
    line[0].length = 3
    observer = Observer(tiny_bundle.model, tiny_bundle.statistics, 0.3)
    preprocessing = Preprocessing(torch.zeros(1), torch.ones(1))
    return run_labelled(tiny_bundle.method, observer, line, preprocessing, WINDOW_STEPS + 2, adapt=True)


def test_truth_is_the_share_of_right_answers_and_both_halves_of_it(watched: LabelledRun) -> None:
    right = [(a.argmax(1) == y).float() for a, y in zip(watched.answers, watched.labels, strict=True)]
    window = torch.stack(right[:WINDOW_STEPS]).view(WINDOW_STEPS, 3, FRAMES)
    truth = watched.truth[WINDOW_STEPS - 1][:, 0]
    assert truth == pytest.approx(window.mean((0, 2)).numpy(), abs=1e-6)
    assert watched.halves[WINDOW_STEPS - 1].mean(1) == pytest.approx(truth, abs=1e-6)
    every_other = window[:, 0].view(WINDOW_STEPS, -1, 2).mean((0, 1))  # The first camera sees each item once.
    assert watched.halves[WINDOW_STEPS - 1][0] == pytest.approx(every_other.numpy(), abs=1e-6)


def test_rows_are_taken_where_windows_end(watched: LabelledRun) -> None:
    table = watched.table()
    assert table.values.shape == (3, len(SIGNALS))
    assert np.array_equal(table.truth, watched.truth[WINDOW_STEPS - 1])
    assert watched.visits[2].tolist() == [0, 0, 0]
    assert watched.visits[3].tolist() == [1, 0, 0]


def told(first: np.ndarray, second: np.ndarray) -> WindowTable:
    halves = np.stack([first, second], 1)
    return WindowTable(np.zeros((len(first), 1)), np.zeros((len(first), 2)), halves, np.arange(len(first)) // 4)


def test_what_halves_agree_on_bounds_every_rank_correlation() -> None:
    random = np.random.default_rng(0)
    expected = random.uniform(0.5, 1, 6_000)
    assert _best_possible([told(expected, expected)])["best_spearman"] == 1
    unlike = _best_possible([told(random.uniform(size=6_000), random.uniform(size=6_000))])
    assert unlike["best_spearman"] < 0.35
    noisy = [expected + random.normal(0, 0.1, 6_000) for _ in range(2)]
    reached = np.corrcoef(expected, noisy[0] + noisy[1])[0, 1]
    assert _best_possible([told(*noisy)])["best_spearman"] == pytest.approx(reached, abs=0.03)


def test_visits_are_averaged_whole() -> None:
    values = np.array([0.0, 1, 2, 3, 10, 10, 10, 30])
    assert SPANS["_visit"](values, told(values, values)).tolist() == [1.5, 15]
