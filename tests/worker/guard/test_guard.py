import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.bundle import Limits
from schemas.config import Guard as GuardSettings
from schemas.state import GuardState, Level, RunningProxies
from worker.guard.guard import (
    ENOUGH,
    FORGIVEN,
    PATIENCE,
    TOLERATED,
    WATCH,
    Guard,
    Ruling,
    Sight,
    level_limit,
    move_level,
    watched,
)

LIMITS = Limits(raw_gradient_norm=10, source_distance=3, generated_gradient_norm=0.8, cosine=-0.2, gain_error=0.05)
GUARD = Guard(GuardSettings(max_gradient_factor=4, max_distance_factor=2), LIMITS)
GOOD = {
    "raw_gradient_norm": 5.0,
    "generated_gradient_norm": 0.5,
    "source_distance": 1.0,
    "present_distance": 0.9,
    "loss": 0.3,
    "cosine": 0.1,
}


def sight(first: int = 0, **changes: object) -> Sight:
    """Sixteen frames that never came before, of several classes."""
    content = {"checksums": list(range(first, first + 16)), "blank": 0.0, "dominant": 1, "share": 0.3, "rank": None}
    return Sight(**{**content, **changes})


def shown(**changes: object) -> RunningProxies:
    return RunningProxies(frames=500, shadowed=ENOUGH, **changes)


def judged(
    state: GuardState, seen: Sight, proxies: RunningProxies, changes: dict | None = None, finite: bool = True
) -> tuple[Ruling, GuardState]:
    after = GUARD.observe(state, seen, proxies)
    return GUARD.judge(state, after, seen, proxies, {**GOOD, **(changes or {})}, finite), after


def test_ordinary_updates_pass() -> None:
    ruling, _ = judged(GuardState(), sight(), shown())
    assert (ruling.decision, ruling.share) == ("applied", 1)


@pytest.mark.parametrize(
    ("changes", "finite", "reason"),
    [
        ({}, False, "not finite"),
        ({"loss": math.nan}, True, "not finite"),
        ({"loss": math.inf}, True, "not finite"),
        ({"raw_gradient_norm": 40.1}, True, "gradient norm 40.1 above its limit 40"),
        ({"source_distance": 6.1}, True, "distance from source 6.1 above its limit 6"),
        ({"source_distance": 6.1, "present_distance": 5.9}, True, "distance from source 6.1 above its limit 6"),
        ({"source_distance": 6.1, "present_distance": 6.0}, True, "distance from source 6.1 above its limit 6"),
        (
            {"source_distance": 9.1, "present_distance": 9.0},
            True,
            "distance from source 9.1 above its limit 6 and the present 9",
        ),
    ],
)
def test_others_are_skipped_with_the_reason(changes: dict, finite: bool, reason: str) -> None:
    ruling, _ = judged(GuardState(), sight(), shown(), changes, finite)
    assert (ruling.decision, ruling.reason) == ("skipped", reason)


def test_an_update_at_its_limits_passes() -> None:
    ruling, _ = judged(GuardState(), sight(blank=0.5), shown(), {"raw_gradient_norm": 40.0, "source_distance": 6.0})
    assert ruling.decision == "applied"


def test_what_was_known_before_is_left_as_it_was() -> None:
    """The state in memory is that of the store, also where a ruling is never written."""
    state = GuardState()
    for round_ in range(20):
        before = state.model_copy(deep=True)
        _, after = judged(state, sight(100 * round_), shown(), {"raw_gradient_norm": 1.0 + round_})
        assert state == before
        state = after


@pytest.mark.parametrize("distance", [8.9, 9.0])
def test_a_stream_beyond_the_distance_limit_may_come_back(distance: float) -> None:
    ruling, _ = judged(GuardState(), sight(), shown(), {"source_distance": distance, "present_distance": 9.0})
    assert ruling.decision == "applied"


def test_an_update_far_above_the_streams_own_level_is_shrunk_to_its_limit() -> None:
    state = GuardState()
    for round_ in range(40):
        ruling, state = judged(state, sight(100 * round_), shown(), {"generated_gradient_norm": 0.01})
        assert ruling.decision == "applied"
    limit = level_limit(state.update, GuardSettings().max_jump)
    ruling, _ = judged(state, sight(9_000), shown(), {"generated_gradient_norm": 2 * limit})
    assert ruling.decision == "partial"
    assert ruling.share == pytest.approx(0.5)
    ruling, _ = judged(state, sight(9_000), shown(), {"generated_gradient_norm": 4.0})
    assert (ruling.decision, ruling.share) == ("partial", 0.1)  # within the bundle's limit, too


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=16))
def test_a_level_is_the_mean_of_the_logarithms_while_it_is_new(logarithms: list[float]) -> None:
    level = Level()
    for one in logarithms:
        assert level_limit(level, 8) == math.inf
        move_level(level, math.exp(one), 8)
    assert level.centre == pytest.approx(sum(logarithms) / len(logarithms), abs=1e-9)
    assert 0 <= level.spread <= max(logarithms) - min(logarithms) + 1e-9


def test_a_level_knows_how_far_values_lie_from_it() -> None:
    level = Level()
    for one in (1, 3, 2):
        move_level(level, math.exp(one), 8)
    assert (level.centre, level.spread) == pytest.approx((2, 2 / 3))
    before = level.model_copy()
    move_level(level, 0.0, 8)  # of a method without gradients
    assert level == before
    assert level_limit(level.model_copy(update={"seen": 16}), 3) == pytest.approx(math.exp(4))


def test_outliers_cannot_drag_a_level() -> None:
    level = Level()
    for _ in range(64):
        move_level(level, 1.0, 8)
    before = level_limit(level, 8)
    move_level(level, 1e30, 8)
    assert level_limit(level, 8) < 3 * before


def test_a_new_stream_has_no_level_but_the_bundles() -> None:
    ruling, _ = judged(GuardState(), sight(), shown(), {"generated_gradient_norm": 3.2})
    assert ruling.decision == "partial"
    assert ruling.share == pytest.approx(0.5)
    assert ruling.reason == "generated gradient norm 3.2 above its limit 1.6: shrunk"


def test_a_bundle_without_limits_of_gradients_leaves_them_to_the_streams_level() -> None:
    guard, state = Guard(GuardSettings(), Limits(raw_gradient_norm=10, source_distance=3)), GuardState()
    for round_ in range(70):
        seen, signals = sight(100 * round_), {**GOOD, "cosine": -1.0, "generated_gradient_norm": 1e6}
        after = guard.observe(state, seen, shown())
        assert guard.judge(state, after, seen, shown(), signals, True) == Ruling("applied", "within limits")
        state = after


def test_of_two_limits_of_its_own_the_nearer_one_counts() -> None:
    state = GuardState()
    for round_ in range(40):
        few = {"raw_gradient_norm": 0.5, "generated_gradient_norm": 0.01}
        state = judged(state, sight(100 * round_), shown(), few)[1]
    raw, generated = (level_limit(level, GuardSettings().max_jump) for level in (state.gradient, state.update))
    for far, near, name in ((4, 2, "raw"), (2, 4, "generated")):
        jump = {"raw_gradient_norm": far * raw, "generated_gradient_norm": near * generated}
        ruling, _ = judged(state.model_copy(deep=True), sight(9_000), shown(), jump)
        assert ruling.share == pytest.approx(0.25)
        assert ruling.reason.startswith(f"{name} gradient norm")
        assert ruling.reason.endswith("shrunk")


def test_gradients_that_turn_away_for_long_are_skipped() -> None:
    state, decisions = GuardState(), []
    for round_ in range(80):
        ruling, state = judged(state, sight(100 * round_), shown(), {"cosine": -0.5})
        decisions.append(ruling.decision)
    assert decisions[:63] == ["applied"] * 63
    assert decisions[-1] == "skipped"
    assert "turn from the raw ones" in ruling.reason


def test_gradients_that_are_not_aligned_are_no_reason_to_stop() -> None:
    """A generator makes something else of them; and one odd number, of a method of somebody's own, is one."""
    state = GuardState()
    for round_ in range(80):
        cosine = -9.0 if round_ == 40 else -0.15
        ruling, state = judged(state, sight(100 * round_), shown(), {"cosine": cosine})
        assert ruling.decision == "applied"
    assert state.cosine == pytest.approx(-0.15, abs=0.02)


def test_a_frozen_camera_does_not_teach_even_in_a_loop() -> None:
    loop = sight(0, checksums=[1, 2, 3, 4] * 4)
    ruling, state = judged(GuardState(), loop, shown())
    assert ruling.reason == "75% of the frames repeat earlier ones: frozen camera?"
    ruling, _ = judged(state, sight(0, checksums=[4, 3, 2, 1]), shown())
    assert ruling.decision == "skipped"
    assert judged(state, sight(50), shown())[0].apply


def test_a_camera_that_repeats_half_of_its_frames_teaches() -> None:
    assert judged(GuardState(), sight(0, checksums=[1, 2, 3, 4] * 2), shown())[0].apply


def test_a_covered_camera_does_not_teach() -> None:
    ruling, _ = judged(GuardState(), sight(blank=0.75), shown())
    assert ruling.reason == "75% of the frames are blank: covered camera?"


def test_a_blind_camera_is_seen_without_an_update() -> None:
    assert "blank" in GUARD.blinded(GuardState(), sight(blank=0.75))
    assert "repeat" in GUARD.blinded(GuardState(recent=[3, 4]), sight(0, checksums=[3, 4, 3, 5]))
    assert GUARD.blinded(GuardState(), sight(blank=0.25)) == ""


def test_one_class_for_long_stops_teaching_and_others_begin_again() -> None:
    state, applied = GuardState(), 0
    for round_ in range(100):
        ruling, state = judged(state, sight(100 * round_, share=0.75), shown())
        applied += 16 * ruling.apply
    assert 200 < applied < 300
    assert "one class for" in ruling.reason
    assert judged(state, sight(99_999), shown())[0].apply


@pytest.mark.parametrize("signal", ["entropy", "marginal"])
def test_a_collapse_that_source_does_not_share_goes_back(signal: str) -> None:
    collapsed = {"entropy": 0.3, "marginal": 0.9, "moved": 0.7, signal: 0.01}
    learned = GuardState(gradient=Level(seen=9), update=Level(seen=9), cosines=9, sound=9)
    ruling, state = judged(learned, sight(), shown(signals=collapsed))
    assert ruling.decision == "rolled_back"
    # What it knew was of parameters that are gone; and source looks on.
    assert (state.gradient, state.update, state.cosines, state.sound) == (Level(), Level(), 0, 0)
    assert (state.rest, state.watchful) == (64, WATCH)
    ruling, state = judged(state, sight(100), shown(signals={"moved": 0.0}))
    assert "resting after a reset" in ruling.reason
    while state.rest:
        _, state = judged(state, sight(200), shown(signals={"moved": 0.0}))
    ruling, state = judged(state, sight(300), shown(signals=collapsed))
    assert ruling.decision == "reset"
    assert state.rest == 128


def test_a_reset_is_forgiven_once_the_stream_was_sound_for_long() -> None:
    collapsed = shown(signals={"entropy": 0.01, "marginal": 0.9, "moved": 0.5})
    for sound, decision in ((FORGIVEN - 16, "reset"), (FORGIVEN - 15, "rolled_back")):
        ruling, after = judged(GuardState(resets=3, sound=sound), sight(), collapsed)
        assert ruling.decision == decision
    assert after.resets == 1


def test_many_resets_rest_no_longer_than_the_longest_rest() -> None:
    collapsed = shown(signals={"entropy": 0.01, "moved": 0.5})
    rests = [judged(GuardState(resets=resets), sight(), collapsed)[1].rest for resets in (0, 1, 5, 6, 10**9)]
    assert rests == [64, 128, 2_048, 4_096, 4_096]


@pytest.mark.parametrize(("entropy", "marginal"), [(0.3, 0.9), (0.02, 0.25)])
def test_disagreement_alone_is_no_collapse(entropy: float, marginal: float) -> None:
    """A stream that adapts well disagrees with source; at the limits it has not collapsed yet."""
    signals = {"entropy": entropy, "marginal": marginal, "moved": 1.0}
    assert judged(GuardState(), sight(), shown(signals=signals))[0].apply


def test_one_sided_traffic_that_source_sees_too_is_no_collapse() -> None:
    ruling, _ = judged(GuardState(), sight(), shown(signals={"entropy": 0.01, "marginal": 0.01, "moved": 0.1}))
    assert ruling.apply


def test_source_answers_where_it_does_better_and_until_it_does_not() -> None:
    worse = {"accuracy": 0.7, "source_accuracy": 0.8}
    state = GUARD.observe(GuardState(), sight(), shown(accuracy=0.76, source_accuracy=0.8))
    assert state.trusted
    assert watched(state, shown())
    state = GUARD.observe(state, sight(), shown(**worse))
    assert not state.trusted
    state = GUARD.observe(state, sight(), shown(accuracy=0.79, source_accuracy=0.8))
    assert not state.trusted
    assert GUARD.observe(state, sight(), shown(accuracy=0.8, source_accuracy=0.8)).trusted
    decisions = []
    for round_ in range(PATIENCE // 16):
        ruling, state = judged(state, sight(100 * (round_ + 1)), shown(**worse))
        decisions.append(ruling.decision)
    assert decisions[0] == "applied"
    assert "rolled_back" in decisions
    assert not state.trusted


@pytest.mark.parametrize(
    ("accuracy", "shadowed", "frames"), [(0.776, ENOUGH, 0), (0.774, ENOUGH, 16), (0.774, ENOUGH - 1, 0)]
)
def test_source_looks_closer_where_it_nearly_leads(accuracy: float, shadowed: int, frames: int) -> None:
    proxies = RunningProxies(frames=500, shadowed=shadowed, accuracy=accuracy, source_accuracy=0.8)
    state = GUARD.observe(GuardState(), sight(), proxies)
    assert (state.trusted, state.watchful) == (True, frames)


def test_source_stops_answering_in_full_once_nothing_asks_for_it() -> None:
    state = GUARD.observe(GuardState(watchful=17), sight(), shown())
    assert (state.watchful, watched(state, shown())) == (1, True)
    state = GUARD.observe(state, sight(), shown())
    assert (state.watchful, watched(state, shown())) == (0, False)
    assert watched(GuardState(trusted=False), shown())


@pytest.mark.parametrize(
    ("never_worse", "margin", "accuracy", "source"),
    [(False, 0.05, 0.1, 0.9), (True, None, 0.1, 0.9), (True, 0.05, None, 0.9), (True, 0.05, 0.1, None)],
)
def test_where_nothing_is_to_be_compared_the_adapted_parameters_answer(
    never_worse: bool, margin: float | None, accuracy: float | None, source: float | None
) -> None:
    guard = Guard(GuardSettings(never_worse=never_worse), LIMITS.model_copy(update={"gain_error": margin}))
    for before in (GuardState(), GuardState(trusted=False, doubted=PATIENCE)):
        state = guard.observe(before, sight(), shown(accuracy=accuracy, source_accuracy=source))
        assert (state.trusted, state.doubted) == (True, 0)


# Of a method whose accuracy nobody estimates; source is right on nine of ten clean frames.
ALONE = Guard(GuardSettings(), Limits(raw_gradient_norm=math.inf, source_distance=3), clean_accuracy=0.9)


def judged_alone(state: GuardState, seen: Sight, proxies: RunningProxies) -> tuple[Ruling, GuardState]:
    after = ALONE.observe(state, seen, proxies)
    return ALONE.judge(state, after, seen, proxies, GOOD, True), after


def test_answers_that_leave_a_sure_source_lose_trust_and_go_back_without_any_estimate() -> None:
    astray, state, decisions = {"moved": 0.31, "source_rank": 0.05}, GuardState(), []
    for round_ in range(2 + PATIENCE // 16):
        ruling, state = judged_alone(state, sight(100 * round_), shown(signals=astray))
        assert not state.trusted
        decisions.append(ruling.decision)
    assert decisions[0] == "applied"
    assert "rolled_back" in decisions
    # Source that grows unsure meanwhile is no reason to believe what has gone astray before.
    state = ALONE.observe(state, sight(), shown(signals={"moved": 0.31, "source_rank": 0.4}))
    assert not state.trusted
    assert ALONE.observe(state, sight(), shown(signals={"moved": 0.19, "source_rank": 0.4})).trusted


@pytest.mark.parametrize(
    "signals",
    [
        {},
        {"moved": 0.29, "source_rank": 0.0},  # within what nobody can tell
        {"moved": 0.9, "source_rank": 0.2},  # a shift, which source does not know: they may well be right
    ],
)
def test_answers_may_differ_from_source_for_a_reason(signals: dict[str, float]) -> None:
    ruling, state = judged_alone(GuardState(), sight(), shown(signals=signals))
    assert ruling.decision == "applied"
    assert state.trusted
    alarmed = GuardState(shifted=True)
    assert ALONE.observe(alarmed, sight(), shown(signals={"moved": 0.9, "source_rank": 0.0})).trusted
    few = RunningProxies(frames=500, shadowed=ENOUGH - 1, signals={"moved": 0.9})
    assert ALONE.observe(GuardState(), sight(), few).trusted


def test_whoever_trusts_anything_is_not_kept_from_it() -> None:
    guard = Guard(GuardSettings(never_worse=False), LIMITS, clean_accuracy=0.9)
    assert guard.observe(GuardState(), sight(), shown(signals={"moved": 0.9})).trusted


def test_one_class_against_source_is_a_collapse_where_no_estimate_would_tell() -> None:
    full = sight(share=1.0)
    state = GuardState(dominant=1, alike=GuardSettings().max_alike)
    ruling, _ = judged_alone(state, full, shown(signals={"moved": 0.3, "source_rank": 0.3}))
    assert ruling.decision == "rolled_back"
    assert ruling.reason == "collapse: one class for more than 256 frames while source disagrees"
    for guard, moved in ((ALONE, 0.2), (GUARD, 0.3)):  # source sees it, too; and one whose accuracy is estimated
        proxies = shown(signals={"moved": moved, "source_rank": 0.3})
        after = guard.observe(state, full, proxies)
        ruling = guard.judge(state, after, full, proxies, GOOD, True)
        assert (ruling.decision, ruling.reason) == ("skipped", "one class for more than 256 frames")


def test_blank_frames_are_no_collapse_of_the_parameters() -> None:
    state = GuardState(dominant=1, alike=GuardSettings().max_alike)
    ruling, _ = judged_alone(state, sight(share=1.0, blank=1.0), shown(signals={"moved": 0.9, "source_rank": 0.3}))
    assert (ruling.decision, "covered camera" in ruling.reason) == ("skipped", True)


def test_trust_is_not_lost_on_few_frames() -> None:
    few = RunningProxies(frames=500, shadowed=ENOUGH - 1, accuracy=0.1, source_accuracy=0.9)
    assert GUARD.observe(GuardState(), sight(), few).trusted


def test_the_bet_is_won_where_source_is_unsure_and_not_where_ranks_are_usual() -> None:
    unsure = shown(signals={"source_rank": 0.4})
    state, rounds = GuardState(), 0
    while not state.shifted:
        state, rounds = GUARD.observe(state, sight(rank=0.4), unsure), rounds + 1
        assert rounds < 60
    assert (state.alarms, state.wealth, state.watchful) == (1, 0, WATCH)
    assert watched(state, unsure)
    for _ in range(3):  # Nothing more is bet until it is back.
        state = GUARD.observe(state, sight(rank=0.4), unsure)
        assert (state.shifted, state.alarms, state.wealth) == (True, 1, 0)
    assert not GUARD.observe(state, sight(rank=0.4), shown()).shifted
    state = GUARD.observe(state, sight(rank=0.0), shown(signals={"source_rank": 0.0}))
    assert not state.shifted
    for round_ in range(2_000):
        state = GUARD.observe(state, sight(rank=(-0.45, 0.45)[round_ % 2]), shown())
    assert state.alarms == 1


def test_the_bet_as_worked_by_hand() -> None:
    """The first one stakes nothing; later ones what was learned; losses are forgotten."""
    undecided = GUARD.observe(GuardState(), sight(rank=TOLERATED), shown())
    assert (undecided.wealth, undecided.stake) == (0, 0)
    state, found = GuardState(), []
    for rank in (0.4, 0.4, -0.1, -0.5):
        state = GUARD.observe(state, sight(rank=rank), shown())
        found.append((state.wealth, state.stake))
    wealth = [0, math.log(1.3), math.log(1.3 * 0.76), math.log(1 - 0.6 * 0.629138)]
    stake = [1, 1.2, 0.629138, 0]
    assert [one for one, _ in found] == pytest.approx(wealth, abs=1e-5)
    assert [one for _, one in found] == pytest.approx(stake, abs=1e-5)
