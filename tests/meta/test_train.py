from collections.abc import Callable
from functools import partial

import pytest
import torch

import meta.calibrate
from meta.calibrate import calibrate, source_statistics
from meta.learned import GeneratorSettings, LearnedOptimizer
from meta.mgg import MGG
from meta.models import groupnorm_cnn
from meta.norms import AdaptableModel
from meta.source import Preprocessing
from meta.train import Problem, TrainingSettings, meta_train

PREPROCESSING = Preprocessing(torch.tensor([0.5]), torch.tensor([0.3]))


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 4
    images = torch.zeros(80, 1, 28, 28)
    for i, label in enumerate(labels.tolist()):
        images[i, 0, 7 * label : 7 * label + 7] = 200
    return (images + 30 * torch.rand(images.shape, generator=random)).byte(), labels


def method() -> MGG:
    torch.manual_seed(0)
    model = AdaptableModel(groupnorm_cnn(classes=4, widths=(8,), group=4))
    images, _ = problem()
    source = source_statistics(model, images, PREPROCESSING)
    torch.manual_seed(0)
    return MGG(model, source, LearnedOptimizer(GeneratorSettings(hidden=4), model), 4)


def train(*subjects: MGG, **options) -> list[float]:
    settings = TrainingSettings(meta_steps=4, unroll=3, streams=4, batches=(1, 4), seed=2, **options)
    random = torch.Generator().manual_seed(2)
    problems = [Problem(subject, *problem(), PREPROCESSING, settings, random) for subject in subjects]
    return meta_train(problems, settings, say=lambda text: None)


def test_training_is_deterministic_and_moves_every_parameter() -> None:
    first, second = method(), method()
    start = {name: tensor.clone() for name, tensor in first.learned.state_dict().items()}
    assert train(first) == train(second)
    for name, tensor in first.learned.state_dict().items():
        assert torch.equal(tensor, second.learned.state_dict()[name]), name
        assert torch.isfinite(tensor).all()
        assert not torch.equal(tensor, start[name]), name


def test_without_labels_it_trains_on_the_objective_of_the_updates() -> None:
    labelled, unlabelled = method(), method()
    train(labelled)
    train(unlabelled, objective="unlabelled")
    one, other = labelled.learned.state_dict(), unlabelled.learned.state_dict()
    assert not torch.equal(one["rule.shortcut"], other["rule.shortcut"])


def test_two_models_train_one_rule() -> None:
    first, second = method(), method()
    second.learned.rule = first.learned.rule
    train(first, second)
    assert torch.equal(first.learned.rule.shortcut, second.learned.rule.shortcut)
    assert not torch.equal(first.learned.anchor.expand, second.learned.anchor.expand)


def test_training_leaves_the_source_model_alone() -> None:
    subject = method()
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    train(subject)
    for name, tensor in subject.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_calibration_is_deterministic_and_in_range() -> None:
    subject = method()
    for parameter in subject.learned.parameters():
        parameter.requires_grad_(False)
    run = partial(calibrate, subject, *problem(), PREPROCESSING, seed=3, windows=2, streams=3)
    first = run()
    assert first == run()
    calibration, limits = first
    assert 0.1 <= calibration.temperature <= 10
    assert limits.raw_gradient_norm > 0


def test_calibration_ends_where_a_round_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Callable[[], bool]] = []

    def fails(*arguments: object, wanted: Callable[[], bool]) -> None:
        begun.append(wanted)
        raise RuntimeError("a round")

    monkeypatch.setattr(meta.calibrate, "run_labelled", fails)
    with pytest.raises(RuntimeError, match="a round"):
        calibrate(method(), *problem(), PREPROCESSING, seed=3, windows=2, streams=3, say=lambda text: None)
    assert not any(wanted() for wanted in begun)
