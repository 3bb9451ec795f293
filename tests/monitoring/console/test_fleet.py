"""What the console says of streams: health, order, bounded memory, changes only."""

from __future__ import annotations

import math
import time
import tracemalloc
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from monitoring.console.fleet import EVENTS, Fleet
from monitoring.console.health import REFUSED, SILENT_S, Evidence, judge
from monitoring.console.series import CAPACITY, Series
from schemas.update import Proxies
from tests.monitoring.console.records import event, prediction

NOW = 1_000_000.0


def evidence(**changes: Any) -> Evidence:
    return Evidence(
        **{
            "accuracy": 0.9,
            "source": None,
            "clean": 0.91,
            "parameters": "adapted",
            "events": [],
            "last": NOW,
            **changes,
        }
    )


def test_a_deleted_stream_is_shown_no_more() -> None:
    fleet = Fleet(10)
    fleet.take_update(event("s", 1))
    index = fleet.named("s").index
    fleet.take_update(event("s", 2, decision="deleted"))
    assert fleet.named("s") is None
    assert fleet.changes(1)["gone"] == [index]
    fleet.take_update(event("s", 3))
    assert fleet.named("s").event_count == 1


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({}, "good", "as on clean frames"),
        ({"source": 0.6}, "good", "held: 30 points above source"),
        (
            {"events": [event("s", 1, decision="reset", reason="source does better")]},
            "act",
            "reset: source does better",
        ),
        ({"accuracy": 0.85}, "watch", "6 points below clean"),
        ({"accuracy": 0.6}, "act", "31 points below clean"),
        ({"accuracy": 0.6, "clean": None}, "good", ""),
        ({"source": 0.97}, "act", "source would do better by 7 points"),
        ({"source": 0.97, "parameters": "source"}, "watch", "source answers"),
        ({"last": NOW - SILENT_S - 1}, "silent", "no frames since"),
        ({"last": 0.0}, "silent", "no frames yet"),
        (
            {"events": [event("s", i, decision="skipped", reason="gradient norm") for i in range(1, REFUSED + 1)]},
            "act",
            "4 updates refused: gradient norm",
        ),
        (
            # Frames that proposed no update were left out, not refused.
            {"events": [event("s", i, decision="skipped", raw_gradient_norm=None) for i in range(1, REFUSED + 1)]},
            "good",
            "",
        ),
        ({"events": [event("s", 1, decision="rolled_back", reason="worse")]}, "act", "rolled back: worse"),
        ({"events": [event("s", 1, decision="rolled_back", command="c")]}, "good", ""),
    ],
)
def test_health(changes: dict[str, Any], level: str, words: str) -> None:
    health = judge(evidence(**changes), NOW)
    assert health.level == level
    assert words in health.reason


def test_a_stream_whose_worker_has_a_clock_that_is_ahead_falls_silent_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet, now = Fleet(10), time.time()
    fleet.take_update(event("s", 1, time=datetime.fromtimestamp(now + 86_400, UTC)))
    assert [tile["level"] for tile in fleet.changes(0)["tiles"]] == ["good"]
    monkeypatch.setattr("monitoring.console.fleet.time.time", lambda: now + SILENT_S + 60)
    assert [tile["level"] for tile in fleet.changes(0)["tiles"]] == ["silent"]


def test_a_level_holds_a_little_longer_than_it_took_to_reach() -> None:
    between = evidence(accuracy=0.91 - 0.075)
    assert judge(between, NOW, "watch").level == "watch"
    assert judge(between, NOW, "act").level == "act"


def test_the_worst_stream_has_the_greatest_need() -> None:
    fleet = Fleet(10, clean=0.91)
    for name, accuracy in (("fine", 0.9), ("lost", 0.5), ("worse", 0.4), ("low", 0.85)):
        fleet.take_prediction(prediction(name))
        fleet.take_update(event(name, 1, accuracy))
    tiles = {tile["name"]: tile for tile in fleet.changes(0)["tiles"]}
    assert sorted(tiles, key=lambda name: -tiles[name]["need"]) == ["worse", "lost", "low", "fine"]
    assert [tiles[name]["level"] for name in ("worse", "lost", "low", "fine")] == ["act", "act", "watch", "good"]


def test_a_stream_whose_accuracy_nobody_estimates_has_none() -> None:
    fleet = Fleet(10, clean=0.91)
    unknown = Proxies(confidence=0.99, entropy=0.1, flip_rate=0.2)
    fleet.take_prediction(prediction("cam", confidence=0.99, estimated_accuracy=None))
    fleet.take_update(event("cam", 1, None, after=unknown))
    (tile,) = fleet.changes(0)["tiles"]
    assert (tile["accuracy"], tile["source"], tile["spark"], tile["level"]) == (None, None, [], "good")
    assert tile["reason"] == "answering"


def test_only_what_changed_is_told() -> None:
    fleet = Fleet(10, clean=0.9)
    for name in ("a", "b"):
        fleet.take_prediction(prediction(name))
    first = fleet.changes(0)
    assert first["all"]
    assert {tile["name"] for tile in first["tiles"]} == {"a", "b"}
    assert fleet.changes(first["version"])["tiles"] == []
    fleet.take_prediction(prediction("b", label="bolt"), frames=3)
    (tile,) = fleet.changes(first["version"])["tiles"]
    assert (tile["name"], tile["label"], tile["frames"]) == ("b", "bolt", 4)


def test_an_event_that_comes_twice_counts_once() -> None:
    fleet = Fleet(10)
    one = event("a", 1)
    fleet.take_update(one)
    fleet.take_update(one)
    detail = fleet.detail(0, 0, 0)
    assert detail is not None
    assert len(detail["events"]) == detail["next_point"] == 1


def test_the_longest_silent_stream_makes_room_and_pages_are_told() -> None:
    fleet = Fleet(2)
    for name in ("a", "b"):
        fleet.take_prediction(prediction(name))
    known = fleet.changes(0)
    fleet.take_prediction(prediction("c"))
    changes = fleet.changes(known["version"])
    assert [tile["name"] for tile in changes["tiles"]] == ["c"]
    assert changes["gone"] == [tile["i"] for tile in known["tiles"] if tile["name"] == "a"]
    assert fleet.named("a") is None
    assert len(fleet.changes(0)["tiles"]) == 2


def test_detail_goes_on_where_the_page_is() -> None:
    fleet = Fleet(2, clean=0.9)
    for number in range(1, 4):
        fleet.take_update(event("a", number))
    first = fleet.detail(0, 0, 0)
    assert first is not None
    fleet.take_update(event("a", 4, 0.7, source=0.6, low=0.65, high=0.75))
    fresh = fleet.detail(0, first["next_point"], first["next_event"])
    assert fresh is not None
    assert [e["id"] for e in fresh["events"]] == ["a@4"]
    points = fresh["points"]
    assert (points["accuracy"], points["source"], points["low"], points["high"]) == ([0.7], [0.6], [0.65], [0.75])
    assert points["cosine"] == [None]


def test_a_stream_takes_what_the_documentation_says() -> None:
    """Two tenths of a megabyte, however many events there have been: two thousand are a default."""
    fleet = Fleet(10)
    frames = [f"frames/0/{number}" for number in range(10_000, 10_016)]
    layers = {f"block{number}.norm": 0.125 for number in range(8)}
    tracemalloc.start()
    for number in range(1, 2 * CAPACITY):
        fleet.take_update(event("s", number, frames=frames.copy(), layers=layers.copy()))
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size < 250_000
    detail = fleet.detail(fleet.named("s").index, 0, 0)
    assert [line["id"] for line in detail["events"]] == [
        f"s@{number}" for number in range(2 * CAPACITY - EVENTS, 2 * CAPACITY)
    ]


def test_the_outcome_of_a_command_is_told_once() -> None:
    fleet = Fleet(2)
    fleet.take_update(event("a", 1))
    version = fleet.changes(0)["version"]
    fleet.take_update(event("a", 2, None, decision="reset", command="c-1"))
    told = fleet.changes(version)
    assert [(e["command"], e["decision"]) for e in told["results"]] == [("c-1", "reset")]
    assert fleet.changes(told["version"])["results"] == []


def test_series_keep_the_newest_points_in_order() -> None:
    series = Series(capacity=50)
    for number in range(1, 121):
        series.add(event("a", number, number / 200), refused=False)
    columns = series.since(0)
    assert columns["accuracy"] == [pytest.approx(n / 200) for n in range(71, 121)]
    assert len(series.since(118)["accuracy"]) == 2
    assert series.since(120)["accuracy"] == []


def test_the_outline_of_a_series_does_not_wobble() -> None:
    series = Series()
    seen: list[float] = []
    for number in range(1, CAPACITY * 2):
        series.add(event("a", number, (number % 90) / 100), refused=False)
        outline = series.outline("accuracy", 60)
        assert len(outline) <= 60
        if number > CAPACITY:
            # Every mean but the newest was there before.
            assert np.isin(outline[:-1], seen).all()
        seen = outline.tolist()


def test_numbers_that_are_not_finite_become_none() -> None:
    series = Series()
    series.add(event("a", 1, None, raw_gradient_norm=math.nan, source_distance=math.inf), refused=False)
    columns = series.since(0)
    assert columns["raw"] == [None]
    assert columns["distance"] == [None]
    assert columns["accuracy"] == [None]


def test_the_newest_frame_that_source_was_asked_about_stays_beside_the_newest() -> None:
    fleet = Fleet(10)
    fleet.take_prediction(prediction("a", label="bolt", source_index=1, source_label="nut"))
    fleet.take_prediction(prediction("a", label="nut"))
    detail = fleet.detail(0, 0, 0)
    assert detail is not None
    assert (detail["prediction"]["label"], detail["compared"]["label"]) == ("nut", "bolt")
    assert detail["compared"]["source_label"] == "nut"
