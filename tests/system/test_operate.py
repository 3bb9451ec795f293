"""Operators change streams while a worker runs; the doctor says what is wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import redis
import yaml

from schemas.config import Bundle, Kafka, Store, WorkerConfig
from schemas.state import StreamHeader, encode_header
from schemas.update import seal
from tests.broker.process import start_own_broker
from tests.cluster import Cluster, told
from tests.conftest import picture
from tests.system.conftest import Site, run_cli
from worker.embedded import free_port, start_store
from worker.site.doctor import examine, replication
from worker.store.store import StateStore, Write

pytestmark = pytest.mark.usefixtures("full_batches")


def streams(config: str, *arguments: str) -> str:
    result = run_cli("streams", arguments[0], "--config", config, *arguments[1:])
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_delete_while_a_worker_runs(site: Site, site_file: str) -> None:
    worker = site.start()
    site.feed(worker, "cam", 24)
    worker.wait_until(lambda: site.committed() == 24, "the commit")  # What is not yet, begins the stream anew.
    result = run_cli("streams", "delete", "cam", "--config", site_file)  # nobody there to answer
    assert result.returncode == 1
    assert "last with worker-1" in result.stdout
    assert "nothing was deleted: nobody can be asked here; give -y to delete without asking" in result.stderr
    assert site.header("cam").frames == 24
    (listed,) = json.loads(streams(site_file, "list", "--json"))
    shown = json.loads(streams(site_file, "show", "cam", "--json"))
    assert len(shown["snapshots"]) == listed.pop("snapshots")
    assert {name: shown[name] for name in listed} == listed
    assert listed["header"]["frames"] == 24
    result = run_cli("streams", "delete", "cam", "typo", "--yes", "--config", site_file)
    assert result.returncode == 1
    assert "'typo' has no stored state" in result.stderr
    assert site.header("cam").frames == 24

    assert "deleted: 1" in streams(site_file, "delete", "cam", "--yes", "--reason", "line 3 is gone")
    assert "cam" not in streams(site_file, "list")
    assert "deleted before" in streams(site_file, "delete", "cam", "--yes")  # had the event been lost on its way
    verified = run_cli("audit", "verify", "--config", site_file, "--store", "--complete")
    assert "sound: 1 stream, 4 events" in verified.stdout, verified.stdout
    # Should it send again after all, it begins anew, under the same worker.
    ids = site.feed(worker, "cam", 8)
    assert site.header("cam").step == 1
    assert {site.predictions(ids)[i][-1].step for i in ids} == {0}
    events = {event.number: event for event in site.events(lambda es: any(e.number == 5 for e in es))}
    assert [events[n].decision for n in (3, 4, 5)] == ["applied", "deleted", "applied"]
    assert (events[4].reason, events[4].previous) == ("line 3 is gone", seal(events[3]).digest)
    verified = run_cli("audit", "verify", "--config", site_file, "--complete")
    assert "sound: 1 stream, 5 events" in verified.stdout, verified.stdout


def put(store: Store, **frames: int) -> None:
    """Streams of so many frames; `damaged` has a header of a version that nobody here reads."""
    opened = StateStore(store)
    for claimed, (name, count) in zip(opened.claim(list(frames), "worker-1"), frames.items(), strict=True):
        header = encode_header(StreamHeader(stream=name, bundle="b", method="mgg", frames=count))
        header = header.replace(b'"version":1', b'"version":2') if name == "damaged" else header
        assert opened.write([Write(name, claimed.token, 1, header, b"", b"" if name == "expired" else b"t")]) == [True]
    opened.close()


def test_delete_what_a_sender_has_made_up(site: Site, site_file: str) -> None:
    """No name that it makes up leads to another stream, and what cannot be read is not taken for empty."""
    put(site.store, **{"cam-1": 500_000, "cam-1 0": 1, "--yes": 0, "-c\n": 1, "begun": 2}, damaged=0)
    asked = run_cli("streams", "delete", "--frames-at-most", "1", "--config", site_file)  # nobody there to answer
    assert asked.returncode == 1
    assert re.findall(r"(?m)^(.*): 1 bytes", asked.stdout) == ["--yes", "-c\N{REPLACEMENT CHARACTER}", "cam-1 0"]
    assert "Delete 3 streams for good?" in asked.stdout
    assert streams(site_file, "list").count("\n") == 7

    assert "deleted: 3" in streams(site_file, "delete", "--frames-at-most", "1", "--yes")
    left = StateStore(site.store)
    assert set(left.streams()) == {"cam-1", "begun", "damaged"}
    left.close()
    assert streams(site_file, "delete", "--frames-at-most", "1") == "deleted: 0\n"


def test_a_camera_that_begins_while_somebody_is_asked_is_not_deleted(site: Site, site_file: str) -> None:
    put(site.store, new=1, stray=1)
    command = [sys.executable, "-m", "worker", "streams", "delete", "--frames-at-most", "1", "--config", site_file]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdin is not None
        assert asking.stdout is not None
        while asking.stdout.read(1) != "?":
            pass
        put(site.store, new=16)
        asking.stdin.write("y\n")
        asking.stdin.close()
        assert "deleted: 1" in asking.stdout.read()
    assert site.header("new").frames == 16


def test_streams_whose_names_begin_with_a_dash(site: Site, site_file: str) -> None:
    put(site.store, **{"--yes": 3, "-7": 3, "cam": 3})
    assert json.loads(streams(site_file, "show", "--json", "--", "-7"))["stream"] == "-7"
    assert "deleted: 2" in streams(site_file, "delete", "--yes", "--", "-7", "--yes")
    verified = streams(site_file, "list")
    assert "cam" in verified
    assert "-7" not in verified


@pytest.mark.parametrize("arguments", [["delete"], ["delete", "cam", "--frames-at-most", "1"]])
def test_delete_takes_names_or_a_number_of_frames(arguments: list[str]) -> None:
    result = run_cli("streams", *arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert "name the streams to delete, or give --frames-at-most instead of names" in result.stderr


def test_reset_and_rollback_while_a_worker_runs(site: Site, site_file: str) -> None:
    worker = site.start()
    ids = site.feed(worker, "cam", 40)
    assert site.header("cam").step == 5
    assert re.search(r"cam +40 +5 +\d+ ok +worker-1", streams(site_file, "list"))
    shown = streams(site_file, "show", "cam")
    assert re.search(r"updates +5 applied, 40 frames and 5 events so far", shown)
    assert re.search(r" 1 +4 +20.*%.*\n +2 +2 +20.*% .*2 updates since the last", shown)
    whole = json.loads(streams(site_file, "show", "cam", "--json"))
    assert (whole["condition"], whole["owner"], whole["header"]["step"]) == ("ok", "worker-1", 5)
    assert [kept["header"]["step"] for kept in whole["snapshots"]] == [4, 2]

    assert "rolled_back, now at step 2" in streams(site_file, "rollback", "cam", "2", "--reason", "looked odd")
    ids += site.feed(worker, "cam", 8)
    assert site.header("cam").step == 3
    assert "reset, now at step 0" in streams(site_file, "reset", "cam")
    ids += site.feed(worker, "cam", 8)
    assert site.header("cam").step == 1
    site.assert_folded_once({"cam": ids})
    # The worker noticed at its next write, and answered those frames again under what it then read.
    predictions = site.predictions(ids)
    assert {predictions[i][-1].step for i in ids[-8:]} == {0}

    # Both are in the audit trail, in order, without a gap.
    events = site.events(lambda es: {f for e in es for f in e.frames} >= set(ids))
    numbers = {int(e.id.split("@")[1]): e for e in events}
    assert sorted(numbers) == list(range(1, max(numbers) + 1))
    operators = [numbers[n] for n in sorted(numbers) if numbers[n].decision in ("rolled_back", "reset")]
    assert [(e.decision, e.step, e.reason) for e in operators] == [
        ("rolled_back", 2, operators[0].reason),
        ("reset", 0, "reset by hand"),
    ]
    assert re.fullmatch(r"to snapshot 2, step 2, .* UTC; looked odd", operators[0].reason)
    assert operators[0].layers
    assert operators[0].source_distance > operators[1].source_distance == 0
    # And each is the next link of the stream's chain.
    for number in range(2, max(numbers) + 1):
        assert numbers[number].previous == seal(numbers[number - 1]).digest


def test_export_and_import(site: Site, site_file: str, tmp_path: Path) -> None:
    worker = site.start()
    site.feed(worker, "cam", 24)
    assert worker.stop() == 0
    file = tmp_path / "cam.safetensors"
    streams(site_file, "export", "cam", "--output", str(file))
    assert "imported, now at step 3" in streams(site_file, "import", "twin", "--input", str(file))
    second = site.start()
    ids = site.send([("twin", picture(i)) for i in range(8)])
    predictions = site.predictions(ids)
    assert {predictions[i][0].step for i in ids} == {3}
    site.wait_folded(second, {"twin": 8})


MISTAKES: list[tuple[list[str], str]] = [
    (["reset", "nobody"], "stream 'nobody' has no stored state"),
    (["show", "nobody"], "stream 'nobody' has no stored state"),
    (["export", "cam", "--output", "/nowhere/file"], "/nowhere/file cannot be written"),
    (["rollback", "cam", "9"], "stream 'cam' has no snapshots yet; 'reset' leads back to the source model"),
    (["import", "cam", "--input", "FILE"], "the file is none that 'driftkeel streams export' wrote"),
]


def test_mistakes_change_nothing(site: Site, site_file: str, tmp_path: Path) -> None:
    worker = site.start(store={**site.config["store"], "snapshot_every": 0})
    site.feed(worker, "cam", 8)
    before = site.header("cam")
    junk = tmp_path / "junk"
    junk.write_bytes(b"\x80\x04junk")
    for words, message in MISTAKES:
        arguments = [str(junk) if word == "FILE" else word for word in words]
        result = run_cli("streams", arguments[0], "--config", site_file, *arguments[1:])
        assert (result.returncode, message in result.stderr) == (1, True), (words, result.stderr)
        assert "Traceback" not in result.stderr
        assert site.header("cam") == before, words


def test_expired_states_restart_from_source_and_say_so(site: Site, site_file: str, client: redis.Redis) -> None:
    first = site.start()
    ids = site.feed(first, "cam", 16)
    assert first.stop() == 0
    client.delete(StateStore(site.store).keys("cam")[1])
    assert re.search(r"cam +16 +2 +0 expired +worker-1", streams(site_file, "list"))
    second = site.start()
    ids += site.feed(second, "cam", 16)
    site.assert_folded_once({"cam": ids})
    events = site.events(lambda es: any(e.decision == "reset" for e in es))
    assert "expired" in next(e.reason for e in events if e.decision == "reset")


def test_doctor_finds_nothing_wrong(site_file: str) -> None:
    result = run_cli("doctor", "--config", site_file)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "failed" not in result.stdout
    assert "3 partitions" in result.stdout


def test_doctor_says_what_is_wrong(site: Site, tmp_path: Path) -> None:
    port = free_port()
    content = dict(site.config)
    content["store"] = {"url": f"redis://127.0.0.1:{port}/0"}
    content["bundle"] = {"path": str(tmp_path)}
    content["kafka"] = {**content["kafka"], "topics": {**content["kafka"]["topics"], "updates": "nowhere"}}
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump(content))
    result = run_cli("doctor", "--config", str(path))
    assert result.returncode == 1
    for text in ("no bundle at", f"127.0.0.1:{port}", "topic nowhere is missing"):
        assert text in result.stdout


def test_doctor_says_how_to_reach_what_does_not_answer(tiny_bundle_path: Path) -> None:
    port = free_port()
    away = {"DRIFTKEEL__KAFKA__BOOTSTRAP": f"127.0.0.1:{port}", "DRIFTKEEL__STORE__URL": f"redis://127.0.0.1:{port}/0"}
    result = run_cli("doctor", DRIFTKEEL__BUNDLE__PATH=str(tiny_bundle_path), **away)
    assert result.returncode == 1
    assert "start the store, or correct store.url" in result.stdout
    assert f"the broker at 127.0.0.1:{port} cannot be reached: Unable to bootstrap" in result.stdout
    assert "start the broker, or correct kafka.bootstrap" in result.stdout
    assert ".;" not in result.stdout
    assert result.stdout.count("'driftkeel local' starts both for a first try") == 2
    listed = run_cli("streams", "list", DRIFTKEEL__BUNDLE__PATH=str(tiny_bundle_path), **away)
    assert (listed.returncode, listed.stdout) == (1, "")


def test_doctor_says_whose_password_is_wrong(tiny_bundle_path: Path, tmp_path: Path) -> None:
    broker = start_own_broker(users={"worker": "right"})
    store = start_store(tmp_path, options=["--requirepass", "right"])
    login = Kafka(
        bootstrap=broker.bootstrap,
        security_protocol="SASL_PLAINTEXT",
        sasl_mechanism="PLAIN",
        sasl_username="worker",
        sasl_password="wrong",
    )
    url = f"redis://:wrong@127.0.0.1:{store.port}/0"
    bundle = Bundle(path=tiny_bundle_path)
    said = [found.text for found in examine(WorkerConfig(kafka=login, store=Store(url=url), bundle=bundle))]
    broker.child.stop(0)
    store.child.stop()
    (refused,) = [text for text in said if "Invalid username or password" in text]
    assert refused.endswith("; correct kafka.sasl_mechanism, sasl_username and sasl_password")
    (refused,) = [text for text in said if "refuses the login" in text]
    assert refused.endswith("; correct user and password in store.url")


def test_doctor_sees_a_store_that_is_nearly_full(kafka_settings: Kafka, tiny_bundle_path: Path, tmp_path: Path) -> None:
    store = start_store(tmp_path)
    client = redis.Redis(port=store.port, socket_timeout=120)
    config = WorkerConfig(kafka=kafka_settings, store=Store(url=store.url), bundle=Bundle(path=tiny_bundle_path))

    def warnings() -> list[str]:
        return [found.text for found in examine(config) if (found.subject, found.level) == ("store", "warning")]

    assert warnings() == []  # no limit
    for i in range(60):  # one of 60 MiB would be counted twice while the server still has what was received
        client.set(f"junk-{i}", bytes(1 << 20))
    memory = client.info("memory")
    used = int(memory["used_memory"]) - int(memory["mem_not_counted_for_evict"])
    client.config_set("maxmemory", used + (40 << 20))
    assert warnings() == []
    client.config_set("maxmemory", used + (4 << 20))
    (warning,) = warnings()
    assert re.match(r"\d\d of \d\d MiB are used \(maxmemory\)", warning)
    # A full one takes the claim of the stream that is tried, and refuses to write it. Nothing stays of it.
    client.config_set("maxmemory", used // 2)
    failed = [found.text for found in examine(config) if (found.subject, found.level) == ("store", "failed")]
    assert len(failed) == 1
    assert "command not allowed when used memory > 'maxmemory'" in failed[0]
    assert [key for key in client.scan_iter() if not key.startswith(b"junk-")] == []
    client.close()
    store.child.stop()


def test_doctor_sees_topics_that_one_broker_alone_keeps(tiny_bundle_path: Path, store_url: str) -> None:
    cluster = Cluster()
    config = WorkerConfig(
        kafka=Kafka(bootstrap=cluster.bootstrap), store=Store(url=store_url), bundle=Bundle(path=tiny_bundle_path)
    )
    for topic in config.kafka.topics.model_dump().values():
        cluster.create(topic, 3, copies=1 if topic == "updates" else 3)
    with told():
        found = [one.text for one in examine(config) if (one.subject, one.level) == ("broker", "warning")]
    cluster.close()
    (once,) = [text for text in found if "kept once" in text]
    assert once.startswith("topic updates is kept once")


def test_doctor_sees_partitions_that_nobody_leads() -> None:
    parts = [{"partition_index": i, "leader_id": leader, "replica_nodes": [1, 2]} for i, leader in enumerate([1, -1])]
    (found,) = replication([{"name": "frames", "partitions": parts}])
    assert (found.level, found.text.split(",")[0]) == ("failed", "topic frames: nobody leads partitions [1]")
    one = [{"partition_index": 0, "leader_id": 1, "replica_nodes": [1]}]
    assert list(replication([{"name": "frames", "partitions": one}])) == []  # a single broker keeps all once


def test_there_is_no_snapshot_number_0() -> None:
    result = run_cli("streams", "rollback", "cam", "0")
    assert result.returncode == 2
    assert "greater than or equal to 1" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_wrong_value_is_named_by_its_option() -> None:
    for option, value, text in (
        ("--quiet-hours", "25:00-06:00", "'25:00-06:00' is not a span such as 22:00-06:00"),
        (
            "--quiet-hours",
            "10:00-10:00",
            "'10:00-10:00' ends where it begins; for the whole day write 00:00-12:00 and 12:00-00:00",
        ),
        ("--canary-share", "3", "Input should be less than or equal to 1"),
    ):
        result = run_cli("command", "policy", "cam", option, value)
        assert (result.returncode, result.stderr) == (1, f"driftkeel: {option}: {text}\n")
