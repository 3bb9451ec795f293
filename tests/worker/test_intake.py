"""What becomes of records: frames, dead letters, or nothing new."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from monitoring.metrics import WorkerMetrics
from schemas.bundle import Preprocess
from schemas.config import Batch, Frames
from schemas.errors import FrameError
from schemas.frame import Frame, Position
from tests.conftest import picture
from worker.batch.lateness import Lateness
from worker.consume.offsets import Offsets
from worker.decode.decoding import Decoding
from worker.decode.image import DecodedFrame, decode_frame
from worker.intake import Intake
from worker.log import LINES
from worker.publish.dead_letters import DeadLetters
from worker.publish.publisher import Publisher

GREY = Preprocess(mode="L", width=28, height=28, mean=[0.5], std=[0.2])


class Post:
    """A publisher of dead letters, which are acknowledged while `open`."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, str]] = []
        self.open = threading.Event()
        self.open.set()
        self.closed = threading.Event()

    def dead_letter(self, record: Any, error: FrameError) -> None:
        self.sent.append((record.offset, error.kind))

    def settle(self, keep_alive: Callable[[], object]) -> None:
        assert self.open.wait(120)

    def close(self) -> None:
        self.closed.set()


class Loop:
    """What the worker's loop does with records."""

    def __init__(self, settings: Batch) -> None:
        self.offsets, self.post, self.metrics = Offsets(), Post(), WorkerMetrics(10)
        self.dead_letters = DeadLetters(cast(Publisher, self.post))
        limits = Frames(decode_threads=2)
        self.decoding = Decoding(partial(decode_frame, limits=limits, preprocess=GREY), 2)
        self.intake = Intake(limits, Lateness(settings), self.decoding, self.offsets, self.dead_letters, self.metrics)
        self.frames: list[DecodedFrame] = []
        self.loaded: list[Frame] = []
        self.folded = -1
        self.began = time.monotonic()

    def receive(
        self,
        records: list[tuple[bytes | None, bytes | None]],
        first: int = 0,
        timestamp: int = 0,
        headers: Sequence[tuple[str, bytes | None]] = (),
    ) -> None:
        for offset, (key, value) in enumerate(records, first):
            self.offsets.received(Position("frames", 0, offset))
            about = {"topic": "frames", "partition": 0, "offset": offset, "headers": headers, "timestamp": timestamp}
            self.decoding.add(self.began, SimpleNamespace(key=key, value=value, **about))

    def is_folded(self, frame: Frame) -> bool:
        return frame.position.offset <= self.folded

    def turn(self) -> None:
        self.intake.hand_over(self.loaded.extend, self.is_folded)
        wait(self.decoding.running, 120)
        frames, bad = self.intake.take()
        self.frames += frames
        self.intake.dead_letter(bad, 120 if self.post.open.is_set() else 0)

    def next_offset(self) -> int | None:
        return self.offsets.next_offset(("frames", 0))


@pytest.fixture
def loop() -> Any:
    loop = Loop(Batch())
    yield loop
    loop.post.open.set()
    loop.dead_letters.close()
    loop.decoding.close()


def test_good_frames_come_in_order_and_bad_ones_are_dead_letters_in_order(loop: Loop) -> None:
    values = [picture(i) for i in range(60)]
    for bad in (3, 20, 41):
        values[bad] = b"junk"
    values[30] = b""
    values[10] = picture(10, size=(1_200, 1_200))
    loop.receive([(b"cam", value) for value in values])
    while loop.decoding:
        loop.turn()
    assert [f.position.offset for f in loop.frames] == [i for i in range(60) if i not in (3, 20, 30, 41)]
    assert all(f.received == loop.began for f in loop.frames)
    assert loop.post.sent == [(3, "not_an_image"), (20, "not_an_image"), (30, "empty"), (41, "not_an_image")]
    assert loop.next_offset() == 0
    loop.offsets.finished(frame.position for frame in loop.frames)
    assert loop.next_offset() == 60


def test_a_sender_of_nothing_but_junk_does_not_fill_the_log(
    loop: Loop, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dead letters themselves, and the metric, have all of them."""
    loop.receive([(b"cam", b"junk")] * 500 + [(b"other", b"")])
    while loop.decoding:
        loop.turn()
    assert caplog.text.count("is a dead letter: the bytes are none of") == LINES
    assert caplog.text.count("is a dead letter: the record has no value") == 1
    assert len(loop.post.sent) == 501
    assert loop.metrics.registry.get_sample_value("driftkeel_bad_frames_total", {"kind": "not_an_image"}) == 500
    loop.turn()
    assert "more frames" not in caplog.text
    monkeypatch.setattr("worker.log.LINES_S", 0.0)
    loop.turn()
    assert [r.getMessage() for r in caplog.records if "more" in r.getMessage()] == [
        f"{500 - LINES} more frames became dead letters of class not_an_image since then, without a line each"
    ]
    loop.receive([(b"cam", b"junk")], 501)
    while loop.decoding:
        loop.turn()
    assert caplog.text.count("is a dead letter: the bytes are none of") == LINES + 1


def test_good_frames_do_not_wait_for_dead_letters(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    loop.post.open.clear()
    for first in (0, 2):
        loop.receive([(b"cam", b"junk"), (b"cam", picture())], first)
        while loop.decoding:
            loop.turn()
    assert [f.position.offset for f in loop.frames] == [1, 3]
    loop.offsets.finished(frame.position for frame in loop.frames)
    assert (loop.next_offset(), loop.dead_letters.full) == (0, False)
    monkeypatch.setattr("worker.publish.dead_letters.MAX_BYTES", 2 * len(b"camjunk") - 1)
    assert loop.dead_letters.full
    loop.post.open.set()
    loop.intake.dead_letter([], 120)
    assert [offset for offset, _ in loop.post.sent] == [0, 2]
    assert (loop.next_offset(), loop.dead_letters.full) == (4, False)


@pytest.mark.parametrize(("records", "headers"), [(6, 0), (1, 100)])
def test_dead_letters_are_bounded_however_little_is_in_them(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, records: int, headers: int
) -> None:
    monkeypatch.setattr("worker.publish.dead_letters.MAX_BYTES", 5_000)
    loop.post.open.clear()
    loop.receive([(b"cam", b"")] * records, headers=[("", None)] * headers)
    loop.turn()
    assert loop.dead_letters.full


def test_letters_of_a_partition_that_went_finish_nothing(loop: Loop) -> None:
    loop.post.open.clear()
    loop.receive([(b"cam", b"junk")] * 2)
    loop.turn()
    loop.receive([(b"cam", b"junk")] * 2, first=2)
    loop.turn()
    loop.dead_letters.drop(("frames", 0))
    loop.offsets.forget([("frames", 0)])
    loop.receive([(b"cam", picture())] * 4)  # another topic of the same name
    while loop.decoding:
        loop.turn()
    loop.post.open.set()
    loop.intake.dead_letter([], 120)
    assert len(loop.post.sent) == 2  # the first were under way
    assert loop.next_offset() == 0
    loop.offsets.finished(frame.position for frame in loop.frames[:1])
    assert loop.next_offset() == 1


def test_what_is_under_way_at_the_end_is_not_left_open(loop: Loop) -> None:
    loop.post.open.clear()
    loop.receive([(b"cam", b"junk")])
    loop.turn()
    loop.dead_letters.close()
    assert not loop.post.closed.is_set()
    loop.post.open.set()
    assert loop.post.closed.wait(120)


def test_a_record_without_a_stream_loads_none(loop: Loop) -> None:
    loop.receive([(None, picture()), (b"\xff", picture())])
    loop.turn()
    assert loop.loaded == []
    assert sorted(kind for _, kind in loop.post.sent) == ["bad_key", "no_key"]
    assert loop.next_offset() == 2


def test_a_record_of_the_oldest_format_has_no_time(loop: Loop) -> None:
    loop.offsets.received(Position("frames", 0, 0))
    about = {"topic": "frames", "partition": 0, "offset": 0, "headers": [], "timestamp": None}
    loop.decoding.add(12.5, SimpleNamespace(key=b"cam", value=picture(), **about))
    loop.turn()
    assert [(frame.sent, frame.event_time.year) for frame in loop.frames] == [(0.0, 1970)]


def test_what_is_folded_already_is_neither_decoded_nor_kept_back(loop: Loop) -> None:
    loop.folded = 2
    loop.receive([(b"cam", b"junk")] * 3 + [(b"cam", picture())])
    loop.turn()
    loop.turn()
    assert [f.position.offset for f in loop.frames] == [3]
    assert loop.post.sent == []
    assert loop.next_offset() == 3
    assert loop.metrics.registry.get_sample_value("driftkeel_frames_again_total") == 3


def test_what_is_too_late_is_not_decoded_and_counted_where_that_is_asked_for() -> None:
    old, junk = int(time.time() - 100) * 1_000, (b"cam", b"junk")
    loop = Loop(Batch(latency_budget_ms=60_000, drop_late=True))
    loop.folded = 0
    loop.receive([junk, junk, (None, b"")], timestamp=old)
    loop.receive([(b"cam", picture())], first=3, timestamp=int(time.time() * 1_000))
    loop.turn()
    loop.turn()
    assert [f.position.offset for f in loop.frames] == [3]
    assert [offset for offset, _ in loop.post.sent] == [2]  # what has no key is no frame, however late
    assert loop.next_offset() == 3
    counted = [loop.metrics.registry.get_sample_value(f"driftkeel_frames_{n}_total") for n in ("dropped", "again")]
    assert counted == [1, 1]
    answers_all = Loop(Batch(latency_budget_ms=60_000))
    answers_all.receive([(b"cam", picture())], timestamp=old)
    answers_all.turn()
    answers_all.turn()
    assert len(answers_all.frames) == 1


def test_of_a_partition_that_goes_while_the_store_is_asked_nothing_is_left(loop: Loop) -> None:
    loop.receive([(b"cam", picture()), (b"cam", b""), (b"cam", b"junk")])
    loop.intake.hand_over(lambda streams: loop.decoding.drop(("frames", 0)), loop.is_folded)
    loop.turn()
    assert not loop.decoding.running
    assert (loop.frames, loop.post.sent) == ([], [])
    assert loop.next_offset() == 0


def test_offsets_that_are_read_again_are_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread still has the old records while the new ones come: each frame is taken up once."""
    free = threading.Event()
    sound = decode_frame

    def slow(frame: Frame, received: float, limits: Frames, preprocess: Preprocess) -> DecodedFrame | FrameError:
        assert free.wait(120)
        return sound(frame, received, limits, preprocess)

    monkeypatch.setattr("tests.worker.test_intake.decode_frame", slow)
    loop = Loop(Batch())
    loop.receive([(b"cam", picture(i)) for i in range(5)])
    loop.intake.hand_over(loop.loaded.extend, loop.is_folded)
    loop.decoding.drop(("frames", 0))
    loop.receive([(b"cam", picture(i)) for i in range(2, 9)], first=2)
    loop.intake.hand_over(loop.loaded.extend, loop.is_folded)
    assert loop.intake.take() == ([], [])
    free.set()
    while loop.decoding:
        loop.turn()
    assert [f.position.offset for f in loop.frames] == [2, 3, 4, 5, 6, 7, 8]
    loop.decoding.close()
