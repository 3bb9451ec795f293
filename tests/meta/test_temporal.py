import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meta import temporal
from meta.method import State
from meta.temporal import STAY_RANGE, filter_classes, fresh_belief

CLASSES = 5


def noisy(labels: Tensor, seed: int, bias: float = 0.0) -> Tensor:
    """Logits that are right about two times in three, with a preference for class 0."""
    random = torch.Generator().manual_seed(seed)
    logits = 1.6 * torch.nn.functional.one_hot(labels, CLASSES) + torch.randn(len(labels), CLASSES, generator=random)
    logits[:, 0] += bias
    return logits


def run(logits: Tensor, batch: int = 16) -> tuple[Tensor, State]:
    belief, answers = fresh_belief(1, CLASSES), []
    for part in logits.split(batch):
        answer, belief = filter_classes(
            part, torch.zeros(len(part), dtype=torch.long), torch.tensor([len(part)]), belief
        )
        answers.append(answer)
    return torch.cat(answers), belief


def accuracy(answers: Tensor, labels: Tensor) -> float:
    return float((answers.argmax(1) == labels).float().mean())


def test_a_stream_that_repeats_its_classes_gains_much() -> None:
    labels = torch.arange(60).remainder(CLASSES).repeat_interleave(20)
    logits = noisy(labels, 0)
    answers, belief = run(logits)
    assert accuracy(answers, labels) > accuracy(logits, labels) + 0.15
    assert float(belief["class_stay"]) > 0.7


def test_a_stream_without_order_loses_nothing_even_where_the_model_prefers_a_class() -> None:
    for bias in (0.0, 2.0):
        labels = torch.randint(CLASSES, (1_200,), generator=torch.Generator().manual_seed(1))
        logits = noisy(labels, 2, bias)
        answers, belief = run(logits)
        assert accuracy(answers, labels) > accuracy(logits, labels) - 0.005
        assert float(belief["class_stay"]) < 0.1


def test_one_frame_at_a_time_still_gains() -> None:
    labels = torch.arange(60).remainder(CLASSES).repeat_interleave(20)
    logits = noisy(labels, 3)
    answers, _ = run(logits, batch=1)
    assert accuracy(answers, labels) > accuracy(logits, labels) + 0.1


def test_the_belief_does_not_depend_on_how_frames_are_batched() -> None:
    logits = noisy(torch.arange(48) // 8 % CLASSES, 4)
    whole, parts = run(logits, 48)[1], run(logits, 5)[1]
    for name, tensor in whole.items():
        assert torch.allclose(tensor, parts[name], atol=1e-5), name


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any), seed=st.integers(0, 999))
def test_who_shares_a_pass_changes_nothing(counts: list[int], seed: int) -> None:
    stream = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    mixed = torch.randperm(len(stream), generator=torch.Generator().manual_seed(seed))
    logits = noisy(torch.arange(len(stream)) % CLASSES, seed)
    belief = fresh_belief(len(counts), CLASSES)
    belief["class_last"] = torch.rand(belief["class_last"].shape).softmax(1)
    together, after = filter_classes(logits[mixed], stream[mixed], torch.tensor(counts), belief)
    for s in range(len(counts)):
        mine = stream[mixed] == s
        alone_belief = {name: tensor[s : s + 1] for name, tensor in belief.items()}
        frames = logits[mixed][mine]
        alone, alone_after = filter_classes(
            frames, torch.zeros(len(frames), dtype=torch.long), torch.tensor([len(frames)]), alone_belief
        )
        assert torch.allclose(together[mine], alone, atol=1e-5)
        for name, tensor in alone_after.items():
            assert torch.allclose(after[name][s : s + 1], tensor, atol=1e-5), name


def test_logits_that_are_not_finite_change_no_belief() -> None:
    belief = fresh_belief(1, CLASSES)
    logits = torch.tensor([[float("nan")] * CLASSES, [float("inf")] * CLASSES])
    _, after = filter_classes(logits, torch.zeros(2, dtype=torch.long), torch.tensor([2]), belief)
    for name, tensor in belief.items():
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("few", [0, 4])
def test_what_is_given_stays_as_it_was(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the state of streams whose update may be refused."""
    monkeypatch.setattr(temporal, "FEW", few)
    logits, belief = noisy(torch.arange(8) % CLASSES, 0), fresh_belief(2, CLASSES)
    given = {name: tensor.clone() for name, tensor in {**belief, "logits": logits}.items()}
    _, after = filter_classes(logits, torch.arange(2).repeat_interleave(4), torch.tensor([4, 4]), belief)
    assert all(torch.equal(tensor, given[name]) for name, tensor in {**belief, "logits": logits}.items())
    assert not any(torch.equal(after[name], tensor) for name, tensor in belief.items())


@pytest.mark.parametrize("few", [0, 4])
def test_before_neighbours_have_proved_anything_frames_are_answered_alone(
    few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A little surer than the model, never without a doubt; what is not finite as the model puts it."""
    monkeypatch.setattr(temporal, "FEW", few)
    logits = noisy(torch.arange(4), 0)
    logits[2, 1] = -float("inf")
    answer, _ = filter_classes(logits, torch.zeros(4, dtype=torch.long), torch.tensor([4]), fresh_belief(1, CLASSES))
    expected = (logits / 0.7).softmax(1) * 0.98 + 0.02 / CLASSES
    expected[2] = logits[2].softmax(0)
    torch.testing.assert_close(answer, expected)


def test_probabilities_and_stay_keep_their_ranges() -> None:
    answers, belief = run(100 * noisy(torch.zeros(200, dtype=torch.long), 5))
    assert torch.allclose(answers.sum(1), torch.ones(200), atol=1e-5)
    assert STAY_RANGE[0] <= float(belief["class_stay"]) <= STAY_RANGE[1]


@pytest.mark.parametrize("correlated", [False, True])
def test_few_streams_are_filtered_as_many_are(correlated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few go one after the other, many side by side: two ways to the same numbers."""
    labels = torch.arange(150).div(8 if correlated else 0.3, rounding_mode="floor").long() % CLASSES
    logits = noisy(labels, 4)
    logits[40] = float("inf")
    one, after = run(logits, 75)
    monkeypatch.setattr(temporal, "FEW", 0)
    other, expected = run(logits, 75)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)
    for name, values in expected.items():
        torch.testing.assert_close(after[name], values, rtol=1e-4, atol=1e-4)


def test_a_broken_belief_raises_nothing() -> None:
    belief = {name: torch.full_like(tensor, -3.0) for name, tensor in fresh_belief(1, CLASSES).items()}
    filter_classes(noisy(torch.arange(5), 0), torch.zeros(5, dtype=torch.long), torch.tensor([5]), belief)


@pytest.mark.parametrize("few", [0, 4])
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "value"), [("class_seen", 0.0), ("class_seen", -1.0), ("class_stay", 30.0)])
def test_numbers_out_of_range_give_a_sound_belief(
    name: str, value: float, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state from the store may hold any number. One of the two streams has no frame in the pass."""
    monkeypatch.setattr(temporal, "FEW", few)
    belief = fresh_belief(2, CLASSES)
    belief[name][:] = value
    belief["class_proof"][:] = 100
    belief["class_last"][:] = torch.tensor([0.9, 0.025, 0.025, 0.025, 0.025])
    stream = torch.zeros(4, dtype=torch.long)
    answers, after = filter_classes(noisy(stream, 0), stream, torch.tensor([4, 0]), belief)
    assert bool((answers >= 0).all())
    torch.testing.assert_close(answers.sum(1), torch.ones(4))
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
