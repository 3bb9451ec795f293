import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from monitoring import observe
from monitoring.histogram import FrameHistogram
from monitoring.metrics import WorkerMetrics
from monitoring.reference import table
from monitoring.streams import StreamView
from schemas.frame import Position
from schemas.policy import PolicyChange
from schemas.state import DriftWatch, StreamHeader
from schemas.update import Proxies, UpdateEvent

UNITLESS = {"norm", "cosine", "distance", "step", "frames", "streams", "partitions"}
UNITLESS |= {
    "score",
    "adapting",
    "decision",
    "blind",
    "shifted",
    "trusted",
    "source",
    "frozen",
    "back",  # of held_back
    "gcount",
    "gsum",
}  # scores and flags


def families(metrics: WorkerMetrics):
    return list(text_string_to_metric_families(generate_latest(metrics.registry).decode()))


def test_names_follow_the_conventions() -> None:
    metrics = WorkerMetrics(10)
    for family in families(metrics):
        if family.name.endswith("_info") or family.name.startswith("process_"):  # the client's own
            continue
        assert family.name.startswith("driftkeel_")
        assert family.documentation
        assert not family.name.endswith(("_ms", "_percent", "_milliseconds"))
        if family.type in ("histogram", "gauge"):
            unit = family.name.rsplit("_", 1)[-1]
            assert unit in {"seconds", "bytes", "ratio", "nats", "records", *UNITLESS}, family.name


def event(stream: str, **fields) -> UpdateEvent:
    given = {
        "id": f"{stream}@1",
        "time": datetime(2026, 1, 1, tzinfo=UTC),
        "decision": "applied",
        "reason": "within limits",
        "frames": ["f/0/1", "f/0/2", "f/0/3", "f/0/4"],
        "step": 1,
        "token": 1,
        "bundle": "b",
        "worker": "w",
    }
    return UpdateEvent(stream=stream, **{**given, **fields})


def proxies(accuracy: float = 0.8, **fields) -> Proxies:
    return Proxies(estimated_accuracy=accuracy, confidence=accuracy, entropy=0.5, **fields)


def header(stream: str, **fields) -> StreamHeader:
    return StreamHeader(stream=stream, bundle="b", method="mgg", **fields)


def decide(metrics: WorkerMetrics, stream: str, **fields) -> None:
    observe.decided(metrics, event(stream, **fields), header(stream))


def shown(metrics: WorkerMetrics) -> set[str]:
    text = generate_latest(metrics.registry).decode()
    families = text_string_to_metric_families(text)
    steps = next(family for family in families if family.name == "driftkeel_stream_step")
    return {sample.labels["stream"] for sample in steps.samples}


def value(metrics: WorkerMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"driftkeel_{name}", labels)


def test_stream_series_are_bounded_and_removed() -> None:
    metrics = WorkerMetrics(max_streams=3)
    for i in range(10):
        decide(metrics, f"cam-{i}", after=proxies(0.9 - i / 100))
    assert shown(metrics) == {"cam-7", "cam-8", "cam-9"}  # the worst
    metrics.streams.forget("cam-8")
    assert shown(metrics) == {"cam-7", "cam-9", "cam-6"}
    assert value(metrics, "fleet_streams", condition="any") == 9
    assert value(metrics, "fleet_streams", condition="shown") == 3
    assert value(metrics, "fleet_estimated_accuracy_ratio_bucket", le="0.85") == 4


def test_an_accuracy_that_nobody_estimates_is_in_no_series() -> None:
    metrics = WorkerMetrics(max_streams=3)
    unknown = event("cam", after=Proxies(confidence=0.99, entropy=0.1, marginal_entropy=0.1, flip_rate=0.8))
    observe.decided(metrics, unknown, header("cam"))
    observe.judged(metrics, unknown, 0.1, "adapted")
    assert value(metrics, "stream_flip_ratio", stream="cam") == 0.8
    assert value(metrics, "stream_estimated_accuracy_ratio", stream="cam") is None
    assert value(metrics, "fleet_estimated_accuracy_ratio_gcount") == 0
    assert value(metrics, "estimated_frames_total") == 0


def test_streams_in_need_are_shown_first(monkeypatch) -> None:
    metrics = WorkerMetrics(max_streams=2)
    for i in range(5):
        decide(metrics, f"cam-{i}", after=proxies(0.5 + i / 10))
    assert shown(metrics) == {"cam-0", "cam-1"}
    decide(metrics, "cam-4", decision="skipped", reason="gradient norm 9 above its limit 4", after=proxies(0.9))
    moving = DriftWatch(adapting=False, mean=[1.0], variance=[1.0], rise=[5.0], fall=[0.0])
    observe.decided(metrics, event("cam-3", after=proxies(0.9)), header("cam-3", drift=moving))
    assert shown(metrics) == {"cam-0", "cam-1"}  # a choice stands for a while
    later = time.monotonic() + 40
    monkeypatch.setattr("monitoring.streams.monotonic", lambda: later)
    assert shown(metrics) == {"cam-3", "cam-4"}
    assert value(metrics, "fleet_streams", condition="in_trouble") == 1
    assert value(metrics, "fleet_streams", condition="drifting") == 1
    monkeypatch.setattr("monitoring.streams.monotonic", lambda: later + 400)
    assert shown(metrics) == {"cam-3", "cam-0"}  # trouble has passed


def test_a_stream_shows_what_its_event_says_and_nothing_for_none() -> None:
    metrics = WorkerMetrics(5)
    full = proxies(0.8, low=0.7, high=0.9, source_accuracy=0.6, marginal_entropy=1.5, flip_rate=0.25)
    decide(metrics, "a", after=full, raw_gradient_norm=2.0, cosine=0.5, source_distance=3.0, parameters="source")
    decide(metrics, "b", after=proxies())
    for name, expected in {
        "estimated_accuracy_low_ratio": 0.7,
        "estimated_accuracy_high_ratio": 0.9,
        "source_accuracy_ratio": 0.6,
        "marginal_entropy_nats": 1.5,
        "flip_ratio": 0.25,
        "raw_gradient_norm": 2.0,
        "gradient_cosine": 0.5,
        "source_distance": 3.0,
        "answers_source": 1.0,
        "decision": 0.0,
    }.items():
        assert value(metrics, f"stream_{name}", stream="a") == expected, name
        assert value(metrics, f"stream_{name}", stream="b") == (
            0.0 if name in ("answers_source", "decision") else None
        ), name
    decide(metrics, "a", decision="skipped", reason="too few frames", after=full)
    assert value(metrics, "stream_source_distance", stream="a") == 3.0  # it has not moved
    decide(metrics, "a", decision="reset", reason="asked", command="c1", step=0, frames=[])
    assert value(metrics, "stream_source_distance", stream="a") is None
    assert value(metrics, "stream_decision", stream="a") == 4.0
    assert value(metrics, "updates_total", decision="reset", reason="command") == 1.0


def test_a_command_is_no_sign_of_frames(monkeypatch) -> None:
    metrics, began = WorkerMetrics(5), time.time() - time.monotonic()
    for moment, frames in ((1_000.0, ["f/0/1"]), (2_000.0, [])):
        monkeypatch.setattr("monitoring.observe.time.monotonic", lambda moment=moment: moment)
        observe.decided(metrics, event("a", decision="applied" if frames else "frozen", frames=frames), header("a"))
    assert value(metrics, "stream_last_decision_timestamp_seconds", stream="a") == pytest.approx(began + 1_000, abs=1)


def test_a_stream_without_frames_is_silent_until_one_comes(monkeypatch) -> None:
    metrics = WorkerMetrics(0, silent_after_s=60.0)
    now = time.monotonic()
    decide(metrics, "a")
    decide(metrics, "b")
    assert value(metrics, "fleet_streams", condition="silent") == 0
    monkeypatch.setattr("monitoring.observe.time.monotonic", lambda: now + 61)
    monkeypatch.setattr("monitoring.streams.monotonic", lambda: now + 62)
    decide(metrics, "a")
    decide(metrics, "b", decision="frozen", frames=[])  # a command is no frame
    assert value(metrics, "fleet_streams", condition="silent") == 1
    decide(metrics, "b")
    assert value(metrics, "fleet_streams", condition="silent") == 0


@pytest.mark.parametrize("step", [-86_400, -3_600, 3_600, 86_400])
def test_ages_stay_what_they_are_when_the_clock_is_set(monkeypatch, step: int) -> None:
    metrics, now = WorkerMetrics(1, silent_after_s=60.0), time.monotonic()
    refused = {"decision": "skipped", "reason": "gradient norm 9 above its limit 4"}
    decide(metrics, "a", **refused)
    decide(metrics, "b")

    def conditions() -> list[float | None]:
        return [value(metrics, "fleet_streams", condition=name) for name in ("in_trouble", "silent")]

    before = value(metrics, "stream_last_trouble_timestamp_seconds", stream="a")
    assert conditions() == [1, 0]
    monkeypatch.setattr("monitoring.streams.time", lambda: time.time() + step)
    assert conditions() == [1, 0]
    # Ages are by this clock, which is now another: see docs/monitoring.md.
    moved = value(metrics, "stream_last_trouble_timestamp_seconds", stream="a")
    assert moved == pytest.approx(before + step, abs=1)
    assert value(metrics, "stream_last_trouble_timestamp_seconds", stream="a") == moved
    decide(metrics, "b", **refused)
    monkeypatch.setattr("monitoring.streams.monotonic", lambda: now + 290)
    decide(metrics, "a", decision="applied")
    assert conditions() == [2, 2]
    monkeypatch.setattr("monitoring.streams.monotonic", lambda: now + 400)
    assert conditions() == [0, 2]


views = st.builds(
    StreamView,
    first_seen=st.sampled_from([0.0, 9_900.0]),
    last_decision=st.just(0.0),
    decision=st.just(0.0),
    step=st.just(1.0),
    answers_source=st.just(0.0),
    frozen=st.just(0.0),
    troubled=st.sampled_from([None, 0.0, 9_900.0]),
    trusted=st.sampled_from([0.0, 1.0]),
    drift=st.sampled_from([0.0, 0.6]),
    estimated_accuracy=st.none() | st.floats(0, 1),
)


@given(st.dictionaries(st.text(min_size=1, max_size=3), views, max_size=12), st.integers(0, 6))
def test_who_is_shown_needs_it_no_less_than_who_is_not(streams: dict[str, StreamView], most: int) -> None:
    metrics, now = WorkerMetrics(most), 10_000.0
    for stream, view in streams.items():
        metrics.streams.put(stream, view)
    with mock.patch("monitoring.streams.monotonic", return_value=now):
        seen = shown(metrics)
    assert len(seen) == min(most, len(streams))

    def need(stream: str) -> tuple[bool, bool, bool]:
        view = streams[stream]
        return view.in_trouble(now), view.drifting, view.first_seen > now - 600

    assert all(need(stream) >= need(other) for stream in seen for other in set(streams) - seen)


def test_a_blind_camera_is_shown_whatever_the_policy_says_and_is_no_trouble_of_the_updates() -> None:
    metrics = WorkerMetrics(5)
    refused = event("a", decision="skipped", reason="90% of the frames are blank: covered camera?")
    observe.decided(metrics, refused, header("a"), blind=True)
    quiet = event("a", decision="skipped", reason="policy: quiet hours 00:00-23:59")
    observe.decided(metrics, quiet, header("a"), blind=True)
    assert (value(metrics, "stream_blind", stream="a"), value(metrics, "stream_held_back", stream="a")) == (1.0, 1.0)
    assert value(metrics, "stream_last_trouble_timestamp_seconds", stream="a") is None
    assert value(metrics, "fleet_streams", condition="in_trouble") == 1
    # A command has no frames: nothing is known anew of the camera.
    observe.decided(metrics, event("a", decision="frozen", command="c", frames=[]), header("a"))
    assert (value(metrics, "stream_blind", stream="a"), value(metrics, "stream_held_back", stream="a")) == (1.0, 1.0)
    observe.decided(metrics, event("a"), header("a"), blind=False)
    assert (value(metrics, "stream_blind", stream="a"), value(metrics, "stream_held_back", stream="a")) == (0.0, 0.0)
    assert value(metrics, "fleet_streams", condition="in_trouble") == 0


def test_nobody_wants_updates_of_a_stream_whose_adaptation_is_switched_off() -> None:
    metrics = WorkerMetrics(5)
    decide(metrics, "a", decision="skipped", reason="adaptation is switched off")
    assert value(metrics, "stream_held_back", stream="a") == 1.0
    decide(metrics, "a")
    assert value(metrics, "stream_held_back", stream="a") == 0.0


def test_a_line_of_one_product_is_not_stuck() -> None:
    metrics = WorkerMetrics(5)
    decide(metrics, "a", decision="skipped", reason="one class for more than 256 frames")
    assert value(metrics, "stream_held_back", stream="a") == 1.0
    assert value(metrics, "stream_last_trouble_timestamp_seconds", stream="a") is None


def test_frozen_is_what_the_stream_s_policy_says() -> None:
    metrics = WorkerMetrics(5)
    for frozen in (True, False):
        kept = header("a", policy=PolicyChange(frozen=frozen))
        observe.decided(metrics, event("a", decision="frozen" if frozen else "unfrozen", command="c"), kept)
        assert value(metrics, "stream_frozen", stream="a") == frozen


def test_a_stream_that_has_left_counts_but_leaves_no_series() -> None:
    metrics = WorkerMetrics(5)
    observe.decided(metrics, event("gone"), None)
    assert shown(metrics) == set()
    assert value(metrics, "updates_total", decision="applied", reason="within_limits") == 1.0


def test_reasons_with_numbers_in_them_become_few_labels() -> None:
    metrics = WorkerMetrics(1)
    for i in range(50):
        for reason in (f"gradient norm {i} above its limit 4", f"distance from source {i} above", f"new reason {i}"):
            decide(metrics, "a", decision="skipped", reason=reason)
    for kind in ("gradient", "distance", "other"):
        assert value(metrics, "updates_total", decision="skipped", reason=kind) == 50.0


def test_frames_saved_count_only_where_both_are_estimated() -> None:
    metrics = WorkerMetrics(1)
    both = event("a", after=proxies(0.75, source_accuracy=0.5))
    observe.judged(metrics, both, 0.4, "adapted")
    observe.judged(metrics, both, 0.4, "source")
    observe.judged(metrics, both, 0.4, "approved")
    observe.judged(metrics, event("a", after=proxies(0.75)), 0.4, "adapted")
    assert value(metrics, "estimated_frames_total") == 8.0
    assert value(metrics, "estimated_correct_frames_total", by="source") == 4.0
    assert value(metrics, "estimated_correct_frames_total", by="answered") == 5.0
    assert value(metrics, "batch_frames_count") == 4.0
    assert value(metrics, "entropy_nats_sum") == pytest.approx(1.6)


def test_norms_are_those_of_updates_that_were_computed() -> None:
    metrics = WorkerMetrics(1)
    for norms in ({"raw_gradient_norm": 3.0, "generated_gradient_norm": 0.5}, {"raw_gradient_norm": 2.0}, {}):
        none = {"raw_gradient_norm": None, "generated_gradient_norm": None}
        observe.judged(metrics, event("a", **none | norms), 0.4, "adapted")
    found = [
        value(metrics, f"{name}_gradient_norm_{what}") for name in ("raw", "generated") for what in ("count", "sum")
    ]
    assert found == [2, 5, 1, 0.5]


def test_what_an_answer_took_is_told_from_when_it_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishing may come much later."""
    monkeypatch.setattr(observe, "time", SimpleNamespace(time=lambda: 1_000.0, monotonic=lambda: 50.0))
    answers = observe.Answers(45.0)
    answers.add(Position("frames", 1, 0), 42.0, 985.0, 0.9)
    answers.add(Position("frames", 1, 1), 46.0, 999.0, 0.8)  # of a clock that is ahead
    assert (answers.waits, answers.latencies, answers.confidences) == ([3, 0], [10, 0], [0.9, 0.8])
    assert answers.slowest == (10, "frames/1/0")


def test_stages_of_a_step_are_told_apart() -> None:
    metrics = WorkerMetrics(1)
    observe.took(metrics, predict=2.0, store=3.0)
    assert [value(metrics, "step_seconds_sum", stage=stage) for stage in ("predict", "store")] == [2, 3]


def test_the_slowest_frame_of_a_pass_is_an_exemplar() -> None:
    metrics = WorkerMetrics(1)
    answers = observe.Answers(time.monotonic())
    for offset, late in enumerate((0.2, 3.0, 0.3)):
        answers.add(Position("frames", 1, offset), answers.done - 0.1, time.time() - late, 0.9)
    answers.add(Position("frames", 1, 9), answers.done, 0.0, 0.9)  # a record that does not say when it was sent
    answers.by["adapted"] += 4
    observe.answered(metrics, answers)
    text = openmetrics(metrics.registry).decode()
    (line,) = [line for line in text.splitlines() if "# {" in line]
    assert 'le="5.0"' in line
    assert 'frame="frames/1/1"' in line
    assert value(metrics, "frame_latency_seconds_count") == 3.0
    assert value(metrics, "frame_wait_seconds_count") == 4.0
    assert value(metrics, "answers_total", parameters="adapted") == 4.0


def test_a_position_too_long_for_an_exemplar_is_left_out() -> None:
    registry = CollectorRegistry()
    FrameHistogram("driftkeel_x_seconds", "X.", (1.0,), registry).observe_many([0.5], (0.5, "t" * 249 + "/0/1"))
    assert "# {" not in openmetrics(registry).decode()


def test_the_table_of_metrics_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert page.read_text() == table(), "run: python -m monitoring.reference > docs/metrics.md"


def test_lag_of_lost_partitions_disappears() -> None:
    metrics = WorkerMetrics(0)
    metrics.set_lag({("frames", 0): 5, ("frames", 1): 6})
    metrics.set_lag({("frames", 1): 7})
    text = generate_latest(metrics.registry).decode()
    assert 'partition="0"' not in text
    assert 'driftkeel_consumer_lag_records{partition="1",topic="frames"} 7.0' in text


def test_a_scrape_in_between_sees_every_lag() -> None:
    metrics = WorkerMetrics(0)
    lags = {("frames", 0): 5, ("frames", 1): 6}
    metrics.set_lag(lags)
    labels, seen = metrics.lag.labels, []

    def scraped(*values: str) -> object:
        seen.append(generate_latest(metrics.registry).decode().count("driftkeel_consumer_lag_records{"))
        return labels(*values)

    with mock.patch.object(metrics.lag, "labels", scraped):
        metrics.set_lag(lags)
    assert seen == [2, 2]


def test_frame_histograms_look_like_the_clients_own() -> None:
    registries = CollectorRegistry(), CollectorRegistry()
    buckets, values = (0.1, 0.25, 1.0), [0.0, 0.1, 0.11, 0.5, 1.0, 7.0]
    FrameHistogram("driftkeel_x_seconds", "X.", buckets, registries[0]).observe_many(values)
    own = Histogram("driftkeel_x_seconds", "X.", buckets=buckets, registry=registries[1])
    for value in values:
        own.observe(value)
    ours, theirs = (generate_latest(registry).decode() for registry in registries)
    assert ours.splitlines() == [line for line in theirs.splitlines() if "_created" not in line]
