"""Groups whose members come, go and return while frames flow, on a broker that has them as Kafka has."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Iterator

import pytest
from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient, NewPartitions

from schemas.config import WorkerConfig
from schemas.state import decode_header
from tests.broker.process import bootstrap as bootstrap  # a fixture
from tests.conftest import picture
from tests.system.conftest import MakeWorker, Site, WorkerProcess, turn_until
from worker.store.store import StateStore

STREAMS = [f"cam-{i}" for i in range(6)]
PARTITIONS = 3


class Sender:
    """Frames of all streams, each to the partition of its number, until told to stop."""

    def __init__(self, site: Site) -> None:
        self._site, self._stop = site, threading.Event()
        self.ids: dict[str, list[str]] = {stream: [] for stream in STREAMS}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        producer = KafkaProducer(bootstrap_servers=self._site.kafka.bootstrap, batch_size=0)
        sent = []
        for index in itertools.count():
            if self._stop.wait(0.01):
                break
            stream = index % len(STREAMS)
            where = {"key": STREAMS[stream].encode(), "partition": stream % PARTITIONS}
            sent.append((STREAMS[stream], producer.send(self._site.kafka.topics.frames, value=picture(index), **where)))
        for name, future in sent:
            found = future.get(120)
            self.ids[name].append(f"{found.topic}/{found.partition}/{found.offset}")
        producer.close()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@contextlib.contextmanager
def frames_all_the_while(site: Site) -> Iterator[None]:
    """Nothing of what is sent meanwhile may be lost or folded twice."""
    sender = Sender(site)
    yield
    sender.stop()
    living = next(worker for worker in site.running if worker.process.poll() is None)
    site.wait_folded(living, {stream: len(ids) for stream, ids in sender.ids.items()})
    ids = [frame for frames in sender.ids.values() for frame in frames]
    assert set(site.predictions(ids)) == set(ids)
    site.assert_folded_once(sender.ids)


def assignments(worker: WorkerProcess) -> list[list[int]]:
    """What the log says of partitions assigned, one after the other."""
    lines = [
        line.split("assigned partitions: ")[1] for line in worker.log.read_text().splitlines() if "assigned" in line
    ]
    return [[] if line == "none" else json.loads(line) for line in lines]


def given(worker: WorkerProcess) -> set[int]:
    """All partitions that a worker was ever given."""
    return set(itertools.chain(*assignments(worker)))


def test_cooperative_rebalancing_moves_only_what_must_move(site: Site) -> None:
    site.config["kafka"]["assignment"] = "cooperative-sticky"
    first = site.start()
    first.wait_until(lambda: given(first) == {0, 1, 2}, "all partitions")
    with frames_all_the_while(site):
        site.wait_folded(first, dict.fromkeys(STREAMS, 5))
        second = site.start()
        second.wait_until(lambda: bool(given(second)), "a partition")
        moved = given(second)
        assert len(moved) == 1
        # What stays is not assigned again, and nothing comes back to the first while the second lives.
        assert list(itertools.chain(*assignments(first))) == [0, 1, 2]
        before = {stream: header.frames for stream in STREAMS if (header := site.header(stream))}
        site.wait_folded(second, {stream: count + 5 for stream, count in before.items()})
        assert second.stop() == 0
        first.wait_until(lambda: list(itertools.chain(*assignments(first))) == [0, 1, 2, *moved], "them back")
    assert first.stop() == 0


def test_a_killed_worker_is_replaced_after_its_session(site: Site) -> None:
    site.expect_deaths()
    first, second = site.start(), site.start()
    for worker in (first, second):
        worker.wait_until(lambda w=worker: bool(given(w)), "a partition")
    with frames_all_the_while(site):
        site.wait_folded(first, dict.fromkeys(STREAMS, 5))
        second.kill()
        first.wait_until(lambda: assignments(first)[-1] == [0, 1, 2], "all partitions")
    assert first.stop() == 0


def test_a_static_member_returns_without_a_rebalance(site: Site) -> None:
    # Longer than a worker takes to start again, on any machine.
    kafka = site.config["kafka"] | {"session_timeout_ms": 60_000}
    named = [site.start(kafka=kafka | {"static_member": name}) for name in ("a", "b")]
    for worker in named:
        worker.wait_until(lambda w=worker: bool(given(w)), "a partition")
    named[0].wait_until(lambda: sum(len(assignments(w)[-1]) for w in named) == PARTITIONS, "shared partitions")
    stays, leaves = named
    seen, own = len(assignments(stays)), assignments(leaves)[-1]
    with frames_all_the_while(site):
        site.wait_folded(stays, dict.fromkeys(STREAMS, 5))
        assert leaves.stop() == 0
        back = site.start(kafka=kafka | {"static_member": "b"})
        back.wait_until(lambda: given(back) == set(own), "its partitions")
    assert len(assignments(stays)) == seen
    for worker in (back, stays):
        assert worker.stop() == 0


@pytest.mark.parametrize("idle", [False, True])
def test_who_has_lost_its_name_to_another_ends_and_says_so(site: Site, idle: bool) -> None:
    kafka = site.config["kafka"] | {"static_member": "hall-1"}
    first = site.start(kafka=kafka)
    first.wait_until(lambda: bool(given(first)), "all partitions")
    with contextlib.nullcontext() if idle else frames_all_the_while(site):
        site.wait_folded(first, {} if idle else dict.fromkeys(STREAMS, 5))
        second = site.start(kafka=kafka)
        second.wait_until(lambda: bool(given(second)), "the place of the first")
        assert first.process.wait(120) == 1
    assert "has the place of this one; give each a name of its own" in first.log.read_text().splitlines()[-1]
    assert "kafka.static_member hall-1" in first.log.read_text()
    assert second.stop() == 0


def test_partitions_that_are_added_are_read_from_their_first_frame_and_states_go_on(
    config: WorkerConfig, make_worker: MakeWorker, store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.consume.group.METADATA_MAX_AGE_MS", 200)
    frames = config.kafka.topics.frames
    worker = make_worker(config)

    def send(partition: int) -> None:
        producer = KafkaProducer(bootstrap_servers=config.kafka.bootstrap)
        sent = [
            producer.send(frames, key=b"cam", value=picture(10 * partition + i), partition=partition) for i in range(5)
        ]
        assert [future.get(120).offset for future in sent] == list(range(5))
        producer.close()

    def positions() -> dict[str, int]:
        header = store.read("cam").header
        return decode_header(header).positions if header else {}

    send(0)
    turn_until(worker, lambda: positions() == {f"{frames}/0": 4})
    admin = KafkaAdminClient(bootstrap_servers=config.kafka.bootstrap)
    admin.create_partitions({frames: NewPartitions(4)})
    admin.close()
    send(3)  # long before any worker knows of it
    turn_until(worker, lambda: positions() == {f"{frames}/0": 4, f"{frames}/3": 4})
    assert decode_header(store.read("cam").header or b"").frames == 10
