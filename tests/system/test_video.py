"""From a video to predictions on a terminal: produce, broker, worker, watch, each a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from meta.data import fashion_mnist
from schemas.prediction import Prediction
from tests.conftest import SHIPPED_BUNDLE, Topic, picture
from tests.system.conftest import Site, run_cli
from tests.videos import make_video, write_video

GARMENTS = 24
FRAMES_EACH = 4


def client_environment(site: Site) -> dict[str, str]:
    """What points any command at the site's broker and topics."""
    topics = {f"TOPICS__{name.upper()}": topic for name, topic in site.kafka.topics.model_dump().items()}
    values = {"BOOTSTRAP": site.kafka.bootstrap, **topics}
    return {f"DRIFTKEEL__KAFKA__{name}": value for name, value in values.items()}


def test_a_video_through_the_whole_chain(site: Site, tmp_path: Path) -> None:
    data = fashion_mnist("test")
    pictures = [np.repeat(i[:, :, None], 3, 2) for i in data.images[:GARMENTS] for _ in range(FRAMES_EACH)]
    enlarged = [np.asarray(Image.fromarray(p).resize((112, 112), Image.Resampling.NEAREST)) for p in pictures]
    video = write_video(tmp_path / "belt-1.mp4", enlarged, fps=25)
    environment = client_environment(site)
    state = str(tmp_path / "state.sqlite")

    sent = run_cli("produce", str(video), "--fast", "--state", state, **environment)
    assert sent.returncode == 0, sent.stderr
    assert "belt-1: 96 frames sent" in sent.stdout
    again = run_cli("produce", str(video), "--fast", "--state", state, **environment)
    assert "belt-1: 0 frames sent, 0.0 MB, 96 passed over" in again.stdout

    site.start(bundle={"path": str(SHIPPED_BUNDLE)})
    drawn = tmp_path / "drawn"
    options = ["--json", "--from-beginning", "--count", "96", "--stream", "belt-1", "--draw", str(drawn)]
    watched = run_cli("watch", *options, **environment)
    assert watched.returncode == 0, watched.stderr
    predictions = [Prediction.model_validate_json(line) for line in watched.stdout.splitlines()]
    assert len({p.id for p in predictions}) == 96
    assert {p.stream for p in predictions} == {"belt-1"}
    times = [p.event_time for p in sorted(predictions, key=lambda p: int(p.id.rsplit("/", 1)[1]))]
    assert times == sorted(times)
    truth = np.repeat(data.labels[:GARMENTS], FRAMES_EACH)
    answers = {int(p.id.rsplit("/", 1)[1]): p.index for p in predictions}
    right = np.mean([answers[i] == label for i, label in enumerate(truth)])
    assert right > 0.7  # nothing is lost on the way through video, JPEG and resizing
    pictures_drawn = sorted(drawn.iterdir())
    assert len(pictures_drawn) == 96
    with Image.open(pictures_drawn[0]) as first:
        assert first.size == (160, 112 + 18)


def test_a_producer_that_is_killed_goes_on_exactly_where_it_was(site: Site, topic: Topic, tmp_path: Path) -> None:
    video = make_video(tmp_path / "cam.mp4", frames=90, fps=30)
    environment = client_environment(site)
    arguments = ["produce", str(video), "--state", str(tmp_path / "state.sqlite")]
    with subprocess.Popen([sys.executable, "-m", "worker", *arguments], env=_full(environment)) as process:
        topic.read(site.kafka.topics.frames, lambda rs: len(rs) >= 40)
        process.kill()
    finished = run_cli(*arguments, **environment)
    assert finished.returncode == 0, finished.stderr
    records = topic.read(site.kafka.topics.frames, lambda rs: len(rs) >= 90)
    assert [dict(r.headers)["ce_id"].decode() for r in records] == [str(i) for i in range(90)]


def test_jpegs_and_paths_on_standard_input(site: Site, topic: Topic, tmp_path: Path) -> None:
    jpegs = [picture(n, format="JPEG") for n in range(3)]
    (tmp_path / "a.png").write_bytes(picture(7))
    inputs = {"pipe": b"".join(jpegs), "paths": f"{tmp_path / 'a.png'}\n".encode()}
    for stream, content in inputs.items():
        command = [sys.executable, "-m", "worker", "produce", "-", "--stream", stream, "--state", str(tmp_path / "s")]
        done = subprocess.run(command, input=content, capture_output=True, env=_full(client_environment(site)))
        assert done.returncode == 0, done.stderr
    records = topic.read(site.kafka.topics.frames, lambda rs: len(rs) >= 4)
    by_stream: dict[bytes, list[bytes]] = {}
    for record in records:
        by_stream.setdefault(record.key, []).append(record.value)
    assert by_stream == {b"pipe": jpegs, b"paths": [picture(7)]}


def test_watching_survives_what_is_no_prediction(site: Site, topic: Topic) -> None:
    good: dict[str, Any] = {
        "id": f"{site.kafka.topics.frames}/0/0",
        "stream": "cam\x1b[2J",
        "event_time": "2026-01-01T00:00:00Z",
        "index": 0,
        "label": "nut\x1b]0;x\x07\x9b2J",
        "confidence": 0.5,
        "top": [],
        "bundle": "b",
        "step": 0,
        "parameters": "source",
        "estimated_accuracy": 0.5,
        "worker": "w",
        "wait_seconds": 0,
        "pass_seconds": 0,
    }
    content = [json.dumps(good).encode(), b"{", b"\xff\xfe", json.dumps(good).encode()]
    last = json.dumps({**good, "id": "../../etc/passwd"}).encode()
    topic.send(site.kafka.topics.predictions, [(b"cam", value, []) for value in [*content, last]])
    options = ["--from-beginning", "--count", "2", "--draw", "drawn"]
    shown = run_cli("watch", *options, **client_environment(site))
    assert shown.returncode == 0, shown.stderr
    assert len(shown.stdout.splitlines()) == 2  # the repeated one once, the others not at all
    assert not {"\x1b", "\x9b"} & set(shown.stdout)
    as_json = run_cli("watch", "--json", *options[:3], **client_environment(site))
    assert json.loads(as_json.stdout.splitlines()[0])["label"] == good["label"]
    assert not {"\x1b", "\x9b"} & set(as_json.stdout)
    table = run_cli("watch", "--table", *options[:3], **client_environment(site))
    assert "cam\N{REPLACEMENT CHARACTER}" in table.stdout
    assert "confidence" in table.stdout  # a pipe has no edge at which to cut


def test_mistakes_are_named(site: Site, tmp_path: Path) -> None:
    environment = client_environment(site)
    cases = {
        ("-",): "standard input has no name of its own; give --stream NAME",
        ("rtsp://u:secret@cam/live",): "rtsp://cam/live has no name of its own",
        ("a", "b", "c", "--stream", "x", "--stream", "y"): "give it once, or once for each source",
        ("lavfi:testsrc", "--stream", "*"): "* means all streams in commands",
        ("nothing.mp4",): "nothing.mp4 is no file",
        ("lavfi:testsrc", "lavfi:testsrc", "--stream", "x"): "a camera never ends",
        ("a.mp4", "--size", "big"): "--size 'big' is not WIDTHxHEIGHT",
        ("a.mp4", "--bootstrap", "kafka:x"): "driftkeel: --bootstrap: 'kafka:x' is no host:port",
    }
    for arguments, message in cases.items():
        result = run_cli("produce", *arguments, "--state", str(tmp_path / "s"), **environment)
        assert result.returncode == 1
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


def _full(environment: dict[str, str]) -> dict[str, str]:
    return {**os.environ, **environment}
