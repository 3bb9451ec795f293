"""Adaptation left out, because a stream has settled or because frames are late: seen from outside."""

import time

from tests.conftest import picture
from tests.system.conftest import Site, ids_by_stream


def test_a_settled_stream_is_predicted_only_and_stays_settled_over_a_restart(site: Site) -> None:
    first = site.start(adapt={"mode": "on_demand"})
    frames = [("cam", picture(i % 24)) for i in range(600)]
    ids = site.send(frames)
    site.wait_folded(first, {"cam": 600})
    site.assert_folded_once(ids_by_stream(frames, ids))
    events = site.events(lambda es: sum(len(e.frames) for e in es) >= 600)
    settled = [e for e in events if e.reason.startswith("settled")]
    assert settled
    assert all(e.decision == "skipped" for e in settled)
    assert "applied" in {e.decision for e in events[: events.index(settled[0])]}
    assert f'driftkeel_adaptations_left_out_total{{reason="settled"}} {len(settled)}.0' in first.metrics()
    assert first.stop() == 0
    before = site.header("cam").drift
    assert len(before.mean) == 2
    second = site.start(adapt={"mode": "on_demand"})
    site.send([("cam", picture(i)) for i in range(8)])
    site.wait_folded(second, {"cam": 608})
    after = site.header("cam").drift
    assert (after.adapting, after.seen) != (True, 1), "the watch began anew"


def test_late_frames_are_predicted_only_and_every_one_is_counted(site: Site) -> None:
    frames = [(f"cam-{i % 4}", picture(i)) for i in range(160)]
    records = [(stream.encode(), image, []) for stream, image in frames]
    before = int(1000 * (time.time() - 40))
    sent = site.topic.send(site.kafka.topics.frames, records, before)
    ids = [f"{m.topic}/{m.partition}/{m.offset}" for m in sent]
    budget = {**site.config["batch"], "latency_budget_ms": 60_000, "max_wait_ms": 5_000}
    worker = site.start(batch=budget)
    assert set(site.predictions(ids)) == set(ids)
    grouped = ids_by_stream(frames, ids)
    site.wait_folded(worker, dict.fromkeys(grouped, 40))
    site.assert_folded_once(grouped)
    events = site.events(lambda es: sum(len(e.frames) for e in es) >= 160)
    shed = [e for e in events if e.reason.startswith("overload")]
    assert len(shed) == len(events)
    assert f'driftkeel_adaptations_left_out_total{{reason="overload"}} {len(shed)}.0' in worker.metrics()
    fresh = site.send([("cam-0", picture(i)) for i in range(8)])
    events = site.events(lambda es: any(set(e.frames) & set(fresh) for e in es))
    assert next(e for e in events if set(e.frames) & set(fresh)).decision == "applied"
