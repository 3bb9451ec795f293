"""The worker as a process, with the real broker and the real store."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import redis
from kafka import KafkaAdminClient

from meta.bundle_folder import read_manifest
from tests.conftest import picture
from tests.system.conftest import Site, ids_by_stream
from worker.embedded import free_port
from worker.kafka.client import connection, open_client
from worker.store.store import StateStore


def test_frames_in_predictions_updates_and_states_out(site: Site) -> None:
    site.forked = False
    frames = [(f"cam-{i % 5}", picture(i, format=["PNG", "JPEG", "WEBP"][i % 3])) for i in range(200)]
    worker = site.start()
    ids = site.send(frames)
    predictions = site.predictions(ids)
    assert {len(found) for found in predictions.values()} == {1}
    for (stream, _), frame_id in zip(frames, ids, strict=True):
        prediction = predictions[frame_id][0]
        assert prediction.stream == stream
        assert prediction.label == ["nut", "bolt", "washer", "other"][prediction.index]
        assert prediction.parameters == ("adapted" if prediction.step else "source")
        assert prediction.top[0].index == prediction.index
    grouped = ids_by_stream(frames, ids)
    site.wait_folded(worker, {stream: len(ids) for stream, ids in grouped.items()})
    site.assert_folded_once(grouped)

    events = site.events(lambda es: sum(len(e.frames) for e in es) >= 200)
    for stream, stream_ids in grouped.items():
        history = [e for e in events if e.stream == stream]
        assert [e.id for e in history] == [f"{stream}@{n + 1}" for n in range(len(history))]
        assert [f for e in history for f in e.frames] == stream_ids
        assert sum(e.decision == "applied" for e in history) == site.header(stream).step == history[-1].step
        assert all(e.raw_gradient_norm > 0 and e.source_distance > 0 for e in history if e.decision == "applied")

    metrics = worker.metrics()
    assert "driftkeel_predictions_total 200.0" in metrics
    assert "driftkeel_frames_total 200.0" in metrics
    assert 'driftkeel_stream_step{stream="cam-0"}' in metrics
    assert worker.stop() == 0
    assert "stopped" in worker.log.read_text()


def test_predictions_carry_cloudevents_headers_and_the_trace(site: Site) -> None:
    trace = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    headers = [("ce_time", b"2026-05-01T10:00:00+00:00"), ("traceparent", trace)]
    site.start()
    site.topic.send(site.kafka.topics.frames, [(b"cam", picture(), headers)])
    (record,) = site.topic.read(site.kafka.topics.predictions, lambda rs: len(rs) == 1)
    out = dict(record.headers)
    content = json.loads(record.value)
    assert out["traceparent"] == trace
    assert out["ce_type"] == b"io.driftkeel.prediction.v1"
    assert out["ce_id"].decode() == content["id"]
    assert content["event_time"].startswith("2026-05-01T10:00:00")


def test_few_frames_are_predicted_at_once_and_folded_after_the_hold(site: Site) -> None:
    worker = site.start()
    ids = site.send([("cam", picture(i)) for i in range(2)])
    assert all(p[0].step == 0 for p in site.predictions(ids).values())
    site.wait_folded(worker, {"cam": 2})
    (event,) = site.events(lambda es: len(es) >= 1)
    assert (event.decision, event.frames) == ("skipped", ids)
    assert "max_hold_ms" in event.reason


def test_switched_off_adaptation_predicts_and_changes_nothing(site: Site) -> None:
    worker = site.start(adapt={"enabled": False})
    ids = site.send([("cam", picture(i)) for i in range(24)])
    assert all(p[0].parameters == "source" for p in site.predictions(ids).values())
    site.wait_folded(worker, {"cam": 24})
    assert site.header("cam").step == 0


def test_what_was_learned_answers_while_adaptation_is_off_and_source_in_shadow(site: Site) -> None:
    first = site.start(guard={"never_worse": False})
    site.feed(first, "cam", 48)
    step = site.header("cam").step
    assert step > 0
    assert first.stop() == 0
    frames = [("cam", picture(i)) for i in range(24)]
    second = site.start(adapt={"enabled": False}, guard={"never_worse": False})
    ids = site.send(frames)
    found = site.predictions(ids)
    assert {(found[i][0].parameters, found[i][0].step) for i in ids} == {("adapted", step)}
    assert second.stop() == 0
    site.start(policy={"mode": "shadow"}, guard={"never_worse": False})
    ids = site.send(frames)
    found = site.predictions(ids)
    assert {found[i][0].parameters for i in ids} == {"source"}


def test_the_guard_skips_and_says_why(site: Site) -> None:
    worker = site.start(guard={"max_gradient_factor": 1e-9})
    ids = site.send([("cam", picture(i)) for i in range(16)])
    site.predictions(ids)
    site.wait_folded(worker, {"cam": 16})
    assert site.header("cam").step == 0
    events = site.events(lambda es: sum(len(e.frames) for e in es) >= 16)
    assert all(e.decision == "skipped" and "gradient norm" in e.reason for e in events)


def test_restart_goes_on_where_it_stopped(site: Site) -> None:
    first = site.start()
    frames = [(f"cam-{i % 3}", picture(i)) for i in range(60)]
    before = site.send(frames)
    site.predictions(before)
    site.wait_folded(first, dict.fromkeys(["cam-0", "cam-1", "cam-2"], 20))
    steps = site.header("cam-0").step
    assert first.stop() == 0
    second = site.start()
    after = site.send(frames)
    predictions = site.predictions(after)
    assert min(p[0].step for i, p in predictions.items() if p[0].stream == "cam-0" and i in after) >= steps
    site.wait_folded(second, dict.fromkeys(["cam-0", "cam-1", "cam-2"], 40))
    site.assert_folded_once(ids_by_stream(frames + frames, before + after))


def test_streams_beyond_memory_live_in_the_store(site: Site) -> None:
    worker = site.start(adapt={"max_resident_streams": 2})
    frames = [(f"cam-{i // 8 % 6}", picture(i)) for i in range(192)]
    ids = site.send(frames)
    site.predictions(ids)
    grouped = ids_by_stream(frames, ids)
    site.wait_folded(worker, {stream: len(ids) for stream, ids in grouped.items()})
    site.assert_folded_once(grouped)
    worker.wait_until(lambda: "driftkeel_resident_streams 2.0" in worker.metrics(), "shrinking to two streams")


@pytest.mark.parametrize("on_change", ["reset", "carry", "shadow"])
def test_another_bundle_takes_streams_over_and_says_so(site: Site, tmp_path, on_change: str) -> None:
    old = site.config["bundle"]["path"]
    first = site.start()
    frames = [("cam", picture(i)) for i in range(16)]
    before = site.send(frames)
    site.wait_folded(first, {"cam": 16})
    assert first.stop() == 0
    steps = site.header("cam").step
    folder = shutil.copytree(old, tmp_path / "other")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "name": "other"}))
    previous = [] if on_change == "reset" else [str(old)]
    second = site.start(
        bundle={"path": str(folder), "on_change": on_change, "previous": previous, "shadow_frames": 8},
        batch={"max_batch": 8, "max_wait_ms": 10_000, "min_adapt": 8},
    )
    after = site.send(frames)
    site.wait_folded(second, {"cam": 32})
    site.assert_folded_once({"cam": before + after})
    decision = "reset" if on_change == "reset" else "carried"
    published = site.events(lambda es: len({f for e in es for f in e.frames}) == 32)
    events = list({e.id: e for e in published}.values())  # The last one before the change may come twice.
    assert [e.id for e in events] == [f"cam@{n + 1}" for n in range(len(events))]
    moved = next(e for e in events if e.decision == decision)
    assert "from bundle" in moved.reason or "belongs to bundle" in moved.reason
    assert moved.step == (0 if on_change == "reset" else steps) == events[events.index(moved) + 1].step - 1
    predictions = site.predictions(after)
    answers = [predictions[frame_id][0] for frame_id in after]
    assert answers[0].step == (steps if on_change == "carry" else 0)
    assert {p.parameters for p in answers[:8]} == {"adapted" if on_change == "carry" else "source"}
    assert {p.parameters for p in answers[8:]} == {"adapted"}


def test_a_stream_pinned_to_a_bundle_has_a_topic_and_a_group_of_its_own(site: Site, tmp_path) -> None:
    """Both groups share store and topics out; a stream that comes back is carried over like any other."""
    old = site.config["bundle"]["path"]
    folder = shutil.copytree(old, tmp_path / "other")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "name": "other"}))
    topics = site.kafka.topics.model_copy(update={"frames": f"{site.kafka.topics.frames}-pinned"})
    pinned = site.kafka.model_copy(update={"topics": topics, "group": f"{site.kafka.group}-pinned"})
    admin = open_client(KafkaAdminClient, **connection(pinned))
    admin.create_topics({topics.frames: {"num_partitions": 1, "replication_factor": 1}}, wait_for_metadata=True)
    admin.close()
    site.start(kafka=pinned.model_dump(mode="json", exclude_none=True))
    newer = site.start(bundle={"path": str(folder), "on_change": "carry", "previous": [str(old)]})
    frames = [("cam", picture(i)) for i in range(16)]
    records = [(stream.encode(), image, []) for stream, image in frames]
    first = [f"{m.topic}/{m.partition}/{m.offset}" for m in site.topic.send(topics.frames, records)]
    assert {p[0].bundle for p in site.predictions(first).values()} == {read_manifest(Path(old)).content_hash}
    site.wait_folded(newer, {"cam": 16})
    steps = site.header("cam").step
    then = site.send(frames)  # Its producer has gone over to the common topic.
    answers = [site.predictions(then)[frame_id][0] for frame_id in then]
    assert {p.bundle for p in answers} == {read_manifest(Path(folder)).content_hash}
    assert answers[0].step == steps > 0
    site.wait_folded(newer, {"cam": 32})
    site.assert_folded_once({"cam": first + then})


@pytest.mark.parametrize("field", ["header", "tensors"])
def test_a_damaged_state_restarts_from_source_and_says_so(site: Site, field: str, client: redis.Redis) -> None:
    first = site.start()
    site.send([("cam", picture(i)) for i in range(16)])
    site.wait_folded(first, {"cam": 16})
    assert first.stop() == 0
    meta, tensors, *_ = StateStore(site.store).keys("cam")
    if field == "header":
        client.hset(meta, field, b"\x80\x04damaged")
    else:
        client.set(tensors, b"\x80\x04damaged")
    site.start()
    ids = site.send([("cam", picture(i)) for i in range(8)])
    assert site.predictions(ids)[ids[0]][0].step == 0
    events = site.events(lambda es: any(e.decision == "reset" for e in es))
    assert next(e for e in events if e.decision == "reset").reason.startswith("the stored")


def test_interrupt_stops_cleanly_too(site: Site) -> None:
    site.forked = False
    worker = site.start()
    worker.wait_until(lambda: "assigned partitions" in worker.log.read_text(), "the assignment")
    worker.signal(signal.SIGINT)
    assert worker.process.wait(120) == 0


def test_a_worker_that_still_waits_for_its_broker_is_not_ready_and_stops_cleanly(site: Site) -> None:
    site.forked = False
    away = {**site.config["kafka"], "bootstrap": f"127.0.0.1:{free_port()}", "connect_timeout_s": 60}
    worker = site.start(kafka=away)
    worker.wait_until(lambda: "cannot be reached" in worker.log.read_text(), "a first try")
    assert not worker.ready()
    assert worker.stop() == 0
    assert "Traceback" not in worker.log.read_text()
