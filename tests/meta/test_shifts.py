import pytest
import torch

from meta.calibration_shifts import CALIBRATION
from meta.shifts import HELD_OUT, TUNING
from meta.simulate import SimulatedStream

ALL = {**CALIBRATION, **HELD_OUT}


def test_training_and_measuring_shifts_are_apart() -> None:
    assert TUNING.items() < CALIBRATION.items()
    assert not set(CALIBRATION) & set(HELD_OUT)
    assert not set(CALIBRATION.values()) & set(HELD_OUT.values())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(6, 1, 28, 28), (4, 3, 32, 40)])
def test_shifts_give_images(name: str, shape: tuple[int, ...]) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    severity = torch.linspace(0, 1, shape[0])
    traits = torch.rand(4, generator=torch.Generator().manual_seed(1))
    shifted = ALL[name](images, severity, traits, torch.Generator().manual_seed(2))
    assert shifted.shape == images.shape
    assert shifted.min() >= 0
    assert shifted.max() <= 1
    assert (shifted[-1] - images[-1]).abs().mean() > 0.01
    again = ALL[name](images, severity, traits, torch.Generator().manual_seed(2))
    assert torch.equal(shifted, again)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [(1, 1), (1, 8), (2, 2), (8, 1), (3, 5)])
def test_pictures_may_be_of_any_size(name: str, size: tuple[int, int]) -> None:
    images = torch.rand((5, 3, *size), generator=torch.Generator().manual_seed(0))
    shifted = ALL[name](images, torch.linspace(0, 1, 5), torch.rand(4), torch.Generator().manual_seed(2))
    assert shifted.shape == images.shape
    assert bool(shifted.isfinite().all())


def test_simulated_streams_repeat_by_seed_and_some_are_clean() -> None:
    images = torch.randint(0, 256, (50, 1, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
    labels = torch.arange(50) % 5

    def run() -> list[torch.Tensor]:
        random = torch.Generator().manual_seed(4)
        streams = [SimulatedStream(images, labels, TUNING, random) for _ in range(30)]
        assert any(not stream.active for stream in streams)
        assert any(len(stream.active) > 1 for stream in streams)
        return [stream.next(4)[0] for stream in streams]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
