from datetime import UTC, datetime
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meta.bundle import Bundle
from meta.method import Method
from schemas.config import Batch
from schemas.frame import Position
from worker.batch.batcher import MicroBatcher, within_memory, within_method
from worker.decode.image import DecodedFrame

SETTINGS = Batch(max_batch=8, max_wait_ms=100, min_adapt=4, max_hold_ms=1_000, max_pass=32)


def frame(stream: str, offset: int, received: float = 0.0) -> DecodedFrame:
    pixels = np.zeros((2, 2), np.uint8)
    return DecodedFrame(stream, Position("frames", 0, offset), pixels, datetime.now(UTC), received)


def frames(stream: str, count: int, received: float = 0.0, start: int = 0) -> list[DecodedFrame]:
    return [frame(stream, start + i, received) for i in range(count)]


def offsets(batch) -> list[int]:
    return [f.position.offset for f in batch.frames]


def test_size_closes_at_once() -> None:
    batcher = MicroBatcher(SETTINGS)
    batcher.add(frames("a", 9))
    (batch,) = batcher.take(0.0, 32)
    assert offsets(batch) == list(range(8))
    assert batch.adapt
    assert batcher.take(0.05, 32) == []
    assert len(batcher) == 1


def test_time_closes_what_is_not_full() -> None:
    batcher = MicroBatcher(SETTINGS)
    batcher.add(frames("a", 4))
    assert batcher.next_due() == 0.1
    assert batcher.take(0.099, 32) == []
    (batch,) = batcher.take(0.1, 32)
    assert batch.adapt
    assert batcher.next_due() is None


def test_few_frames_are_predicted_now_and_adapted_on_later() -> None:
    batcher = MicroBatcher(SETTINGS)
    batcher.add(frames("a", 2))
    (early,) = batcher.take(0.1, 32)
    assert (early.adapt, early.fold) == (False, False)
    batcher.hold(early)
    assert batcher.take(0.2, 32) == []
    batcher.add(frames("a", 3, received=0.3, start=2))
    (late,) = batcher.take(0.4, 32)
    assert late.adapt
    assert offsets(late) == [0, 1, 2, 3, 4]
    assert [f.position.offset for f in late.unpublished] == [2, 3, 4]


def test_held_frames_take_room_in_the_micro_batch() -> None:
    batcher = MicroBatcher(SETTINGS)
    batcher.add(frames("a", 3))
    (early,) = batcher.take(0.1, 32)
    batcher.hold(early)
    batcher.add(frames("a", 8, received=0.2, start=3))
    (full,) = batcher.take(0.2, 32)
    assert offsets(full) == list(range(8))
    assert len(batcher) == 3


def test_frames_are_not_held_for_ever() -> None:
    batcher = MicroBatcher(SETTINGS)
    batcher.add(frames("a", 2))
    (early,) = batcher.take(0.1, 32)
    batcher.hold(early)
    assert batcher.next_due() == 1.0
    (late,) = batcher.take(1.0, 32)
    assert (late.adapt, late.fold, late.unpublished) == (False, True, [])
    assert "max_hold_ms" in late.reason
    assert len(batcher) == 0


def test_full_streams_go_before_waiting_ones_and_the_pass_has_a_limit() -> None:
    batcher = MicroBatcher(SETTINGS)
    batcher.add(frames("slow", 4))
    for stream in "abcde":
        batcher.add(frames(stream, 8, received=5.0))
    batches = batcher.take(10.0, 32)
    assert [b.stream for b in batches] == ["a", "b", "c", "d"]
    assert [b.stream for b in batcher.take(10.0, 32)] == ["e", "slow"]


def test_switched_off_adaptation_still_folds() -> None:
    batcher = MicroBatcher(SETTINGS, adapt=False)
    batcher.add(frames("a", 8))
    (batch,) = batcher.take(0.0, 32)
    assert (batch.adapt, batch.fold) == (False, True)
    assert "switched off" in batch.reason


def test_dropped_streams_are_gone() -> None:
    batcher = MicroBatcher(SETTINGS)
    batcher.add(frames("a", 3) + frames("b", 3))
    batcher.drop(["a", "unknown"])
    assert (batcher.streams, len(batcher)) == ({"b"}, 3)


def test_turns_of_streams_that_fell_silent_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.batch.batcher.MAX_TURNS", 4)
    batcher = MicroBatcher(SETTINGS)
    for stream in "abcdae":
        batcher.add(frames(stream, 8))
        batcher.take(1.0, 32)
        assert len(batcher._turns) <= 4
    for stream in "abcde":
        batcher.add(frames(stream, 8))
    assert [b.stream for b in batcher.take(1.0, 40)] == ["b", "c", "d", "a", "e"]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 0.3), st.booleans()), max_size=120),
    st.integers(8, 40),
)
def test_every_frame_comes_out_once_and_in_order(steps: list[tuple[str, float, bool]], limit: int) -> None:
    batcher = MicroBatcher(SETTINGS)
    now, sent = 0.0, dict.fromkeys("abc", 0)
    published: dict[str, list[int]] = {s: [] for s in "abc"}
    folded: dict[str, list[int]] = {s: [] for s in "abc"}

    def turn() -> None:
        for batch in batcher.take(now, limit):
            assert len(batch.frames) <= SETTINGS.max_batch
            published[batch.stream] += [f.position.offset for f in batch.unpublished]
            if batch.fold:
                folded[batch.stream] += offsets(batch)
            else:
                batcher.hold(batch)

    for stream, pause, act in steps:
        now += pause
        batcher.add([frame(stream, sent[stream], now)])
        sent[stream] += 1
        if act:
            turn()
    while len(batcher):
        now += 0.5
        turn()
    for stream, count in sent.items():
        assert published[stream] == list(range(count))
        assert folded[stream] == list(range(count))


def test_a_flood_does_not_keep_others_waiting() -> None:
    batcher = MicroBatcher(SETTINGS)
    for stream in "abcdefgh":
        batcher.add(frames(stream, 400))
    batcher.take(1.0, 32)
    batcher.add(frames("z", 2, received=0.0))
    # Four streams a pass: the one that has not had a turn goes with the first, before all that have had one.
    assert [b.stream for b in batcher.take(1.0, 32)] == ["e", "f", "g", "h"]
    assert "z" in [b.stream for b in batcher.take(1.0, 32)]
    turns = [b.stream for _ in range(6) for b in batcher.take(1.0, 32)]
    assert all(turns.count(stream) == 3 for stream in "abcdefgh")


def test_busy_streams_wait_and_passes_share_what_is_due() -> None:
    batcher = MicroBatcher(Batch(max_batch=16, max_pass=256))
    for stream in "abcdef":
        batcher.add(frames(stream, 16))
    first = batcher.take(1.0, 256, busy=set(), shares=3)
    assert [b.stream for b in first] == ["a", "b"]
    assert [b.stream for b in batcher.take(1.0, 256, busy={"a", "b", "c"}, shares=1)] == ["d", "e", "f"]
    assert len(batcher) == 16


def test_frames_held_by_many_streams_make_room_when_memory_is_full() -> None:
    batcher = MicroBatcher(Batch(max_batch=8, max_wait_ms=100, min_adapt=4, max_hold_ms=60_000, max_buffered=20))
    for i in range(10):
        batcher.add(frames(f"stream-{i}", 2))
    for early in batcher.take(0.1, 64):
        batcher.hold(early)
    assert len(batcher) == 20
    out = batcher.take(0.2, 6)
    assert out
    assert all(not b.adapt and b.fold and "max_buffered" in b.reason for b in out)
    assert len(batcher) < 20
    assert batcher.take(0.2, 64) == []


def test_large_frames_fill_the_memory_sooner() -> None:
    settings = Batch(max_buffered=4_096, max_buffered_bytes=64 << 20, max_pass=64)
    assert within_memory(settings, 28 * 28, 2).max_buffered == 4_096
    assert within_memory(settings, 224 * 224 * 3, 2).max_buffered == 445
    assert within_memory(settings, 1024 * 1024 * 3, 2).max_buffered == 256  # two passes for each of two lanes


def test_micro_batches_are_no_larger_than_what_a_method_learns_from(tiny_bundle: Bundle) -> None:
    large, ours, paper = Batch(max_batch=64, max_pass=128), tiny_bundle.method, cast(Method, object())
    assert within_method(large, True, ours).max_batch == 16
    assert within_method(large, True, paper).max_batch == 64
    assert within_method(large, False, ours).max_batch == 64  # nothing is learned
    assert within_method(Batch(max_batch=64, min_adapt=32), True, ours).max_batch == 32  # else none would be full
    assert within_method(Batch(max_batch=8), True, ours).max_batch == 8


def test_late_frames_are_given_up_but_for_those_that_have_their_prediction() -> None:
    batcher = MicroBatcher(SETTINGS)
    batcher.add(frames("a", 2))
    (held,) = batcher.take(1.0, 32)
    batcher.hold(held)
    batcher.add(frames("a", 3, start=2) + frames("b", 2))
    late = batcher.expire(lambda frame: frame.position.offset < 4)
    assert sorted((f.stream, f.position.offset) for f in late) == [("a", 2), ("a", 3), ("b", 0), ("b", 1)]
    assert (batcher.streams, len(batcher)) == ({"a"}, 3)
    (left,) = batcher.take(2.0, 32)
    assert offsets(left) == [0, 1, 4]
    assert batcher.expire(lambda frame: True) == []


def test_slow_cameras_ride_along_and_fast_ones_wait_for_more() -> None:
    batcher = MicroBatcher(SETTINGS)
    batcher.add(frames("due", 1))
    batcher.add(frames("slow", 1, received=0.04))
    batcher.add([frame("fast", i, 0.03 + 0.03 * i) for i in range(3)])
    batcher.add(frames("new", 1, received=0.09))
    batcher.add(frames("busy", 1, received=0.02))
    batcher.add([frame("fitful", 0, 0.03), frame("fitful", 1, 0.085)])
    assert batcher.take(0.09, 32) == []  # nobody is due, so nobody rides
    assert [b.stream for b in batcher.take(0.1, 32, busy={"busy"})] == ["due", "fitful", "slow"]
    (late,) = batcher.take(0.13, 32, busy={"busy", "new"})
    assert (late.stream, len(late.frames)) == ("fast", 3)


def test_fast_cameras_ride_along_with_enough_frames_for_an_update() -> None:
    """So they are due together from then on."""
    batcher = MicroBatcher(Batch(max_batch=16, max_wait_ms=100, min_adapt=1))
    batcher.add(frames("due", 1))
    batcher.add([frame("few", i, 0.05 + 0.01 * i) for i in range(3)] + [frame("enough", i, 0.06) for i in range(4)])
    assert [b.stream for b in batcher.take(0.1, 32)] == ["due", "enough"]
    assert [b.stream for b in batcher.take(0.16, 32)] == ["few"]


def test_beside_a_stream_that_is_always_full_the_others_fill_too() -> None:
    batcher = MicroBatcher(Batch(max_batch=16, max_wait_ms=100, min_adapt=1))
    batcher.add(frames("backlog", 40) + frames("camera", 6, received=0.01))
    assert [b.stream for b in batcher.take(0.03, 32)] == ["backlog"]
    batcher.add(frames("camera", 6, received=0.08, start=6))
    assert [(b.stream, len(b.frames)) for b in batcher.take(0.11, 32)] == [("camera", 12), ("backlog", 16)]


def test_riders_take_turns_too() -> None:
    batcher = MicroBatcher(SETTINGS)
    batcher.add(frames("b", 8))
    batcher.take(0.0, 32)
    batcher.add(frames("due", 8) + frames("b", 5, received=0.05) + frames("a", 5, received=0.06))
    batcher.add(frames("late", 1))
    assert [b.stream for b in batcher.take(0.1, 15)] == ["due", "late", "a"]


def test_a_rider_goes_whole_or_not_at_all() -> None:
    """A part of it would be too few for an update, and would be predicted twice."""
    batcher = MicroBatcher(Batch(max_batch=16, max_wait_ms=100, min_adapt=4))
    batcher.add(frames("a", 15) + frames("b", 15) + frames("fast", 6, received=0.05))
    assert [b.stream for b in batcher.take(0.1, 32)] == ["a", "b"]
    (whole,) = batcher.take(0.16, 32)
    assert (whole.stream, len(whole.frames), whole.adapt) == ("fast", 6, True)


def test_held_frames_count_for_who_has_enough() -> None:
    batcher = MicroBatcher(Batch(max_batch=16, max_wait_ms=100, min_adapt=4))
    batcher.add(frames("held", 3))
    (few,) = batcher.take(0.1, 32)
    batcher.hold(few)
    batcher.add(frames("due", 5, received=0.15) + [frame("held", 3 + i, 0.24 + 0.001 * i) for i in range(3)])
    assert [(b.stream, len(b.frames)) for b in batcher.take(0.25, 32)] == [("due", 5), ("held", 6)]


def test_riders_take_no_room_from_those_that_are_due() -> None:
    batcher = MicroBatcher(SETTINGS)
    batcher.add(frames("slow", 1, received=0.01))
    for stream in "abcd":
        batcher.add(frames(stream, 8))
    assert [b.stream for b in batcher.take(0.1, 32)] == list("abcd")


def test_a_small_pass_is_not_begun_before_its_time() -> None:
    batcher = MicroBatcher(Batch(max_batch=16, max_pass=64))
    batcher.add(frames("a", 16) + frames("b", 16) + frames("c", 16))
    assert batcher.take(1.0, 64, least=64) == []
    batcher.add(frames("d", 16))
    assert [b.stream for b in batcher.take(1.0, 64, least=64)] == ["a", "b", "c", "d"]


def test_streams_that_rest_go_in_larger_micro_batches() -> None:
    batcher = MicroBatcher(Batch(max_batch=16, max_pass=64))
    for stream in ("adapts", "rests"):
        batcher.add(frames(stream, 100))
    first = batcher.take(1.0, 64, predicts_only=lambda stream, oldest: stream == "rests")
    assert [(b.stream, len(b.frames)) for b in first] == [("adapts", 16), ("rests", 48)]
    second = batcher.take(1.0, 64, busy={"adapts"}, predicts_only=lambda stream, oldest: stream == "rests")
    assert [(b.stream, len(b.frames)) for b in second] == [("rests", 52)]
    assert len(batcher) == 84


def test_a_stream_that_rests_leaves_room_for_others_in_a_large_pass() -> None:
    """And drift detection a look at it before it has gone far."""
    batcher = MicroBatcher(Batch(max_batch=16, max_pass=256))
    for stream in ("a", "b"):
        batcher.add(frames(stream, 100))
    assert [len(b.frames) for b in batcher.take(1.0, 256, predicts_only=lambda stream, oldest: True)] == [64, 64]


def test_whether_a_stream_rests_is_asked_with_its_oldest_frame_to_predict() -> None:
    batcher = MicroBatcher(Batch(max_batch=16, max_pass=64, min_adapt=4, max_wait_ms=10))
    sent = frames("a", 40)
    batcher.add(sent[:3])
    (few,) = batcher.take(100.0, 64)
    batcher.hold(few)
    batcher.add(sent[3:])
    asked = []
    batcher.take(100.0, 64, predicts_only=lambda stream, oldest: asked.append(oldest) or True)
    assert asked == [sent[3]]


def test_without_adaptation_all_streams_rest() -> None:
    batcher = MicroBatcher(Batch(max_batch=16, max_pass=64), adapt=False)
    batcher.add(frames("a", 100))
    assert [len(b.frames) for b in batcher.take(1.0, 64)] == [64]


def test_of_many_streams_no_more_are_asked_about_than_all_passes_can_take() -> None:
    batcher = MicroBatcher(Batch(max_batch=16, max_pass=64))
    for number in range(100):
        batcher.add(frames(f"cam-{number}", 20))
    asked: list[str] = []
    taken = batcher.take(1.0, 64, shares=2, predicts_only=lambda stream, oldest: bool(asked.append(stream)))
    assert [len(b.frames) for b in taken] == [16] * 4
    assert len(asked) == 8
