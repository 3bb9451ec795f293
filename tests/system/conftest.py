"""Workers as processes of their own, as they run at a site; and in this process, turned by the test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from kafka import KafkaAdminClient
from kafka.partitioner.default import murmur2

from schemas.config import Adapt, Batch, Bundle, Kafka, Metrics, Store, WorkerConfig
from schemas.prediction import Prediction
from schemas.state import StreamHeader, decode_header
from schemas.update import UpdateEvent
from tests.conftest import Topic, picture
from tests.forked import Forked
from tests.outline import chained
from worker.embedded import free_port
from worker.run import Worker
from worker.store.store import StateStore


class WorkerProcess:
    """One worker, started by its command line."""

    process: subprocess.Popen[bytes] | Forked

    def __init__(
        self,
        folder: Path,
        content: dict[str, Any],
        name: str,
        forked: bool = False,
        module: str = "worker",
        root: Path | None = None,
    ) -> None:
        """`root` has the version to run, if not this one; a forked worker is of this one."""
        self.port = free_port()
        content = {
            "worker": name,
            "threads": 1,
            "metrics": {"port": self.port},
            "log": {"format": "text"},
            **content,
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        self.log = folder / f"{name}.log"
        arguments = ["worker", "--config", str(path)]
        if forked:
            self.process = Forked(arguments, self.log, self.log)
            return
        with self.log.open("ab") as output:
            command = [sys.executable, "-m", module, *arguments]
            environment = {**os.environ, "PYTHONPATH": str(root)} if root else None
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=root, env=environment)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.terminate()
        return self.process.wait(120)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _all_logs(self) -> str:
        logs = sorted(self.log.parent.glob("worker-*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in logs)

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as answer:
            return answer.read().decode()

    def ready(self) -> bool:
        """What /readyz says; /healthz is well all the while."""
        base = f"http://127.0.0.1:{self.port}"
        with urllib.request.urlopen(f"{base}/healthz", timeout=60):
            pass
        try:
            with urllib.request.urlopen(f"{base}/readyz", timeout=60):
                return True
        except urllib.error.HTTPError:
            return False

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"the worker ended:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"{what} did not happen:\n{self._all_logs()}"
            time.sleep(0.05)


class Site:
    """A topic set, a key space, and the workers on them."""

    def __init__(self, kafka: Kafka, store: Store, bundle: Path, folder: Path, topic: Topic) -> None:
        self.kafka, self.store, self.topic = kafka, store, topic
        self._folder, self._workers = folder, 0
        self.forked = False  # whether workers are spared the seconds that imports take
        self.module = "worker"
        self.root: Path | None = None
        self.running: list[WorkerProcess] = []
        self.config: dict[str, Any] = {
            "kafka": kafka.model_dump(mode="json", exclude_none=True),
            "store": {"url": store.url.get_secret_value(), "prefix": store.prefix, "connect_timeout_s": 60},
            "bundle": {"path": str(bundle)},
            "batch": {"max_batch": 8, "max_wait_ms": 50, "min_adapt": 4, "max_hold_ms": 300},
        }

    def fill_batches(self) -> None:
        """Eight frames make a micro-batch, however busy the machine is."""
        self.config["batch"] = {**self.config["batch"], "max_wait_ms": 10_000}

    def expect_deaths(self) -> None:
        """Of workers that start from now on: what one had that ends without a word soon goes to others."""
        self.config["kafka"] = {**self.config["kafka"], "session_timeout_ms": 2_000}

    def start(self, **sections: Any) -> WorkerProcess:
        self._workers += 1
        name = f"worker-{self._workers}"
        content = {**self.config, **sections}
        worker = WorkerProcess(self._folder, content, name, self.forked, self.module, self.root)
        self.running.append(worker)
        return worker

    def send(self, frames: list[tuple[str, bytes]]) -> list[str]:
        """Send frames; returns their ids, in order."""
        records = [(stream.encode(), image, []) for stream, image in frames]
        sent = self.topic.send(self.kafka.topics.frames, records)
        return [f"{m.topic}/{m.partition}/{m.offset}" for m in sent]

    def predictions(self, ids: list[str], timeout_s: float = 240) -> dict[str, list[Prediction]]:
        """All predictions, by id, once every id has one."""
        wanted = set(ids)
        records = self.topic.read(
            self.kafka.topics.predictions,
            lambda rs: wanted <= {dict(r.headers)["ce_id"].decode() for r in rs},
            timeout_s,
        )
        found: dict[str, list[Prediction]] = {}
        for record in records:
            prediction = Prediction.model_validate_json(record.value)
            assert record.key == prediction.stream.encode()
            found.setdefault(prediction.id, []).append(prediction)
        return found

    def events(self, until: Callable[[list[UpdateEvent]], bool]) -> list[UpdateEvent]:
        def parse(records: list[Any]) -> list[UpdateEvent]:
            return [UpdateEvent.model_validate_json(record.value) for record in records]

        return parse(self.topic.read(self.kafka.topics.updates, lambda rs: until(parse(rs))))

    def header(self, stream: str) -> StreamHeader | None:
        """What the store says of a stream."""
        client = redis.Redis.from_url(self.store.url.get_secret_value(), socket_timeout=120)
        content = client.hget(StateStore(self.store).keys(stream)[0], "header")
        client.close()
        return decode_header(content) if content else None

    def wait_folded(self, worker: WorkerProcess, counts: dict[str, int]) -> None:
        """Wait until every stream's stored state has folded its frames."""

        def done() -> bool:
            headers = {stream: self.header(stream) for stream in counts}
            return all(h is not None and h.frames >= counts[s] for s, h in headers.items())

        worker.wait_until(done, f"folding {counts}")

    def committed(self) -> int:
        """Offsets that the group has committed, summed over partitions."""
        admin = KafkaAdminClient(bootstrap_servers=self.kafka.bootstrap)
        found = admin.list_group_offsets([self.kafka.group])[self.kafka.group]
        admin.close()
        return sum(max(0, meta.offset) for meta in found.values())

    def feed(self, worker: WorkerProcess, stream: str, frames: int) -> list[str]:
        """Send frames, wait until all of them are folded, and return their ids."""
        header = self.header(stream)
        before = header.frames if header else 0
        ids = self.send([(stream, picture(before + i)) for i in range(frames)])
        self.wait_folded(worker, {stream: before + frames})
        return ids

    def assert_folded_once(self, frames: dict[str, list[str]]) -> None:
        """Every frame of every stream has shaped its state exactly once, in order."""
        for stream, ids in frames.items():
            header = self.header(stream)
            assert header is not None
            assert header.frames == len(ids), stream
            assert header.folded == chained(ids), stream

    def kill_all(self) -> None:
        """Whoever still runs, stopped ones too."""
        for worker in self.running:
            if worker.process.poll() is None:
                worker.signal(signal.SIGCONT)
                worker.kill()


@pytest.fixture
def site(
    kafka_settings: Kafka, store_settings: Store, tiny_bundle_path: Path, tmp_path: Path, topic: Topic
) -> Iterator[Site]:
    site = Site(kafka_settings, store_settings, tiny_bundle_path, tmp_path, topic)
    site.forked = True
    yield site
    site.kill_all()


@pytest.fixture
def full_batches(request: pytest.FixtureRequest) -> None:
    """For modules whose tests count updates, also those of their tests that have no site."""
    if "site" in request.fixturenames:
        request.getfixturevalue("site").fill_batches()


@pytest.fixture
def site_file(site: Site, tmp_path: Path) -> str:
    """The site as commands are told of it; its workers keep a snapshot of every second update."""
    path = tmp_path / "site.yaml"
    site.config["store"] = {**site.config["store"], "snapshot_every": 2}
    path.write_text(yaml.safe_dump(site.config))
    return str(path)


def run_cli(*arguments: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """`driftkeel ...` to its end; nobody is there to answer what it asks."""
    with tempfile.TemporaryDirectory() as scratch:
        output, errors = Path(scratch, "output"), Path(scratch, "errors")
        process = Forked(arguments, output, errors, **environment)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, code, output.read_text(), errors.read_text())


def ids_by_stream(frames: list[tuple[str, bytes]], ids: list[str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for (stream, _), frame_id in zip(frames, ids, strict=True):
        grouped.setdefault(stream, []).append(frame_id)
    return grouped


@pytest.fixture
def config(kafka_settings: Kafka, store_settings: Store, tiny_bundle_path: Path) -> WorkerConfig:
    """Of a worker in this process, which has memory for few streams."""
    return WorkerConfig(
        threads=1,
        kafka=kafka_settings,
        store=store_settings,
        bundle=Bundle(path=tiny_bundle_path),
        batch=Batch(max_batch=4, max_wait_ms=10, min_adapt=1),
        adapt=Adapt(max_resident_streams=4),
        metrics=Metrics(port=0),
    )


@contextlib.contextmanager
def running(config: WorkerConfig) -> Iterator[Worker]:
    """A worker in this process, which turns when the test says so, and stops afterwards."""
    worker = Worker(config, threading.Event())
    try:
        yield worker
    finally:
        worker._stop.set()
        worker.run()


MakeWorker = Callable[[WorkerConfig], Worker]


@pytest.fixture
def make_worker() -> Iterator[MakeWorker]:
    """Makes workers in this process that are `running` to the end of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda config: stack.enter_context(running(config))


def turn_until(worker: Worker, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        worker._turn()


def partition_of(stream: str) -> int:
    """Of the three of the topic of frames."""
    return int(murmur2(stream.encode()) & 0x7FFFFFFF) % 3


def metric(worker: Worker, name: str, **labels: str) -> float:
    """As a scrape would find it; 0 where nothing was counted yet."""
    return worker.metrics.registry.get_sample_value(f"driftkeel_{name}", labels) or 0.0
