"""`python -m tests.scale --report docs/results/scale.json`: real broker, store and worker processes on loopback."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from kafka import KafkaProducer

from schemas.config import Kafka, Store, Topics
from tests.broker.process import broker_for
from tests.conftest import SHIPPED_BUNDLE, Topic, picture
from tests.system.conftest import Site, WorkerProcess
from worker.embedded import start_store
from worker.kafka.client import create_topics

PARTITIONS = 4
STREAMS = [f"cam-{i}" for i in range(12)]
PICTURES = [picture(i) for i in range(1_009)]  # each stream's differ: the guard lets repeated ones teach nothing
SESSION_S = 6.0
FRAMES_PER_SECOND = 120
STEADY_FRAMES = 32
BROKER_HELP = "own (tests/broker), embedded, or the address of a real one"


@contextlib.contextmanager
def a_site(broker: str) -> Iterator[Site]:
    """Store and topics of their own; workers run one thread each, the default micro-batches, JSON logs."""
    with tempfile.TemporaryDirectory(prefix="driftkeel-scale-") as scratch, broker_for(broker) as bootstrap:
        store = start_store(Path(scratch) / "store")
        tag = uuid.uuid4().hex[:8]
        kafka = Kafka(
            bootstrap=bootstrap,
            group=f"scale-{tag}",
            topics=Topics(**{name: f"{name}-{tag}" for name in Topics.model_fields}),
            session_timeout_ms=int(SESSION_S * 1000),
            heartbeat_interval_ms=500,
            fetch_max_wait_ms=20,
        )
        create_topics(kafka, PARTITIONS)
        site = Site(kafka, Store(url=store.url), SHIPPED_BUNDLE, Path(scratch), Topic(kafka.bootstrap))
        site.config |= {"batch": {}, "log": {"format": "json"}}
        try:
            yield site
        finally:
            site.kill_all()
            store.child.stop()


def partition_of(index: int) -> int:
    return index % len(STREAMS) % PARTITIONS


def assignments(worker: WorkerProcess) -> list[tuple[float, list[int]]]:
    """When the worker was assigned which partitions, by its log; seconds since the epoch."""
    found = []
    for line in worker.log.read_text().splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if "assigned partitions" in entry["message"]:
                text = entry["message"].split(": ")[1]
                partitions = [] if text == "none" else json.loads(text)
                found.append((datetime.fromisoformat(entry["ts"]).timestamp(), partitions))
    return found


def wait_assigned(workers: list[WorkerProcess]) -> None:
    """Until the workers share all partitions between them, as their logs say."""

    def shared() -> bool:
        last = [assignments(w)[-1][1] if assignments(w) else [] for w in workers]
        return all(last) and sorted(itertools.chain(*last)) == list(range(PARTITIONS))

    workers[0].wait_until(shared, "an assignment to all workers")


class Feeder:
    """Frames to all streams at a steady pace."""

    def __init__(self, kafka: Kafka) -> None:
        self._kafka, self._stop = kafka, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        producer = KafkaProducer(bootstrap_servers=self._kafka.bootstrap, batch_size=0)
        for i in itertools.count():
            if self._stop.wait(1 / FRAMES_PER_SECOND):
                break
            send(producer, self._kafka, i)
        producer.close()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def send(producer: Any, kafka: Kafka, index: int) -> None:
    stream = STREAMS[index % len(STREAMS)]
    producer.send(
        kafka.topics.frames, key=stream.encode(), value=PICTURES[index % len(PICTURES)], partition=partition_of(index)
    )


def predictions(site: Site, until: int | None = None) -> list[tuple[float, int, str]]:
    """(seconds since the epoch, partition of the frame, stream) of every prediction, in order."""
    records = site.topic.read_quiet(
        site.kafka.topics.predictions, lambda rs: until is not None and len(rs) >= until, 60 if until else 2
    )
    rows = [(r.timestamp / 1000, int(dict(r.headers)["ce_id"].decode().split("/")[1]), r.key.decode()) for r in records]
    return sorted(rows)


def throughput(broker: str, count: int, frames: int) -> float:
    """Frames per second of `count` workers on a backlog."""
    with a_site(broker) as site:
        workers = [site.start() for _ in range(count)]
        wait_assigned(workers)
        producer = KafkaProducer(bootstrap_servers=site.kafka.bootstrap, batch_size=0)
        for i in range(frames):
            send(producer, site.kafka, i)
        producer.flush()
        producer.close()
        times = [t for t, _, _ in predictions(site, frames)]
    # The first and the last tenth are starting up and running dry.
    tenth = len(times) // 10
    return (len(times) - 2 * tenth) / (times[-tenth - 1] - times[tenth])


def gaps(rows: list[tuple[float, int, str]], start: float, end: float) -> dict[int, float]:
    """Per partition, the longest time without a prediction between two moments."""
    longest = {}
    for partition in range(PARTITIONS):
        times = [start, *(t for t, p, _ in rows if p == partition and start <= t <= end), end]
        longest[partition] = round(max(later - earlier for earlier, later in itertools.pairwise(times)), 2)
    return longest


def wait_steady(site: Site, worker: WorkerProcess) -> None:
    """Until every stream has folded some micro-batches more."""
    folded = {stream: header.frames if (header := site.header(stream)) else 0 for stream in STREAMS}
    site.wait_folded(worker, {stream: frames + STEADY_FRAMES for stream, frames in folded.items()})


def changes(broker: str) -> dict[str, Any]:
    """A second worker joins, leaves, joins again and is killed; then the last one restarts cleanly."""
    with a_site(broker) as site:
        first = site.start()
        wait_assigned([first])
        feeder = Feeder(site.kafka)
        wait_steady(site, first)
        marks = {"join": time.time()}
        second = site.start()
        wait_assigned([first, second])
        wait_steady(site, first)
        marks["leave"] = time.time()
        second.stop()
        wait_assigned([first])
        wait_steady(site, first)
        marks["left"] = time.time()
        third = site.start()
        wait_assigned([first, third])
        wait_steady(site, first)
        lost = assignments(third)[-1][1]
        marks["kill"] = time.time()
        third.kill()
        wait_assigned([first])
        wait_steady(site, first)
        first.stop()
        fourth = site.start()
        wait_assigned([fourth])
        wait_steady(site, fourth)
        feeder.stop()
        rows = predictions(site)
        assigned = assignments(fourth)[-1][0]
        takeover = assignments(first)[-1][0]
    firsts = {s: min(t for t, _, stream in rows if stream == s and t > assigned) - assigned for s in STREAMS}
    killed = [min(t for t, p, _ in rows if p == part and t > marks["kill"] + 0.5) - marks["kill"] for part in lost]
    joined, left = gaps(rows, marks["join"], marks["leave"]), gaps(rows, marks["leave"], marks["left"])
    return {
        "session_timeout_s": SESSION_S,
        "join_gap_s": joined,
        "leave_gap_s": left,
        "kill_takeover_s": round(max(killed), 2),
        "kill_assignment_s": round(takeover - marks["kill"], 2),
        "resume_after_takeover_s": round(max(killed) - (takeover - marks["kill"]), 2),
        "restart_resume_after_assignment_s": round(max(firsts.values()), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.scale")
    parser.add_argument("--frames", type=int, default=8_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--broker", default=os.environ.get("DRIFTKEEL_TEST_BOOTSTRAP", "own"), help=BROKER_HELP)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: exit(143))
    runs: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(arguments.rounds):  # in turns, so that a busy moment hits both
        for count, found in runs.items():
            found.append(round(throughput(arguments.broker, count, arguments.frames), 1))
            print(f"{count} workers: {found[-1]:.0f} frames/s", flush=True)
    report = {
        "broker": arguments.broker if arguments.broker in ("own", "embedded") else "real",
        "frames": arguments.frames,
        "streams": len(STREAMS),
        "partitions": PARTITIONS,
        "frames_per_second": {str(count): found for count, found in runs.items()},
        "ratio": round(statistics.median(runs[2]) / statistics.median(runs[1]), 2),
        "changes": [changes(arguments.broker) for _ in range(arguments.rounds)],
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.report:
        arguments.report.write_text(text + "\n")


if __name__ == "__main__":
    main()
