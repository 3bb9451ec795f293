"""Whole workers, measured from outside: one or several processes between an embedded broker and an embedded store.

Throughput and latency come from the timestamps of frames and predictions, which the clients set when they send them.
Processor time and memory come from /proc.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from kafka import KafkaProducer
from pydantic import SecretStr

from meta.bundle import load_bundle
from schemas.config import Kafka, Log, Metrics, Store, Topics, WorkerConfig
from schemas.errors import DriftkeelError
from schemas.frame import Position
from schemas.state import encode_header
from schemas.state_tensors import encode_tensors
from worker.benchmark.throughput_engine import grown_header
from worker.embedded import Broker, Child, EmbeddedStore, free_port, worker_process
from worker.kafka.client import close_producer, connection, create_topics
from worker.kafka.topic import records_now
from worker.store.compress import pack
from worker.store.store import StateStore, Write

PARTITIONS = 4
SAMPLE_S = 0.25
STALLED_S = 60.0
STARTING_S = 240.0  # on a busy machine torch alone takes a minute to be imported
Window = tuple[float, float]  # shares of all frames between which throughput is measured
WINDOW: Window = (0.15, 0.95)  # without start and end
TICK_S = 0.005
PREDICTIONS, DROPPED = "driftkeel_predictions_total", "driftkeel_frames_dropped_total"
ASSIGNED = "driftkeel_assigned_partitions"

Sent = tuple[str, bytes]  # stream, image


@dataclass(frozen=True)
class Sample:
    """Predictions and processor time of all workers so far."""

    predictions: float
    cpu_seconds: float


@dataclass
class Measured:
    """The result of one run. `predictions` are parsed, by the frame's id."""

    frames: int
    frames_per_second: float
    cpu_seconds_per_1000_frames: float
    peak_memory_bytes: int
    latencies_ms: list[float]
    metrics: dict[str, float]
    predictions: dict[str, dict[str, Any]] = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """The figures for the report; latencies mean something only if frames came at a pace."""
        p50, p90, p99 = np.percentile(self.latencies_ms, [50, 90, 99])
        return {
            "frames": self.frames,
            "micro_batches": self.metrics["driftkeel_batch_frames_count"],
            "frames_per_second": self.frames_per_second,
            "cpu_seconds_per_1000_frames": self.cpu_seconds_per_1000_frames,
            "peak_memory_bytes": self.peak_memory_bytes,
            "latency_ms": {"p50": p50, "p90": p90, "p99": p99},
        }


class Bench:
    """Makes runs one after another on an embedded broker and store, each with topics and keys of its own."""

    def __init__(self, broker: Broker, store: EmbeddedStore, folder: Path) -> None:
        self._broker, self._store, self._folder = broker, store, folder
        self._runs = 0

    def run(
        self,
        bundle: Path,
        frames: Sequence[Sent],
        pace: float | None = None,
        grown: bool = True,
        pods: int = 1,
        window: Window = WINDOW,
        **sections: Any,
    ) -> Measured:
        """Send `frames`, all at once or `pace` a second, to `pods` workers of one thread each.

        Without a pace one worker finds all frames when it starts; several divide the partitions before the first frame.
        `grown`: the streams are past their first frames. `sections` override parts of the workers' configuration.
        """
        self._runs += 1
        config = self._config(bundle, {"threads": 1} | sections)
        create_topics(config.kafka, PARTITIONS)
        if grown:
            _write_grown_streams(config, {stream for stream, _ in frames})
        waiting = pace is None and pods == 1
        if waiting:
            send(config.kafka, frames)
        configs = [_pod(config, number) for number in range(pods)]
        with contextlib.ExitStack() as stack, self._with_logs(configs):
            running = [Pod(stack.enter_context(worker_process(one, self._folder)), one) for one in configs]
            _wait_ready(running)
            with ThreadPoolExecutor(1) as sender:  # In a thread, to watch the workers meanwhile.
                sending = None if waiting else sender.submit(send, config.kafka, frames, pace)
                samples = _watch(running, len(frames))
                if sending is not None:
                    sending.result()
            peak = sum(_peak_memory(pod.child) for pod in running)
            metrics = _sums([scrape(pod.config) for pod in running])
            for pod in running:  # All at once: the others would divide the partitions of one that left first.
                pod.child.process.terminate()
        return _observed(config.kafka, len(frames), samples, peak, metrics, window)

    def _config(self, bundle: Path, sections: dict[str, Any]) -> WorkerConfig:
        tag = f"bench-{self._runs}"
        kafka = Kafka(
            bootstrap=self._broker.bootstrap,
            group=tag,
            session_timeout_ms=6_000,
            heartbeat_interval_ms=500,
            fetch_max_wait_ms=20,
            topics=Topics(**{name: f"{tag}.{name}" for name in Topics.model_fields}),
        )
        return WorkerConfig(
            **{
                "worker": tag,
                "kafka": kafka,
                "store": Store(url=SecretStr(self._store.url), prefix=tag),
                "bundle": {"path": bundle.resolve()},
                "metrics": Metrics(port=free_port()),
                "log": Log(format="text", level="warning"),
                **sections,
            }
        )

    @contextlib.contextmanager
    def _with_logs(self, configs: Sequence[WorkerConfig]) -> Iterator[None]:
        """Add each worker's last lines to an error."""
        try:
            yield
        except DriftkeelError as error:
            logs = {one.worker: self._folder / f"{one.worker}.log" for one in configs}
            said = {
                name: log.read_text(errors="replace").splitlines()[-8:] for name, log in logs.items() if log.exists()
            }
            tails = ["\n".join([f"last lines of worker {name}:", *lines]) for name, lines in said.items()]
            raise DriftkeelError("\n".join([str(error), *tails])) from error


@dataclass(frozen=True)
class Pod:
    """A worker that runs, and its configuration."""

    child: Child
    config: WorkerConfig


def _pod(config: WorkerConfig, number: int) -> WorkerConfig:
    own = {"worker": f"{config.worker}-{number}", "metrics": Metrics(port=free_port())}
    return config.model_copy(update=own)


def _sums(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(one.get(name, 0.0) for one in metrics) for name in set().union(*metrics)}


def _write_grown_streams(config: WorkerConfig, streams: set[str]) -> None:
    """Write streams to the store that are past their first frames, with the source's parameters."""
    bundle = load_bundle(config.bundle.path)
    known, tensors = grown_header(bundle), {name: t[0] for name, t in bundle.method.fresh(1).items()}
    packed = pack(encode_tensors(tensors, known.step), config.store.compression)
    store, names = StateStore(config.store), sorted(streams)
    claims = store.claim(names, config.worker)
    store.write(
        [
            Write(name, claim.token, 1, encode_header(known.model_copy(update={"stream": name})), b"", packed)
            for name, claim in zip(names, claims, strict=True)
        ]
    )
    store.close()


def send(kafka: Kafka, frames: Sequence[Sent], pace: float | None = None) -> None:
    """Send frames as fast as they go, or `pace` a second."""
    producer = KafkaProducer(**connection(kafka), linger_ms=2, batch_size=64 << 10)
    began, sent = time.perf_counter(), 0
    while sent < len(frames):
        due = len(frames) if pace is None else min(len(frames), int((time.perf_counter() - began) * pace) + 1)
        for stream, image in frames[sent:due]:
            producer.send(kafka.topics.frames, key=stream.encode(), value=image)
        sent = max(sent, due)
        if pace is not None:
            time.sleep(TICK_S)
    producer.flush()
    close_producer(producer, 5)


def scrape(config: WorkerConfig, *only: str) -> dict[str, float]:
    """The worker's metrics, by name with labels, or `only` some of them; empty while it does not answer."""
    url = f"http://127.0.0.1:{config.metrics.port}/metrics?" + "&".join(f"name[]={name}" for name in only)
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def _wait_ready(pods: Sequence[Pod]) -> None:
    """Wait until every worker has partitions, and every partition a worker."""
    deadline = time.monotonic() + STARTING_S
    while time.monotonic() < deadline and all(pod.child.process.poll() is None for pod in pods):
        shares = [scrape(pod.config, ASSIGNED).get(ASSIGNED, 0.0) for pod in pods]
        if min(shares) > 0 and sum(shares) == PARTITIONS and all(_is_ready(pod.config) for pod in pods):
            return
        time.sleep(0.05)
    raise DriftkeelError("the worker did not become ready")


def _is_ready(config: WorkerConfig) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{config.metrics.port}/readyz", timeout=5):
            return True
    except OSError:
        return False


def _watch(pods: Sequence[Pod], frames: int) -> list[Sample]:
    """Sample until all frames are predicted, or dropped as too late."""
    samples: list[Sample] = []
    done, last_news = 0.0, time.monotonic()
    while done < frames:
        time.sleep(SAMPLE_S)
        # Only two series: a scrape of all, four times a second, would take the worker longer than a small pass.
        seen = _sums([scrape(pod.config, PREDICTIONS, DROPPED) for pod in pods])
        before, done = done, sum(seen.values())
        if done > before:
            last_news = time.monotonic()
        predictions = seen.get(PREDICTIONS, 0.0)
        samples.append(Sample(predictions, sum(_cpu_seconds(pod.child) for pod in pods)))
        gone = any(pod.child.process.poll() is not None for pod in pods)
        if gone or time.monotonic() - last_news > STALLED_S:
            raise DriftkeelError(f"the worker stopped at {done:.0f} of {frames} frames")
    return samples


def _observed(
    kafka: Kafka, frames: int, samples: list[Sample], peak: int, metrics: dict[str, float], window: Window
) -> Measured:
    sent = {str(Position.of(r)): r.timestamp for r in records_now(kafka, kafka.topics.frames)}
    predictions, moments, latencies = {}, [], []
    for record in records_now(kafka, kafka.topics.predictions):
        prediction = json.loads(record.value)
        if prediction["id"] in predictions:
            continue
        predictions[prediction["id"]] = prediction
        moments.append(record.timestamp)
        latencies.append(float(record.timestamp - sent[prediction["id"]]))
    moments.sort()
    first, last = (int(share * (len(moments) - 1)) for share in window)
    inside = [s for s in samples if window[0] * len(predictions) <= s.predictions]
    begin, end = inside[0], inside[-1]
    return Measured(
        frames=frames,
        frames_per_second=(last - first) / max(1e-3, (moments[last] - moments[first]) / 1000),
        cpu_seconds_per_1000_frames=1000
        * (end.cpu_seconds - begin.cpu_seconds)
        / max(1.0, end.predictions - begin.predictions),
        peak_memory_bytes=peak,
        latencies_ms=latencies,
        metrics=metrics,
        predictions=predictions,
    )


def _cpu_seconds(child: Child) -> float:
    """Processor time of the worker, all threads; 0 where there is no /proc."""
    try:
        fields = Path(f"/proc/{child.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_memory(child: Child) -> int:
    """Largest resident set, in bytes; 0 where there is no /proc."""
    try:
        status = Path(f"/proc/{child.process.pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) << 10 if found else 0
