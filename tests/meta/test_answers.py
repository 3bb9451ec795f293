"""What is seen of any method: its answers and source's, and nothing that it would have to report besides."""

import math

import pytest
import torch

from meta.answers import AnswerObserver
from meta.baselines import BASELINES, Setup, build
from meta.method import Forward
from meta.models import build_network
from meta.norms import AdaptableModel
from meta.objective import feature_statistics

CLASSES = 4


@pytest.fixture(scope="module")
def model() -> AdaptableModel:
    torch.manual_seed(0)
    return AdaptableModel(
        build_network("groupnorm-cnn", {"classes": CLASSES, "channels": 1, "widths": [8, 8], "group": 4})
    )


def passed(logits: torch.Tensor, stream: torch.Tensor) -> Forward:
    counts = torch.bincount(stream).float()
    return Forward(logits, logits.new_zeros(len(logits), 0), None, stream, counts, {})


def test_answers_that_go_to_one_class_show_against_source(model: AdaptableModel) -> None:
    frames = torch.randn(16, 1, 28, 28)
    source = model(frames)
    one_class = torch.full((8, CLASSES), -9.0)
    one_class[:, 2] = 9.0
    logits = torch.cat([one_class, source[8:]])
    stream = torch.arange(16) // 8
    (taken, sound), asked = AnswerObserver(model).observe(frames, passed(logits, stream), torch.arange(16))
    torch.testing.assert_close(asked, source)
    assert taken.source == tuple(source[:8].argmax(1).tolist())
    assert taken.shadow["moved"] == pytest.approx(float((source[:8].argmax(1) != 2).float().mean()))
    assert taken.flipped == round(8 * taken.shadow["moved"])
    assert taken.own["marginal"] < 0.01
    assert taken.own["entropy"] < 0.01
    assert sound.shadow["moved"] == sound.flipped == 0
    assert sound.own["entropy"] == pytest.approx(sound.shadow["source_entropy"], abs=1e-5)


def test_only_streams_whose_frames_are_chosen_are_compared(model: AdaptableModel) -> None:
    frames, stream = torch.randn(6, 1, 28, 28), torch.tensor([0, 0, 0, 1, 1, 1])
    logits, observer = torch.randn(6, CLASSES), AnswerObserver(model)
    first, second = observer.observe(frames, passed(logits, stream), torch.tensor([3, 5]))[0]
    assert (first.frames, first.shadowed, first.rank, first.flipped, first.source) == (3, 0, None, None, ())
    assert (second.frames, second.shadowed, len(second.source)) == (3, 2, 2)
    unasked, source = observer.observe(frames, passed(logits, stream), torch.tensor([], dtype=torch.long))
    assert source is None
    assert [one.own for one in unasked] == [first.own, second.own]


@pytest.mark.parametrize("frames", [2, 3, CLASSES, 3 * CLASSES])
def test_few_frames_of_as_many_classes_are_as_mixed_as_they_can_be(model: AdaptableModel, frames: int) -> None:
    """Of one, the mean prediction says nothing: a slow camera would look like a collapse."""
    logits = 30.0 * torch.eye(CLASSES)[torch.arange(frames) % CLASSES]
    (seen,), _ = AnswerObserver(model).observe(
        torch.randn(frames, 1, 28, 28), passed(logits, torch.zeros(frames, dtype=torch.long)), torch.arange(frames)
    )
    assert seen.own["marginal"] == pytest.approx(1, abs=0.03)
    (alone,), _ = AnswerObserver(model).observe(
        torch.randn(1, 1, 28, 28), passed(logits[:1], torch.zeros(1, dtype=torch.long)), torch.arange(1)
    )
    assert "marginal" not in alone.own


def test_the_rank_is_that_among_clean_frames(model: AdaptableModel) -> None:
    frames, stream = torch.randn(8, 1, 28, 28), torch.zeros(8, dtype=torch.long)
    for known, rank in (([0.0], 0.5), ([2.0], -0.5), ([], 0.0)):
        (seen,), _ = AnswerObserver(model, known).observe(frames, passed(model(frames), stream), torch.arange(8))
        assert seen.rank == rank


def test_broken_numbers_are_no_signals(model: AdaptableModel) -> None:
    logits = torch.full((4, CLASSES), math.nan)
    (seen,), _ = AnswerObserver(model).observe(
        torch.randn(4, 1, 28, 28), passed(logits, torch.zeros(4, dtype=torch.long)), torch.arange(4)
    )
    assert all(math.isfinite(value) for value in [*seen.own.values(), *seen.shadow.values()])


@pytest.mark.parametrize("name", sorted(set(BASELINES) - {"oracle"}))
def test_every_method_can_be_observed(model: AdaptableModel, name: str) -> None:
    frames, stream = torch.randn(8, 1, 28, 28), torch.arange(8) % 2
    with torch.no_grad():
        source = feature_statistics(model.forward_with_features(frames)[1])
    method = build(name, Setup(model, source, CLASSES, torch.zeros(1), torch.ones(1), frame_shape=(1, 28, 28)))
    state = method.fresh(2)
    forward = method.predict(frames, stream, state)
    seen, _ = AnswerObserver(model).observe(frames, forward, torch.arange(8))
    assert [one.shadowed for one in seen] == [4, 4]
    assert {"entropy", "marginal"} == set(seen[0].own)
    method.update(forward)  # The graph is as it was.
