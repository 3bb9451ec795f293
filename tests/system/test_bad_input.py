"""Whatever arrives, the worker lives on; what cannot be used is a dead letter with its reason, or a clear exit."""

import json
import socket
from pathlib import Path

import pytest

from schemas.bundle import Manifest
from schemas.config import Kafka
from tests.conftest import SHIPPED_BUNDLE, picture
from tests.system.conftest import Site, run_cli
from tests.worker.decode.test_image import animated, png_header
from tests.worker.kafka.test_batches import ZEROS, packing
from worker.embedded import free_port, start_store

HEADERS = [("origin", b"line 3")]
BAD = {
    "no_key": (None, picture()),
    "bad_key": (b"\xff\xfe", picture()),
    "empty": (b"cam", b""),
    "not_an_image": (b"cam", b"this is text"),
    "animated": (b"cam", animated("WEBP")),
    "damaged": (b"cam", picture(size=(64, 64))[:150]),
    "too_large": (b"cam", png_header(30_000, 28)),
}


def test_bad_records_become_dead_letters_and_no_good_frame_is_lost(site: Site) -> None:
    worker = site.start()
    records = []
    for key, value in BAD.values():
        records += [(b"cam", picture(len(records)), []), (key, value, HEADERS)]
    records += [(b"cam", None, HEADERS), (b"cam", animated("GIF"), HEADERS)]
    sent = site.topic.send(site.kafka.topics.frames, records)
    ids = [f"{m.topic}/{m.partition}/{m.offset}" for m in sent]
    good = [i for i, (_, _, headers) in zip(ids, records, strict=True) if not headers]
    bad = {i: r for i, r in zip(ids, records, strict=True) if r[2]}
    assert set(site.predictions(good)) == set(good)

    letters = site.topic.read(site.kafka.topics.dead_letters, lambda rs: len(rs) >= len(bad))
    assert len(letters) == len(bad)
    kinds = {}
    for letter in letters:
        headers = {name: value.decode() for name, value in letter.headers}
        origin = "/".join(headers[f"driftkeel-{part}"] for part in ("topic", "partition", "offset"))
        key, value, _ = bad[origin]
        assert (letter.key, letter.value or b"") == (key, value or b"")
        assert headers["origin"] == "line 3"
        assert headers["driftkeel-worker"] == "worker-1"
        assert len(headers["driftkeel-error-message"]) > 10
        kinds[origin] = headers["driftkeel-error-class"]
    expected = [*BAD, "empty", "not_an_image"]
    assert sorted(kinds.values()) == sorted(expected)
    metrics = worker.metrics()
    assert 'driftkeel_bad_frames_total{kind="empty"} 2.0' in metrics
    assert worker.process.poll() is None


def test_batches_that_cannot_be_read_are_passed_over(site: Site) -> None:
    worker = site.start()
    with packing(site.kafka) as pack:
        first = site.topic.send(site.kafka.topics.frames, [(b"cam", picture(1), [])])
        where = first[0].partition
        pack([picture(2), ZEROS], partition=where)
        pack([b"x" * 999], broken=True, partition=where)
        last = site.topic.send(site.kafka.topics.frames, [(b"cam", picture(3), [])])
    ids = [f"{m.topic}/{m.partition}/{m.offset}" for m in first + last]
    assert set(site.predictions(ids)) == set(ids)
    letters = site.topic.read(site.kafka.topics.dead_letters, lambda rs: len(rs) >= 2)
    headers = [dict(letter.headers) for letter in letters]
    assert [h["driftkeel-error-class"] for h in headers] == [b"unreadable"] * 2
    assert headers[0]["driftkeel-error-message"].startswith(f"offsets 1 to 2 of {first[0].topic}/{where} ".encode())
    assert headers[1]["driftkeel-offset"] == b"3"
    assert 'driftkeel_bad_frames_total{kind="unreadable"} 2.0' in worker.metrics()
    assert worker.process.poll() is None


def test_a_frame_over_the_limit_is_a_dead_letter(site: Site) -> None:
    site.start(frames={"max_bytes": 2_000})
    ids = site.send([("cam", picture(1)), ("cam", picture(2) + b"\0" * 5_000), ("cam", picture(3))])
    assert set(site.predictions([ids[0], ids[2]])) == {ids[0], ids[2]}
    (letter,) = site.topic.read(site.kafka.topics.dead_letters, lambda rs: len(rs) >= 1)
    assert dict(letter.headers)["driftkeel-error-class"] == b"too_large"
    assert len(letter.value) > 5_000


def test_odd_but_sound_images_are_predicted(site: Site) -> None:
    site.start()
    frames = [
        picture(0, mode="P"),
        picture(1, mode="CMYK", format="JPEG"),
        picture(2, mode="I;16"),
        picture(3, mode="LA"),
        picture(4, size=(640, 480), mode="RGB", format="JPEG"),
        picture(5, size=(1, 1)),
    ]
    ids = site.send([("cam", frame) for frame in frames])
    assert set(site.predictions(ids)) == set(ids)


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "worker.yaml"
    path.write_text(text)
    return str(path)


def kafka_yaml(settings: Kafka) -> str:
    topics = settings.topics
    return (
        f"kafka: {{bootstrap: '{settings.bootstrap}', connect_timeout_s: 2, topics: {{frames: {topics.frames}, "
        f"predictions: {topics.predictions}, updates: {topics.updates}, dead_letters: {topics.dead_letters}}}}}\n"
        "metrics: {port: 0}\n"
    )


def refused(*arguments: str) -> str:
    """The one line of a command that ends with code 1. Where the log is JSON, as a worker's is off a terminal, all
    lines are events, and it is the last one's message."""
    result = run_cli(*arguments)
    assert result.returncode == 1, result
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    if lines[-1].startswith("driftkeel: "):
        return lines[-1]
    return f"driftkeel: {[json.loads(line) for line in lines][-1]['message']}"


def test_unknown_key(tmp_path: Path) -> None:
    line = refused("worker", "--config", write(tmp_path, "batch: {max_bach: 3}"))
    assert "did you mean 'batch.max_batch'" in line


def test_unreachable_broker(tmp_path: Path, store_settings, tiny_bundle_path: Path) -> None:
    port = free_port()
    text = (
        f"kafka: {{bootstrap: '127.0.0.1:{port}', connect_timeout_s: 1}}\nmetrics: {{port: 0}}\n"
        f"store: {{url: '{store_settings.url.get_secret_value()}'}}\nbundle: {{path: '{tiny_bundle_path}'}}"
    )
    line = refused("worker", "--config", write(tmp_path, text))
    assert f"the broker at 127.0.0.1:{port} cannot be reached" in line


def test_unreachable_store(tmp_path: Path, kafka_settings, tiny_bundle_path: Path) -> None:
    port = free_port()
    text = kafka_yaml(kafka_settings) + (
        f"store: {{url: 'redis://:geheim@127.0.0.1:{port}/0', connect_timeout_s: 1}}\n"
        f"bundle: {{path: '{tiny_bundle_path}'}}"
    )
    line = refused("worker", "--config", write(tmp_path, text))
    assert f"the store at redis://:***@127.0.0.1:{port}/0 cannot be reached" in line
    assert line.count("the store at") == 1


@pytest.mark.parametrize("log", ["json", "text"])
def test_a_store_that_refuses_the_login(tmp_path: Path, kafka_settings, tiny_bundle_path: Path, log: str) -> None:
    server = start_store(tmp_path / "store", options=["--requirepass", "geheim"])
    text = kafka_yaml(kafka_settings) + (
        f"store: {{url: 'redis://:falsch@127.0.0.1:{server.port}/0', connect_timeout_s: 1}}\n"
        f"log: {{format: {log}}}\nbundle: {{path: '{tiny_bundle_path}'}}"
    )
    line = refused("worker", "--config", write(tmp_path, text))
    server.child.stop()
    assert line.startswith(f"driftkeel: the store at redis://:***@127.0.0.1:{server.port}/0 refuses the login: ")
    assert line.endswith("; correct user and password in store.url")


def test_missing_topic(tmp_path: Path, kafka_settings, store_settings, tiny_bundle_path: Path) -> None:
    text = kafka_yaml(kafka_settings).replace(kafka_settings.topics.updates, "no-such-topic")
    text += f"store: {{url: '{store_settings.url.get_secret_value()}'}}\nbundle: {{path: '{tiny_bundle_path}'}}"
    line = refused("worker", "--config", write(tmp_path, text))
    assert "has no topic no-such-topic; create it first" in line


def test_wrong_bundle(tmp_path: Path) -> None:
    line = refused("worker", "--config", write(tmp_path, f"bundle: {{path: '{tmp_path}'}}"))
    assert "no bundle at" in line


def test_taken_metrics_port(tmp_path: Path, tiny_bundle_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = f"metrics: {{port: {port}}}\nbundle: {{path: '{tiny_bundle_path}'}}"
        line = refused("worker", "--config", write(tmp_path, text))
    assert f"metrics.port {port} on 127.0.0.1 cannot be bound" in line


@pytest.mark.parametrize(
    "command", [["--help"], ["worker", "--help"], ["demo", "--help"], ["config"], ["meta", "--help"]]
)
def test_help_and_config_print(command: list[str]) -> None:
    result = run_cli(*command)
    assert result.returncode == 0
    assert len(result.stdout) > 100


def test_the_environment_may_name_the_configuration(tmp_path: Path) -> None:
    named = write(tmp_path, "kafka: {group: from-the-environment}")
    other = tmp_path / "other.yaml"
    other.write_text("kafka: {group: from-the-option}")
    assert "group: from-the-environment" in run_cli("config", DRIFTKEEL_CONFIG=named).stdout
    assert "group: from-the-option" in run_cli("config", "--config", str(other), DRIFTKEEL_CONFIG=named).stdout
    listed = run_cli("streams", "list", DRIFTKEEL_CONFIG=write(tmp_path, "kafka: {grup: x}"))
    assert "did you mean 'kafka.group'" in listed.stderr


def test_bundle_show_fits_a_screen(tiny_bundle_path: Path) -> None:
    result = run_cli("bundle", "show", str(SHIPPED_BUNDLE), COLUMNS="80")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert len(lines) <= 24
    assert lines[-1].startswith("sound: bundle ")
    for text in ("fashion-mnist", "groupnorm-cnn", "T-shirt", "generator.safetensors", "estimate", "raw_gradient_norm"):
        assert text in result.stdout
    whole = run_cli("bundle", "show", str(tiny_bundle_path), "--json")
    assert whole.returncode == 0
    assert "sound: bundle" in whole.stderr
    assert Manifest.model_validate_json(whole.stdout).name == "tiny"
