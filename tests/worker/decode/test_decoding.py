"""Order, drops and back-pressure of decoding beside the loop."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from schemas.errors import FrameError
from schemas.frame import Frame
from tests.worker.decode.test_image import png_header
from worker.decode.decoding import HEAVY_AHEAD, LIGHT, LIGHT_AHEAD, MAX_SHARE, Arrival, Decoding
from worker.kafka.records import bytes_of

SMALL, LARGE = png_header(9, 9), png_header(4_000, 4_000)


def record(key: bytes | None, partition: int, offset: int, value: bytes = SMALL) -> Any:
    return SimpleNamespace(key=key, topic="t", partition=partition, offset=offset, value=value, headers=[("a", b"b")])


def frame_of(arrival: Arrival) -> Any:
    """What stands for its frame in these tests."""
    return SimpleNamespace(stream=repr(arrival.record.key), about=arrival)


def prepare(arrivals: list[Arrival]) -> None:
    for arrival in arrivals:
        arrival.frame = frame_of(arrival)


def decode(frame: Any, received: float) -> Any:
    return frame.about


def where(arrivals: list[Arrival]) -> list[int]:
    return [arrival.record.offset for arrival in arrivals]


def all_of(decoding: Decoding, prepare: Callable[[list[Arrival]], None] = prepare) -> list[Arrival]:
    """Turn until nothing is left."""
    taken = []
    while decoding:
        decoding.hand_over(prepare)
        wait(decoding.running, 120)
        taken += decoding.take()
    return taken


@pytest.mark.parametrize("threads", [1, 3])
def test_each_record_comes_out_once_and_in_order(threads: int) -> None:
    decoding = Decoding(decode, threads)
    for i in range(500):
        decoding.add(float(i), record(b"ab"[i % 2 : i % 2 + 1], 0, i, LARGE if i % 7 == 0 else SMALL))
    taken = all_of(decoding)
    for key in (b"a", b"b"):
        mine = where([a for a in taken if a.record.key == key])
        assert mine == sorted(mine)
    assert sorted(where(taken)) == list(range(500))
    assert decoding.held == 0
    decoding.close()


class Canvas:
    """What a decoder takes for a picture."""


def test_of_a_picture_that_cannot_be_decoded_nothing_stays_until_garbage_is_collected() -> None:
    canvases: list[weakref.ref[Canvas]] = []

    def damaged(canvas: Canvas) -> Any:
        canvases.append(weakref.ref(canvas))
        try:
            raise OSError("failed to read next frame")
        except OSError as error:
            raise FrameError("damaged", "it is") from error

    def fails(frame: Any, received: float) -> Any:
        try:
            return damaged(Canvas())
        except FrameError as error:
            return error

    def refuse(arrivals: list[Arrival]) -> None:
        prepare(arrivals)
        for arrival in arrivals[::2]:
            finish(arrival, Canvas())

    def finish(arrival: Arrival, canvas: Canvas) -> None:
        try:
            damaged(canvas)
        except FrameError as error:
            decoding.finish(arrival, error)

    decoding = Decoding(fails, 1)
    for i in range(8):
        decoding.add(float(i), record(b"a", 0, i))
    gc.disable()
    try:
        assert {arrival.result.kind for arrival in all_of(decoding, refuse)} == {"damaged"}
        decoding.close()
        assert len(canvases) == 8
        assert [canvas() for canvas in canvases] == [None] * 8
    finally:
        gc.enable()


def test_what_is_held_is_counted_with_its_headers() -> None:
    """A sender may put a megabyte of them on a picture of some bytes."""
    decoding, many = Decoding(decode, 1), record(b"a", 0, 0)
    many.headers = [("", None)] * 1_000
    decoding.add(0.0, many)
    assert decoding.held > 50_000
    all_of(decoding)
    assert decoding.held == 0
    decoding.close()


def test_small_pictures_do_not_wait_for_large_ones() -> None:
    free = threading.Event()

    def slow(frame: Any, received: float) -> Any:
        if frame.about.record.value == LARGE:
            assert free.wait(120)
        return frame.about

    decoding = Decoding(slow, 1)
    for i in range(30):
        decoding.add(0.0, record(b"large", 0, i, LARGE))
    decoding.add(0.0, record(b"mixed", 0, 30, LARGE))
    for i in range(31, 131):
        decoding.add(0.0, record(b"small" if i % 2 else b"mixed", 0, i))
    taken: list[Arrival] = []
    while len(taken) < 50:
        decoding.hand_over(prepare)
        assert wait(decoding.running, 120, "FIRST_COMPLETED").done
        taken += decoding.take()
    # Those of a stream behind its own large picture do wait.
    assert {a.record.key for a in taken} == {b"small"}
    free.set()
    assert len(all_of(decoding)) == 81
    decoding.close()


def test_an_error_in_a_thread_is_raised_in_the_loop() -> None:
    def broken(frame: Frame, received: float) -> FrameError:
        raise ZeroDivisionError

    decoding = Decoding(broken, 1)
    decoding.add(0.0, record(b"a", 0, 0))
    with pytest.raises(ZeroDivisionError):
        all_of(decoding)
    decoding.close()


def test_of_a_dropped_partition_nothing_more_is_decoded() -> None:
    free, decoded = threading.Event(), []

    def slow(frame: Any, received: float) -> Any:
        decoded.append(frame.about)
        assert free.wait(120)
        return frame.about

    decoding = Decoding(slow, 1)
    for i in range(3 * MAX_SHARE):
        decoding.add(0.0, record(b"a", 0, i))
    decoding.hand_over(prepare)
    decoding.drop(("t", 0))
    assert not decoding
    assert decoding.held == 0
    free.set()
    wait(decoding.running, 120)
    assert decoding.take() == []
    assert len(decoded) <= 1
    decoding.close()


class Pool:
    """Threads that work when they are told to."""

    made: list[Pool] = []  # noqa: RUF012

    def __init__(self, threads: int, thread_name_prefix: str) -> None:
        self.waiting: list[tuple[Future[Any], Callable[..., Any], Any]] = []
        self.made.append(self)

    def submit(self, work: Callable[..., Any], share: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, work, share))
        return future

    def work(self, which: int) -> None:
        future, work, share = self.waiting.pop(which)
        future.set_result(work(share))

    def shutdown(self, cancel_futures: bool) -> None:
        pass


class Machine(RuleBasedStateMachine):
    """Records of some streams in some partitions, which go and are read again while threads decode them."""

    def __init__(self) -> None:
        super().__init__()
        Pool.made = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("worker.decode.decoding.ThreadPoolExecutor", Pool)
            self.decoding = Decoding(decode, 2)
        self.sent: dict[int, list[Any]] = {0: [], 1: [], 2: []}  # a partition's records
        self.next = [0, 0, 0]  # what is read next of each
        self.reading: dict[int, list[Any]] = {0: [], 1: [], 2: []}  # what was read since it was last dropped
        self.taken: dict[int, list[Any]] = {0: [], 1: [], 2: []}  # and taken of these
        self.drop_within: int | None = None

    @rule(partition=st.integers(0, 2), keys=st.lists(st.sampled_from([b"a", b"b", b"c", None]), max_size=80))
    def send(self, partition: int, keys: list[bytes | None]) -> None:
        for key in keys:
            offset = len(self.sent[partition])
            value = LARGE if offset % 11 == 3 else SMALL
            self.sent[partition].append((key, offset, value))

    @rule(partition=st.integers(0, 2), count=st.integers(1, 60))
    def read(self, partition: int, count: int) -> None:
        first = self.next[partition]
        for key, offset, value in self.sent[partition][first : first + count]:
            # Each reading makes another object: what is taken has to be of the newest one.
            one = record(key, partition, offset, value)
            self.reading[partition].append(one)
            self.decoding.add(0.0, one)
        self.next[partition] = min(first + count, len(self.sent[partition]))

    @rule(partition=st.integers(0, 2), back=st.integers(0, 100))
    def rewind(self, partition: int, back: int) -> None:
        self.decoding.drop(("t", partition))
        self.next[partition] = max(0, self.next[partition] - back)
        self.reading[partition], self.taken[partition] = [], []

    @rule(dropped=st.none() | st.integers(0, 2))
    def hand_over(self, dropped: int | None) -> None:
        def some(arrivals: list[Arrival]) -> None:
            prepare(arrivals)
            if dropped is not None:
                self.rewind(dropped, 50)
            for arrival in arrivals:
                if arrival.record.offset % 5 == 1:
                    self.decoding.finish(arrival, None)
                elif arrival.record.offset % 5 == 2:
                    self.decoding.finish(arrival, FrameError("empty", "nothing"))

        self.decoding.hand_over(some)

    @precondition(lambda self: any(pool.waiting for pool in Pool.made))
    @rule(data=st.data())
    def work(self, data: st.DataObject) -> None:
        pool = data.draw(st.sampled_from([pool for pool in Pool.made if pool.waiting]))
        pool.work(data.draw(st.integers(0, len(pool.waiting) - 1)))

    @rule()
    def take(self) -> None:
        for arrival in self.decoding.take():
            assert arrival.done
            if arrival.record.offset % 5 not in (1, 2):
                assert arrival.result is arrival
            self.taken[arrival.record.partition].append(arrival.record)

    @invariant()
    def each_stream_is_taken_in_order_and_of_the_newest_reading(self) -> None:
        for partition, taken in self.taken.items():
            for key in (b"a", b"b", b"c", None):
                mine = [one for one in taken if one.key == key]
                read = [one for one in self.reading[partition] if one.key == key]
                assert all(one is other for one, other in zip(mine, read[: len(mine)], strict=True))

    @invariant()
    def what_is_not_taken_is_counted(self) -> None:
        left = [
            one
            for partition, read in self.reading.items()
            for one in read
            if not any(one is other for other in self.taken[partition])
        ]
        assert len(self.decoding) == len(left)
        assert self.decoding.held == sum(bytes_of(one) for one in left)

    @invariant()
    def threads_have_no_more_than_their_share(self) -> None:
        for pool, ahead in zip(Pool.made, (LIGHT_AHEAD, HEAVY_AHEAD), strict=True):
            assert len(pool.waiting) <= ahead * 2
            assert all(0 < len(share) <= MAX_SHARE for _, _, share in pool.waiting)
        assert all(len(share) == 1 for _, _, share in Pool.made[1].waiting)

    def teardown(self) -> None:
        """In the end everything is taken."""
        while self.decoding or any(pool.waiting for pool in Pool.made):  # dropped records may still be at work
            self.decoding.hand_over(prepare)
            for pool in Pool.made:
                while pool.waiting:
                    pool.work(-1)
            self.take_all()
        assert {p: len(t) for p, t in self.taken.items()} == {p: len(r) for p, r in self.reading.items()}
        assert not self.decoding.running
        assert self.decoding.streams == set()

    def take_all(self) -> None:
        for arrival in self.decoding.take():
            self.taken[arrival.record.partition].append(arrival.record)


TestDecoding = Machine.TestCase
TestDecoding.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_light_is_what_fits_the_first_lane() -> None:
    assert 9 * 9 < LIGHT < 4_000 * 4_000
