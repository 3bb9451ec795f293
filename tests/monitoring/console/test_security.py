"""Wrong tokens: how many anybody may try, and whom that shuts out."""

from __future__ import annotations

import pytest

from monitoring.console import security
from monitoring.console.security import MOST_GUESSERS, PER_S, WRONG_TOKENS, Session

TOKEN = "a token of some length"


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(security, "time", clock)
    return clock


@pytest.fixture
def session(clock: Clock) -> Session:
    return Session(TOKEN)


def guess(session: Session, address: str, most: int = 10_000) -> int:
    """How many wrong tokens are taken from there."""
    for count in range(most):
        if session.blocked(address):
            return count
        assert session.login(f"guess number {count}", address) is None
    return most


def test_a_guesser_shuts_out_nobody_else(session: Session, clock: Clock) -> None:
    assert guess(session, "10.0.0.1") == WRONG_TOKENS
    assert session.blocked("10.0.0.1")
    assert not session.blocked("10.0.0.2")
    assert session.login(TOKEN, "10.0.0.2") is not None
    clock.now += PER_S
    assert not session.blocked("10.0.0.1")
    assert guess(session, "10.0.0.1") == WRONG_TOKENS


def test_guesses_come_back_one_by_one(session: Session, clock: Clock) -> None:
    assert guess(session, "10.0.0.1", 1) == 1
    clock.now += PER_S / 2
    assert guess(session, "10.0.0.1") == WRONG_TOKENS - 1
    clock.now += PER_S / 2
    assert guess(session, "10.0.0.1") == 1


@pytest.mark.parametrize(
    ("first", "second", "one"),
    [
        ("2001:db8::1", "2001:db8::ffff:2", True),  # one machine may have both
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("10.0.0.1", "::ffff:10.0.0.1", True),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("", "10.0.0.1", False),
    ],
)
def test_who_counts_as_one(session: Session, first: str, second: str, one: bool) -> None:
    guess(session, first)
    assert session.blocked(second) == one


def test_all_guessers_together_have_so_many_guesses_and_take_little_memory(session: Session, clock: Clock) -> None:
    taken = sum(guess(session, f"10.0.{i // 256}.{i % 256}") for i in range(2_000))
    assert taken == MOST_GUESSERS * WRONG_TOKENS
    assert len(session._guesses._at) == MOST_GUESSERS
    assert session.blocked("192.0.2.1")
    clock.now += PER_S
    assert not session.blocked("192.0.2.1")
    assert session._guesses._at == {}
