"""Partitions that another worker takes over while this one waits for the store to claim their streams."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from schemas.config import Adapt, WorkerConfig
from schemas.errors import UnreachableError
from schemas.state import StreamHeader, decode_header
from tests.broker.process import bootstrap as bootstrap  # a fixture
from tests.conftest import Topic, picture
from tests.outline import chained
from tests.system.conftest import partition_of, running
from worker.run import Worker
from worker.store.store import Claimed, Which

STREAMS = [f"cam-{i}" for i in range(12)]
FRAMES = 8


def owned(worker: Worker) -> set[str]:
    """The streams of the partitions that a worker has."""
    ours = {number for _, number in worker._consumer.assignment()}
    return {stream for stream in STREAMS if partition_of(stream) in ours}


def header(worker: Worker, stream: str) -> StreamHeader | None:
    content = worker._store.read(stream).header
    return decode_header(content) if content else None


def folded(worker: Worker, stream: str) -> int:
    found = header(worker, stream)
    return found.frames if found else 0


@pytest.fixture
def pair(config: WorkerConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Worker]]:
    """Two workers of a group, which take turns. The first has all partitions, as the second has not turned yet."""
    monkeypatch.setattr("worker.store.retry.LONGEST_PAUSE_S", 0.2)
    config = config.model_copy(update={"adapt": Adapt()})
    with ExitStack() as stack:
        first = stack.enter_context(running(config.model_copy(update={"worker": "first"})))
        deadline = time.monotonic() + 240
        while len(first._consumer.assignment()) < 3:
            assert time.monotonic() < deadline
            first._turn()
        yield [first, stack.enter_context(running(config.model_copy(update={"worker": "second"})))]


@pytest.mark.parametrize("used", [False, True], ids=["before the second claims them", "after the second used them"])
def test_streams_that_were_claimed_too_late_are_not_kept(pair: list[Worker], topic: Topic, used: bool) -> None:
    first, second = pair
    claim, deadline = first._store.claim, time.monotonic() + 240
    late: list[str] = []

    def taken() -> bool:
        moved = set(STREAMS) - owned(first)
        if not moved or owned(second) != moved:
            return False
        return not used or all(folded(second, stream) for stream in moved)

    def delayed(streams: list[str], owner: str, which: Which = "any") -> list[Claimed]:
        """The store does not answer until the second worker has some of the partitions."""
        if late:
            return claim(streams, owner, which)
        if not taken():
            assert time.monotonic() < deadline
            second._turn()
            raise UnreachableError("the store does not answer")
        late.extend(set(streams) - owned(first))
        return claim(streams, owner, which)

    first._store.claim = delayed  # type: ignore[method-assign]
    records = [(stream.encode(), picture(i), []) for i in range(FRAMES) for stream in STREAMS]
    positions = topic.send(first.config.kafka.topics.frames, records)
    ids: dict[str, list[str]] = {stream: [] for stream in STREAMS}
    for (key, _, _), at in zip(records, positions, strict=True):
        ids[key.decode()].append(f"{at.topic}/{at.partition}/{at.offset}")
    while not late:
        first._turn()
    while not all(folded(first, stream) == FRAMES for stream in STREAMS):
        assert time.monotonic() < deadline
        first._turn()
        second._turn()
    for stream in STREAMS:
        found = header(first, stream)
        assert found is not None
        assert (found.frames, found.folded) == (FRAMES, chained(ids[stream]))
    for worker in pair:
        assert set(worker._streams.engine.streams) <= owned(worker)
