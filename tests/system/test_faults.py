"""Crashes, zombies, outages and rebalances: nothing lost, nothing folded twice."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kafka import KafkaProducer
from pydantic import SecretStr

from schemas.config import Batch, WorkerConfig
from schemas.state import decode_header
from tests.chaos.proxy import FlakyProxy
from tests.conftest import Topic, picture
from tests.servers import wait_for_end
from tests.system.conftest import Site, WorkerProcess, ids_by_stream, metric, running, turn_until
from worker.embedded import EmbeddedStore, free_port, start_store
from worker.store.store import StateStore

STREAMS = [f"cam-{i}" for i in range(6)]
FRAMES = [(STREAMS[i % 6], picture(i)) for i in range(300)]
DISK_S = 120.0  # for a store to write down what it has; a disk may be slow
COUNTS = dict.fromkeys(STREAMS, 50)


@pytest.fixture(autouse=True)
def deaths(request: pytest.FixtureRequest) -> None:
    if "site" in request.fixturenames:
        request.getfixturevalue("site").expect_deaths()


def folded(site: Site) -> int:
    return sum(header.frames for stream in STREAMS if (header := site.header(stream)))


def check_outcome(site: Site, frames: list[tuple[str, bytes]], ids: list[str]) -> None:
    predictions = site.predictions(ids)
    assert set(predictions) == set(ids)
    site.assert_folded_once(ids_by_stream(frames, ids))
    for found in predictions.values():
        # Predictions of one frame may repeat; under the same parameters they say the same.
        by_step = {(p.bundle, p.step): (p.index, round(p.confidence, 4)) for p in found}
        assert all(by_step[p.bundle, p.step] == (p.index, round(p.confidence, 4)) for p in found)


@pytest.mark.parametrize("threads", [1, 2], ids=["passes in the loop", "passes beside it"])
def test_killed_again_and_again(site: Site, threads: int) -> None:
    ids = site.send(FRAMES)
    for goal in (30, 90, 150, 210):
        worker = site.start(threads=threads)
        worker.wait_until(lambda goal=goal: folded(site) >= goal, f"{goal} frames folded")
        worker.kill()
    last = site.start(threads=threads)
    site.wait_folded(last, COUNTS)
    check_outcome(site, FRAMES, ids)
    # Every update event reached the topic, whichever worker died between the store and the topic.
    wanted = {f"{s}@{n + 1}" for s in STREAMS for n in range(site.header(s).events)}
    events = site.events(lambda es: wanted <= {e.id for e in es})
    assert {f for e in events for f in e.frames} == set(ids)


def test_a_zombie_cannot_write(site: Site) -> None:
    first = site.start()
    early = site.send(FRAMES[:60])
    site.wait_folded(first, dict.fromkeys(STREAMS, 10))
    first.signal(signal.SIGSTOP)
    second = site.start()
    late = site.send(FRAMES[60:])
    site.wait_folded(second, COUNTS)
    first.signal(signal.SIGCONT)
    more = site.send(FRAMES)
    site.wait_folded(second, dict.fromkeys(STREAMS, 100))
    check_outcome(site, FRAMES + FRAMES, early + late + more)
    assert first.stop() == 0
    assert second.stop() == 0


def test_workers_come_and_go(site: Site) -> None:
    first = site.start()
    ids = site.send(FRAMES[:120])
    site.wait_folded(first, dict.fromkeys(STREAMS, 20))
    second = site.start()
    second.wait_until(lambda: "assigned partitions" in second.log.read_text(), "an assignment")
    ids += site.send(FRAMES[120:])
    site.wait_folded(second, COUNTS)
    assert first.stop() == 0
    ids += site.send(FRAMES)
    site.wait_folded(second, dict.fromkeys(STREAMS, 100))
    check_outcome(site, FRAMES + FRAMES, ids)


def test_store_restart(site: Site, tmp_path: Path) -> None:
    store = start_store(tmp_path / "data")
    url = store.url
    site.store = site.store.model_copy(update={"url": type(site.store.url)(url)})
    worker = site.start(store={"url": url, "prefix": site.store.prefix})
    ids = site.send(FRAMES[:60])
    site.wait_folded(worker, dict.fromkeys(STREAMS, 10))
    store.child.stop(DISK_S)
    ids += site.send(FRAMES[60:])
    worker.wait_until(lambda: "does not answer" in worker.log.read_text(), "noticing the outage")
    assert "driftkeel_store_errors_total 0.0" not in worker.metrics()
    again = start_store(tmp_path / "data", port=store.port)
    site.wait_folded(worker, COUNTS)
    assert "answers again" in worker.log.read_text()
    check_outcome(site, FRAMES, ids)
    assert worker.stop() == 0
    again.child.stop()


def test_stop_during_a_store_outage(site: Site, tmp_path: Path) -> None:
    store = start_store(tmp_path / "data")
    worker = site.start(store={"url": store.url, "prefix": site.store.prefix})
    worker.wait_until(lambda: "assigned partitions" in worker.log.read_text(), "the assignment")
    worker.wait_until(worker.ready, "readiness")
    store.child.stop()
    worker.wait_until(lambda: not worker.ready(), "noticing the outage without a frame")
    site.send(FRAMES[:30])
    worker.wait_until(lambda: "does not answer" in worker.log.read_text(), "noticing the outage")
    assert worker.stop() == 0


def test_embedded_servers_die_with_their_parent(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from worker.embedded import start_broker, start_store\n"
        "b, s = start_broker(), start_store(pathlib.Path(sys.argv[1]))\n"
        "print(b.child.process.pid, s.child.process.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.kill()
    parent.communicate()
    wait_for_end(children)


def test_a_stream_in_two_partitions_of_two_workers(site: Site) -> None:
    """It moved while frames of it wait in its old partition: both workers fold, in turns, each frame once."""
    workers = [site.start(), site.start()]
    for worker in workers:
        worker.wait_until(lambda w=worker: _has_partitions(w), "an assignment to each")
    producer = KafkaProducer(bootstrap_servers=site.kafka.bootstrap, batch_size=0)
    futures = [
        producer.send(site.kafka.topics.frames, key=b"cam", value=picture(i), partition=i % 3) for i in range(120)
    ]
    ids = [f"{m.topic}/{m.partition}/{m.offset}" for m in (future.get(120) for future in futures)]
    producer.close()
    workers[0].wait_until(lambda: (h := site.header("cam")) is not None and h.frames >= 120, "folding")
    assert set(site.predictions(ids)) == set(ids)
    header = site.header("cam")
    assert header is not None
    assert header.frames == 120
    assert sum(offset + 1 for offset in header.positions.values()) == 120
    events = site.events(lambda es: len({f for e in es for f in e.frames}) == 120)
    folded = [f for e in {e.id: e for e in events}.values() for f in e.frames]
    assert sorted(folded) == sorted(ids)
    for worker in workers:
        assert worker.stop() == 0


@pytest.mark.parametrize("held_by", ["min_adapt", "write_interval_ms"])
def test_who_was_refused_holds_nothing_back_the_next_time(
    config: WorkerConfig, store: StateStore, topic: Topic, held_by: str
) -> None:
    """Two workers that have frames of one stream and hold them back would refuse each other for ever."""
    few = held_by == "min_adapt"
    batch = Batch(max_batch=8, max_wait_ms=10, min_adapt=8 if few else 1, max_hold_ms=2_000)
    slow = config.store.model_copy(update={"write_interval_ms": 0 if few else 2_000})
    with running(config.model_copy(update={"batch": batch, "store": slow})) as worker:
        topic.send(config.kafka.topics.frames, [(b"cam", picture(i), []) for i in range(2)])
        turn_until(worker, lambda: "cam" in worker._streams.engine)
        store.claim(["cam"], "another")
        turn_until(worker, lambda: metric(worker, "fenced_writes_total") == 1)
        worker._batcher._hold = worker._pending._interval = 1e9
        turn_until(worker, lambda: bool((header := store.read("cam").header) and decode_header(header).frames == 2))


def _has_partitions(worker: WorkerProcess) -> bool:
    lines = [line for line in worker.log.read_text().splitlines() if "assigned partitions" in line]
    return bool(lines) and not lines[-1].endswith("none")


def test_a_rebalance_while_the_store_is_away(site: Site, store_url: str) -> None:
    """Records in hand when their partition goes must not be used when the store answers again."""
    proxy = FlakyProxy(int(store_url.rsplit(":", 1)[1].split("/")[0]), free_port())
    behind = {"url": f"redis://127.0.0.1:{proxy.port}/0", "prefix": site.store.prefix}
    first = site.start(store=behind)
    ids = site.send(FRAMES[:60])
    site.wait_folded(first, dict.fromkeys(STREAMS, 10))
    proxy.down(True)
    # New streams, which must be claimed, so that records in hand wait for the store; then known ones.
    frames = [(f"new-{i % 6}", picture(i)) for i in range(120)] + FRAMES[60:]
    first.signal(signal.SIGSTOP)
    time.sleep(0.2)  # its fetch on the way ends empty, so that the next one brings frames of every partition
    ids += site.send(frames)
    first.signal(signal.SIGCONT)
    first.wait_until(lambda: "does not answer" in first.log.read_text(), "noticing the outage")
    second = site.start(store=behind | {"url": store_url})
    second.wait_until(lambda: _has_partitions(second), "an assignment")
    proxy.down(False)
    site.wait_folded(second, COUNTS | {f"new-{i}": 20 for i in range(6)})
    check_outcome(site, FRAMES[:60] + frames, ids)
    assert first.stop() == 0
    assert second.stop() == 0
    proxy.close()


def backup_of(site: Site, folder: Path) -> EmbeddedStore:
    """A store of the test's own, for the site to use."""
    store = start_store(folder)
    site.store = site.store.model_copy(update={"url": SecretStr(store.url)})
    site.config["store"]["url"] = store.url
    return store


@pytest.mark.parametrize("while_running", [False, True])
def test_a_store_that_fell_behind_is_brought_up_to_date(site: Site, tmp_path: Path, while_running: bool) -> None:
    """Kafka has offsets committed that the store knows nothing of: a crash lost its last writes, or it is a backup."""
    store = backup_of(site, tmp_path / "data")
    worker = site.start()
    ids = site.send(FRAMES[:120])
    site.wait_folded(worker, dict.fromkeys(STREAMS, 20))
    worker.wait_until(lambda: site.committed() == 120, "the commit")
    store.child.stop(DISK_S)
    shutil.copytree(tmp_path / "data", tmp_path / "backup")
    store = start_store(tmp_path / "data", port=store.port)
    ids += site.send(FRAMES[120:240])
    site.wait_folded(worker, dict.fromkeys(STREAMS, 40))
    worker.wait_until(lambda: site.committed() == 240, "the commit")
    if not while_running:
        assert worker.stop() == 0
    store.child.stop(0)
    store = start_store(tmp_path / "backup", port=store.port)
    assert {h.frames for s in STREAMS if (h := site.header(s))} == {20}
    if not while_running:
        worker = site.start()
    # Half of the streams have no new frames: what the store lost of these is folded again all the same.
    busy = [(stream, image) for stream, image in FRAMES[240:] if stream in STREAMS[:3]]
    ids += site.send(busy)
    site.wait_folded(worker, dict.fromkeys(STREAMS[:3], 50))
    worker.wait_until(lambda: site.committed() == 270, "the commit")
    worker.kill()
    last = site.start()
    idle = [(stream, image) for stream, image in FRAMES[240:] if stream in STREAMS[3:]]
    ids += site.send(idle)
    site.wait_folded(last, COUNTS)
    assert set(site.predictions(ids)) == set(ids)
    site.assert_folded_once(ids_by_stream(FRAMES[:240] + busy + idle, ids))
    assert last.stop() == 0
    store.child.stop()


@pytest.mark.parametrize("while_running", [False, True])
def test_an_empty_store_is_noticed(site: Site, tmp_path: Path, while_running: bool) -> None:
    store = backup_of(site, tmp_path / "data")
    worker = site.start()
    partitions = {frame.split("/")[1] for frame in site.send(FRAMES[:60])}
    site.wait_folded(worker, dict.fromkeys(STREAMS, 10))
    worker.wait_until(lambda: site.committed() == 60, "the commit")
    assert "driftkeel_forgotten_partitions_total 0.0" in worker.metrics()
    if not while_running:
        assert worker.stop() == 0
    store.child.stop()
    store = start_store(tmp_path / "empty", port=store.port)
    if not while_running:
        worker = site.start()
    site.send(FRAMES[60:120])
    site.wait_folded(worker, dict.fromkeys(STREAMS, 10))
    assert "the store knows nothing of it" in worker.log.read_text()
    assert f"driftkeel_forgotten_partitions_total {len(partitions)}.0" in worker.metrics()
    assert worker.stop() == 0
    store.child.stop()


def test_what_is_too_late_is_dropped_where_that_is_asked_for(site: Site) -> None:
    """A worker that was away goes on with what is new, and never comes back to the rest."""
    old = site.topic.send(site.kafka.topics.frames, [(b"cam", picture(i), []) for i in range(20)], 1_700_000_000_000)
    batch = site.config["batch"] | {"latency_budget_ms": 600_000, "drop_late": True}
    worker = site.start(batch=batch)
    ids = site.send([("cam", picture(i)) for i in range(8)])
    assert set(site.predictions(ids)) == set(ids)
    site.wait_folded(worker, {"cam": 8})
    site.assert_folded_once({"cam": ids})
    assert "driftkeel_frames_dropped_total 20.0" in worker.metrics()
    assert worker.stop() == 0
    assert site.committed() == len(old) + 8
