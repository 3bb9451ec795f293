"""A sender that makes up a key for each frame: its frames are dead letters, and the cameras go on."""

from __future__ import annotations

import pytest

from schemas.config import WorkerConfig
from tests.conftest import Topic, picture
from tests.system.conftest import MakeWorker, metric, turn_until
from worker.control import retire
from worker.site.doctor import examine
from worker.store.store import StateStore
from worker.streams import newcomers


def test_cameras_go_on_beside_keys_that_are_made_up(
    config: WorkerConfig, topic: Topic, store: StateStore, monkeypatch: pytest.MonkeyPatch, make_worker: MakeWorker
) -> None:
    monkeypatch.setattr(newcomers, "COUNT_AGAIN_S", 0.0)
    config = config.model_copy(update={"store": config.store.model_copy(update={"max_streams": 5})})
    frames, letters = config.kafka.topics.frames, config.kafka.topics.dead_letters
    cameras = [b"a", b"b", b"c"]
    worker = make_worker(config)
    topic.send(frames, [(camera, picture(i), []) for i in range(4) for camera in cameras])
    turn_until(worker, lambda: metric(worker, "predictions_total") == 12)
    made_up = [(b"key-%d" % i, picture(i), []) for i in range(30)]
    topic.send(frames, [record for i in range(30) for record in (made_up[i], (cameras[i % 3], picture(i), []))])
    turn_until(worker, lambda: metric(worker, "bad_frames_total", kind="too_many_streams") == 28)
    turn_until(worker, lambda: metric(worker, "predictions_total") == 12 + 30 + 2)
    turn_until(worker, lambda: set(worker._consumer.lag().values()) == {0})
    assert store.count() == 5
    buried = topic.read(letters, lambda records: len(records) >= 28)
    assert {dict(record.headers)["driftkeel-error-class"] for record in buried} == {b"too_many_streams"}
    found = {finding.text: finding.level for finding in examine(config)}
    (room,) = [text for text in found if "5 streams, of at most 5" in text]
    assert found[room] == "warning"
    (gone, *_) = [stream for stream in store.streams() if stream.startswith("key-")]
    retire.delete(store, gone, "made up", "operator")
    topic.send(frames, [(b"new", picture(1), [])])
    turn_until(worker, lambda: "new" in worker._streams.engine)
