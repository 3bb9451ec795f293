"""Headers of idle streams are packed; nobody notices but the memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.policy import PolicyChange
from schemas.state import DriftWatch, GuardState, Level, RunningProxies, StreamHeader
from tests.worker.engine.test_engine import admit, batch, step
from worker.engine import resident
from worker.engine.engine import Engine
from worker.engine.resident import LIFETIME_S, Headers, Resident, pack, unpack

numbers = st.floats(allow_nan=False, allow_infinity=False)
shares = st.floats(0, 1)
counts = st.integers(0, 1 << 40)
headers = st.builds(
    StreamHeader,
    stream=st.text(min_size=1),
    bundle=st.just("b"),
    method=st.just("mgg"),
    positions=st.dictionaries(st.text(), counts, max_size=3),
    frames=counts,
    step=counts,
    proxies=st.builds(
        RunningProxies,
        frames=counts,
        confidence=shares,
        signals=st.dictionaries(st.text(), numbers, max_size=30),
        accuracy=st.none() | shares,
    ),
    guard=st.builds(
        GuardState,
        gradient=st.builds(Level, seen=counts, centre=numbers),
        wealth=numbers,
        recent=st.lists(st.integers(0, (1 << 32) - 1), max_size=16),
        trusted=st.booleans(),
    ),
    drift=st.none() | st.builds(DriftWatch, mean=st.lists(numbers), variance=st.lists(numbers)),
    policy=st.none() | st.builds(PolicyChange, frozen=st.booleans()),
    approved=st.none() | counts,
)


@given(headers)
def test_a_packed_header_comes_back_equal(header: StreamHeader) -> None:
    packed = pack(header)
    assert isinstance(packed, bytes)
    assert unpack(packed) == header


@pytest.mark.parametrize("broken", [{"frames": -1}, {"drift": DriftWatch.model_construct(mean=[float("nan")])}])
def test_a_header_that_would_not_come_back_is_not_packed(broken: dict[str, object]) -> None:
    header = StreamHeader(stream="s", bundle="b", method="mgg").model_copy(update=broken)
    assert unpack(pack(header)) is header


def rest(engine: Engine) -> None:
    """Nobody uses any stream for a while."""
    for turn in range(100):
        engine.pack_idle_headers((turn + 1) * LIFETIME_S)


def is_packed(engine: Engine, stream: str) -> bool:
    return isinstance(engine.resident(stream).packed, bytes) and bool(engine.resident(stream).packed)


def test_an_idle_stream_is_packed_and_goes_on_as_it_was(tiny_bundle) -> None:
    idle, busy = Engine(tiny_bundle), Engine(tiny_bundle)
    for engine in (idle, busy):
        admit(engine, "a", "b")
        step(engine, [batch("a", 6, 1)])
        engine.resident("a").header = engine.resident("a").header.model_copy(update={"step": 1, "frames": 6})
    rest(idle)
    assert is_packed(idle, "a")
    assert idle.resident("a").header == busy.resident("a").header
    assert not is_packed(idle, "a")
    rest(idle)
    found, wanted = (engine.predict([batch("a", 6, 2)]).predictions[0] for engine in (idle, busy))
    assert (found.step, found.top_index, found.top_confidence) == (1, wanted.top_index, wanted.top_confidence)


def test_what_is_used_stays_as_it_is_and_what_is_not_does_not(tiny_bundle) -> None:
    engine = Engine(tiny_bundle)
    admit(engine, "used", *(f"idle-{i}" for i in range(100)))
    for turn in range(20):
        engine.pack_idle_headers((turn + 1) * LIFETIME_S)
        assert engine.resident("used").header.stream == "used"
    assert not is_packed(engine, "used")
    assert all(is_packed(engine, f"idle-{i}") for i in range(100))


def test_only_so_many_are_parsed_however_many_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "PARSED", 8)
    headers = Headers()
    streams = [
        Resident(i, StreamHeader(stream=f"s{i}", bundle="b", method="mgg"), 1, True, None, headers) for i in range(100)
    ]
    assert len(headers) <= 16
    # One that has been changed is never seen as it was.
    for one in streams:
        one.header = one.header.model_copy(update={"frames": one.slot})
    assert [one.header.frames for one in streams] == list(range(100))
    assert len(headers) <= 16


@pytest.mark.parametrize("idle", [True, False])
def test_a_pass_under_way_still_knows_a_stream_that_is_released(tiny_bundle, idle: bool) -> None:
    engine = Engine(tiny_bundle)
    admit(engine, "a")
    passed = engine.predict([batch("a", 6)])
    if idle:
        rest(engine)
    engine.release(["a"])
    assert passed.predictions[0].resident.header.stream == "a"
