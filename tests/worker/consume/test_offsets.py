from hypothesis import given
from hypothesis import strategies as st

from schemas.frame import Position
from worker.consume.offsets import Offsets

P = ("frames", 0)


def at(offset: int, partition: int = 0) -> Position:
    return Position("frames", partition, offset)


def test_commit_stops_before_the_first_unfinished_record() -> None:
    offsets = Offsets()
    for offset in (5, 6, 9):  # compaction leaves gaps
        offsets.received(at(offset))
    assert offsets.committable() == {P: 5}
    offsets.finished([at(6), at(9)])
    assert offsets.committable() == {P: 5}
    offsets.finished([at(5)])
    assert offsets.committable() == {P: 10}
    offsets.committed({P: 10})
    assert offsets.committable() == {}


def test_forgotten_partitions_are_not_committed() -> None:
    offsets = Offsets()
    offsets.received(at(1))
    offsets.received(at(1, partition=1))
    offsets.forget([P])
    offsets.finished([at(1), at(1, partition=1)])
    assert offsets.committable() == {("frames", 1): 2}
    assert offsets.next_offset(P) is None
    assert offsets.reached([P, ("frames", 1)]) == {("frames", 1): 2}


def test_only_what_was_asked_for_is_committed() -> None:
    offsets = Offsets()
    offsets.received(at(1))
    offsets.received(at(2, partition=1))
    assert offsets.committable([P, ("frames", 7)]) == {P: 1}


def test_a_partition_that_is_read_again_is_committed_again() -> None:
    offsets = Offsets()
    offsets.received(at(9))
    offsets.committed({P: 10})
    offsets.forget([P])
    offsets.received(at(3))
    assert offsets.committable() == {P: 3}


@given(st.permutations(range(12)), st.integers(0, 12))
def test_never_past_anything_unfinished(order: list[int], done: int) -> None:
    offsets = Offsets()
    for offset in range(12):
        offsets.received(at(offset))
    for offset in order[:done]:
        offsets.finished([at(offset)])
    left = set(range(12)) - set(order[:done])
    first = min(left, default=12)
    assert (offsets.next_offset(P), offsets.unfinished()[P], offsets.reached([P])) == (first, 12 - first, {P: 12})
