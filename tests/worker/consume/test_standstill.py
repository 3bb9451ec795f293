"""A partition of which nothing comes although it has more: said once, and known until something comes."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from kafka import TopicPartition

from worker.consume import standstill
from worker.consume.standstill import STUCK_AFTER_S, Standstill

FIRST, SECOND = ("frames", 0), ("frames", 1)


class Client:
    """Two partitions that are read up to 10, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        monkeypatch.setattr(standstill, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.states = {partition: self.state() for partition in (FIRST, SECOND)}
        self.watch = Standstill(self)

    @staticmethod
    def state(end: int | None = 10, position: int | None = 10, paused: bool = False) -> Any:
        at = None if position is None else SimpleNamespace(offset=position)
        return SimpleNamespace(paused=paused, position=at, highwater=end)

    @property
    def _subscription(self) -> Any:
        return SimpleNamespace(assignment={TopicPartition(*p): state for p, state in self.states.items()})

    def poll(self, *arrived: tuple[str, int], after: float = 0.0, passed_over: tuple[Any, ...] = ()) -> set[Any]:
        self.now += after
        self.watch.polled(arrived, passed_over)
        return set(self.watch.stuck)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    return Client(monkeypatch)


def test_a_partition_with_more_of_which_nothing_comes_is_named_once(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    client.states[FIRST] = client.state(end=15)
    assert client.poll() == set()
    assert client.poll(after=STUCK_AFTER_S - 1) == set()
    with caplog.at_level(logging.ERROR, "driftkeel.consume"):
        assert [client.poll(after=1) for _ in range(3)] == [{FIRST}] * 3
    assert [line[:42] for line in caplog.messages] == ["nothing has come of partition 0 of frames "]
    assert client.poll(FIRST) == set()
    assert client.poll(after=STUCK_AFTER_S - 1) == set()
    assert client.poll(after=1) == {FIRST}


def test_others_that_bring_something_do_not_hide_it(client: Client) -> None:
    client.states = {FIRST: client.state(end=15), SECOND: client.state(end=15)}
    client.poll(SECOND)
    assert client.poll(SECOND, after=STUCK_AFTER_S) == {FIRST}


def test_a_client_that_never_hears_where_a_partition_ends_is_stuck_too(client: Client) -> None:
    client.states[FIRST] = client.state(end=None)
    client.poll()
    assert client.poll(after=STUCK_AFTER_S) == {FIRST}


@pytest.mark.parametrize(
    "state",
    [Client.state(), Client.state(end=15, paused=True), Client.state(end=15, position=None)],
    ids=["at its end", "paused", "not begun"],
)
def test_where_nothing_is_to_come_nothing_is_stuck(client: Client, state: Any) -> None:
    client.states[FIRST] = state
    client.poll()
    assert client.poll(after=2 * STUCK_AFTER_S) == set()


def test_what_is_not_read_on_purpose_or_has_gone_is_not_stuck(client: Client) -> None:
    client.states[FIRST] = client.state(end=15)
    client.poll(passed_over=(FIRST,))
    assert client.poll(after=STUCK_AFTER_S, passed_over=(FIRST,)) == set()
    client.poll()
    assert client.poll(after=STUCK_AFTER_S) == {FIRST}
    del client.states[FIRST]
    assert client.poll() == set()
