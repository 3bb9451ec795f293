"""Which passes run in the loop's own thread, by the last ones; that they do is in tests/system/test_loop.py."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from monitoring.metrics import WorkerMetrics
from schemas.config import WorkerConfig
from worker import flights
from worker.flights import Flights
from worker.step import Flight, Timed


def make_flights(lanes: int = 1, device: str = "cpu") -> Flights:
    parts: Any = SimpleNamespace(decoding=SimpleNamespace(busy=True))
    return Flights(WorkerConfig(device=device), parts, WorkerMetrics(4), lanes, threading.Event())


def flown(frames: int, predict: float, adapt: float, here: bool = False, done: float = 2.0) -> Flight:
    """A pass that is through."""
    flight = Flight(frozenset("a"), 0.0, Future(), Future(), here)
    prediction: Any = SimpleNamespace(batch=SimpleNamespace(frames=[None] * frames))
    passed: Any = SimpleNamespace(predictions=[prediction])
    flight.predicted.set_result((passed, Timed(1.0, 2 * predict, predict)))
    flight.adapted.set_result((None, Timed(done, 2 * adapt, adapt)))  # type: ignore[arg-type]
    return flight


@pytest.mark.parametrize(
    ("predict", "adapt", "lanes", "device", "expected"),
    [
        (0.1, 0.1, 1, "cpu", True),
        (0.1, 0.2, 1, "cpu", False),
        (0.2, 0.1, 1, "cpu", False),
        (0.1, 0.1, 2, "cpu", False),
        (0.1, 0.1, 1, "cuda", False),
    ],
)
def test_short_passes_of_one_lane_on_a_processor_run_here(
    predict: float, adapt: float, lanes: int, device: str, expected: bool
) -> None:
    known = make_flights(lanes, device)
    assert not known.here  # nobody knows yet how long one takes
    known._took(flown(16, predict, adapt))
    assert known.here is expected


def test_a_burst_after_quiet_is_expected_to_take_longer() -> None:
    """A pass of a frame says little of one with a hundred, which would hold up the loop for as many times as long."""
    known = make_flights()
    known._took(flown(1, 0.02, 0.02))
    assert known._expected(1) < flights.HERE_S < known._expected(100)
    known._took(flown(100, 0.1, 0.1))
    assert known._expected(1) == known._expected(100) == pytest.approx(0.2)


def test_a_small_pass_does_not_make_one_forget_what_a_large_one_took() -> None:
    """By its fixed cost alone the next large one would be expected to take for ever."""
    known = make_flights()
    known._took(flown(100, 0.1, 0.1))
    known._took(flown(2, 0.02, 0.01))
    assert known._expected(100) == pytest.approx(0.2)
    known._took(flown(100, 0.05, 0.05))
    assert known._expected(100) == pytest.approx(0.1)
    known._took(flown(50, 0.2, 0.2))  # slower than a larger one was: the machine is, or these adapt
    assert known._expected(100) == pytest.approx(0.8)


def test_what_a_large_pass_took_is_forgotten_after_a_while() -> None:
    """One slow moment would else keep passes out of the loop for as long as none is as large."""
    known = make_flights()
    known._took(flown(100, 0.3, 0.3))
    known._took(flown(40, 0.05, 0.05, done=11.0))
    assert not known.here
    known._took(flown(40, 0.05, 0.05, done=13.0))
    assert known.here


def test_a_forward_that_fails_in_a_thread_is_not_waited_for() -> None:
    """Nobody sets `predicted` then."""
    flight = Flight(frozenset("a"), 0.0, Future(), Future())
    flight.predicted.result = lambda timeout=None: pytest.fail("waits for ever")  # type: ignore[method-assign]
    flight.adapted.set_exception(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        make_flights()._took(flight)


def test_updates_that_are_due_here_come_before_passes_in_a_thread() -> None:
    """A pass in a thread beside them would have both ask for the interpreter in turns."""
    known = make_flights()
    pending = Flight(frozenset("a"), 0.0, Future(), Future(), here=True)
    known._under_way = [pending]
    assert known._updates_due
    assert not known._thread_busy
    known._under_way = [Flight(frozenset("a"), 0.0, Future(), Future())]
    assert known._thread_busy
    assert not known._updates_due
    known._under_way = [flown(1, 0.1, 0.1), flown(1, 0.1, 0.1, here=True)]
    assert not known._thread_busy
    assert not known._updates_due


def test_which_frames_are_too_late_is_asked_before_each_pass() -> None:
    """The second pass here begins when the first has been predicted."""
    calls: list[str] = []
    full = [SimpleNamespace(stream="a", frames=[None] * 128)]
    due = [full, full]
    pending = Flight(frozenset("a"), 0.0, Future(), Future(), here=True)
    known = make_flights()
    known._took(flown(128, 0.05, 0.05))
    known._parts = SimpleNamespace(  # type: ignore[assignment]
        control=SimpleNamespace(due=set()),
        intake=SimpleNamespace(drop_late=lambda batcher: calls.append("drop")),
        batcher=SimpleNamespace(take=lambda *_: calls.append("take") or due.pop()),
        scheduler=SimpleNamespace(predicts_only=bool, decide=lambda due, now: due),
        step=SimpleNamespace(start=lambda due, here: calls.append(f"here {here}") or pending),
        lateness=SimpleNamespace(took=lambda seconds, ended: None),
    )
    known.begin()
    assert calls == ["drop", "take", "here True"] * 2
