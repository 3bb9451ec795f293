"""Whose frames are decoded next."""

from collections.abc import Iterator

from worker.decode.turns import RoundRobin


def turns_of(keys: str) -> RoundRobin[str]:
    """`aab`: of stream a come a0 and a1, then b2 of stream b."""
    turns: RoundRobin[str] = RoundRobin()
    add(turns, keys)
    return turns


def add(turns: RoundRobin[str], keys: str, start: int = 0) -> None:
    for number, key in enumerate(keys, start):
        turns.add(key.encode(), f"{key}{number}")


def rest(turns: RoundRobin[str]) -> Iterator[str]:
    while turns:
        yield turns.next()


def test_one_stream_keeps_its_order() -> None:
    assert list(rest(turns_of("aaa"))) == ["a0", "a1", "a2"]


def test_each_stream_has_its_turn_and_keeps_its_order() -> None:
    turns = turns_of("aaaaabac")
    assert [turns.next() for _ in range(4)] == ["a0", "b5", "c7", "a1"]
    add(turns, "b", 8)
    assert list(rest(turns)) == ["a2", "b8", "a3", "a4", "a6"]


def test_with_less_than_one_each_nobody_waits_for_ever() -> None:
    assert "".join(name[0] for name in rest(turns_of("aaaabbcd"))) == "abcdabaa"


def test_a_stream_that_comes_again_and_again_waits_for_the_others() -> None:
    turns = turns_of("aab")
    seen = []
    for number in range(3, 6):
        seen.append(turns.next())
        add(turns, "a", number)
    assert seen == ["a0", "b2", "a1"]


def test_dropped_ones_lose_their_turn() -> None:
    turns = turns_of("aabc")
    turns.drop(lambda name: name in ("a0", "b2"))
    assert list(rest(turns)) == ["a1", "c3"]
    assert not turns
