"""Whose frames are decoded next."""

from types import SimpleNamespace

from worker.turns import Arrived, Turns


def arrived(keys: str) -> list[Arrived]:
    return [(float(i), SimpleNamespace(key=key.encode(), offset=i)) for i, key in enumerate(keys)]


def offsets(part: list[Arrived]) -> list[int]:
    return [record.offset for _, record in part]


def test_few_are_taken_as_they_are() -> None:
    waiting = arrived("aab")
    assert Turns().take(waiting, 3) == (waiting, [])


def test_each_stream_has_its_turn_and_keeps_its_order() -> None:
    turns = Turns()
    now, later = turns.take(arrived("aaaaabac"), 4)
    assert offsets(now) == [0, 1, 5, 7]
    assert offsets(later) == [2, 3, 4, 6]
    now, later = turns.take(later + arrived("b"), 3)
    assert [record.key for _, record in now] == [b"a", b"a", b"b"]
    assert offsets(later) == [4, 6]


def test_with_less_than_one_each_nobody_waits_for_ever() -> None:
    turns, later, keys = Turns(), arrived("aaaabbcd"), ""
    while later:
        now, later = turns.take(later, 1)
        keys += now[0][1].key.decode()
    assert keys == "abcdabaa"
