"""What tests share: the real broker and store, a small untrained bundle, and pictures."""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as the command line has it

import contextlib
import io
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import torch
from hypothesis import settings
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from PIL import Image

from meta.bundle import Bundle, load_bundle, write_bundle
from meta.learned import GeneratorSettings, LearnedOptimizer
from meta.models import build_network
from meta.norms import AdaptableModel
from meta.objective import feature_statistics
from monitoring.metrics import WorkerMetrics
from schemas.bundle import Calibration, Limits, Manifest, MethodPart, ModelPart, Preprocess
from schemas.config import Adapt, Kafka, Store, Topics
from schemas.config import Bundle as BundleSettings
from schemas.policy import Policy
from worker import embedded
from worker.embedded import start_broker, start_store
from worker.engine.engine import Engine
from worker.guard.answer import Policies
from worker.kafka.client import create_topics
from worker.kafka.sockets import leave_no_sockets
from worker.publish.publisher import Publisher
from worker.store import client as store_client
from worker.store.store import StateStore
from worker.streams.streams import Streams
from worker.streams.upgrade import Upgrade

PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

torch.set_num_threads(1)
leave_no_sockets()  # Of clients that tests open themselves, too: a warning would come in whichever test is next.
# A store on a slow disk, or a machine that stood still, may answer late; here that is no outage.
store_client.TIMEOUT_S = 120
# As in a worker: on a busy machine the client says that its own threads are slow.
logging.getLogger("kafka").setLevel(logging.CRITICAL)
# Ports that nobody else takes between the look and the bind: no other process of this run, and nothing that a command
# starts, which looks from 26,000 on.
embedded.PORTS = range(20_000, 26_000)[int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) :: PROCESSES]
settings.register_profile("driftkeel", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("driftkeel")

SHIPPED_BUNDLE = Path(__file__).parents[1] / "bundles" / "fashion-mnist"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes share the tests, each begins with some of the long ones: one that begins last has all
    others wait for it. Each process gets an equal part of the list, one after another, and then takes from the rest of
    others."""
    if PROCESSES == 1:
        return
    long = [item for item in items if item.get_closest_marker("long")]
    short = [item for item in items if not item.get_closest_marker("long")]
    begin = [len(short) * process // PROCESSES for process in range(PROCESSES + 1)]
    items[:] = [
        item
        for process in range(PROCESSES)
        for item in (*long[process::PROCESSES], *short[begin[process] : begin[process + 1]])
    ]


@pytest.fixture(scope="session")
def bootstrap() -> Iterator[str]:
    """A broker: the one that DRIFTKEEL_TEST_BOOTSTRAP names, else the embedded one."""
    given = os.environ.get("DRIFTKEEL_TEST_BOOTSTRAP")
    if given:
        yield given
        return
    broker = start_broker()
    yield broker.bootstrap
    broker.child.stop(0)


@pytest.fixture(scope="session")
def store_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A store: the one that DRIFTKEEL_TEST_REDIS_URL names, else the embedded one."""
    given = os.environ.get("DRIFTKEEL_TEST_REDIS_URL")
    if given:
        yield given
        return
    store = start_store(tmp_path_factory.mktemp("store"))
    yield store.url
    store.child.stop()


@pytest.fixture
def kafka_settings(bootstrap: str) -> Iterator[Kafka]:
    """Settings with topics and a group of their own, three partitions of frames; deleted afterwards."""
    tag = uuid.uuid4().hex[:8]
    settings = Kafka(
        bootstrap=bootstrap,
        group=f"group-{tag}",
        topics=Topics(
            frames=f"frames-{tag}",
            predictions=f"predictions-{tag}",
            updates=f"updates-{tag}",
            commands=f"commands-{tag}",
            dead_letters=f"frames-{tag}.dlq",
        ),
        # Where a machine stands still for seconds nobody is thrown out. The embedded broker has joiners wait for half.
        session_timeout_ms=6_000,
        heartbeat_interval_ms=300,
        fetch_max_wait_ms=20,
        connect_timeout_s=60,
    )
    create_topics(settings, 3)
    yield settings
    admin = KafkaAdminClient(bootstrap_servers=bootstrap)
    topics = settings.topics
    admin.delete_topics([topics.frames, topics.predictions, topics.updates, topics.commands, topics.dead_letters])
    admin.close()


@pytest.fixture
def store_settings(store_url: str) -> Iterator[Store]:
    """A key space of its own."""
    prefix = f"test-{uuid.uuid4().hex[:8]}"
    yield Store(url=store_url, prefix=prefix, connect_timeout_s=60)
    admin = redis.Redis.from_url(store_url, socket_timeout=120)
    for key in admin.scan_iter(f"{prefix}:*"):
        admin.delete(key)
    admin.close()


@pytest.fixture
def client(store_url: str) -> Iterator[redis.Redis]:
    """For what no worker would write, and to see what one has written."""
    with redis.Redis.from_url(store_url, socket_timeout=120) as client:
        yield client


@pytest.fixture
def open_store() -> Iterator[Callable[[Store], StateStore]]:
    """Opens stores, and closes them afterwards: a connection left to the garbage collector fails a later test."""
    with contextlib.ExitStack() as opened:

        def open(settings: Store) -> StateStore:
            store = StateStore(settings)
            opened.callback(store.close)
            return store

        yield open


@pytest.fixture
def store(open_store: Callable[[Store], StateStore], store_settings: Store) -> StateStore:
    return open_store(store_settings)


@dataclass
class Topic:
    """Sends to and reads from topics as any client would."""

    bootstrap: str

    def send(
        self,
        topic: str,
        records: list[tuple[bytes | None, bytes | None, list[tuple[str, bytes]]]],
        sent_ms: int | None = None,
    ) -> list[Any]:
        """Send (key, value, headers), now or as if at `sent_ms`; returns the records' positions, in order."""
        producer = KafkaProducer(bootstrap_servers=self.bootstrap, max_request_size=64 << 20, batch_size=0)
        futures = [
            producer.send(topic, value, key, headers, None if key else 0, sent_ms) for key, value, headers in records
        ]
        positions = [future.get(timeout=120) for future in futures]
        producer.close()
        return positions

    def read(self, topic: str, until: Callable[[list[Any]], bool], timeout_s: float = 120) -> list[Any]:
        """All records from the beginning, once `until` holds for them."""
        records = self.read_quiet(topic, until, timeout_s)
        assert until(records), f"{topic}: {len(records)} records after {timeout_s} s, and not what was waited for"
        return records

    def read_quiet(self, topic: str, until: Callable[[list[Any]], bool], timeout_s: float = 10) -> list[Any]:
        """All records from the beginning, once `until` holds for them or no more come within `timeout_s`."""
        consumer = KafkaConsumer(
            bootstrap_servers=self.bootstrap,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=20,
            enable_auto_commit=False,
        )
        partitions = consumer.partitions_for_topic(topic) or {0}
        consumer.assign([TopicPartition(topic, p) for p in partitions])
        consumer.seek_to_beginning()
        records: list[Any] = []
        last = time.monotonic()
        while time.monotonic() - last < timeout_s:
            polled = [record for part in consumer.poll(timeout_ms=100).values() for record in part]
            if polled:
                records += polled
                last = time.monotonic()
                if until(records):
                    break
        consumer.close(autocommit=False)
        return records


@pytest.fixture
def topic(bootstrap: str) -> Topic:
    return Topic(bootstrap)


def picture(seed: int = 0, size: tuple[int, int] = (28, 28), format: str = "PNG", mode: str = "L") -> bytes:
    """An encoded image of random blobs."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 255, (7, 7), np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BILINEAR).convert(mode).save(buffer, format)
    return buffer.getvalue()


def make_tiny_bundle(folder: Path, channels: int = 1, side: int = 28) -> None:
    """Write a sound bundle with an untrained net and generator: for mechanisms, not for accuracy."""
    torch.manual_seed(7)
    arguments = {"classes": 4, "channels": channels, "widths": [8, 8], "group": 4}
    network = build_network("groupnorm-cnn", arguments)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    model = AdaptableModel(network)
    with torch.no_grad():
        source = feature_statistics(model.forward_with_features(torch.randn(64, channels, side, side))[1])
    settings = GeneratorSettings(hidden=4)
    manifest = Manifest(
        name="tiny",
        created_by="tests",
        model=ModelPart(architecture="groupnorm-cnn", arguments=arguments, clean_accuracy=0.9),
        method=MethodPart(name="mgg", settings=settings.model_dump(mode="json")),
        preprocess=Preprocess(
            mode="RGB" if channels == 3 else "L", width=side, height=side, mean=[0.5] * channels, std=[0.25] * channels
        ),
        calibration=Calibration(temperature=1.5, intercept=0.1, slope=0.8, error=0.05),
        limits=Limits(raw_gradient_norm=1e4, source_distance=100.0),
        files={},
    )
    tensors = {
        "model": weights,
        "generator": dict(LearnedOptimizer(settings, model).state_dict()),
        "statistics": source.as_tensors(),
    }
    write_bundle(folder, manifest, tensors, ["nut", "bolt", "washer", "other"])


@pytest.fixture(scope="session")
def tiny_bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    make_tiny_bundle(folder)
    return folder


@pytest.fixture
def tiny_bundle(tiny_bundle_path: Path) -> Bundle:
    return load_bundle(tiny_bundle_path)


def make_streams(
    engine: Engine,
    store: StateStore,
    publisher: Publisher,
    settings: Store,
    worker: str = "w",
    metrics: WorkerMetrics | None = None,
) -> Streams:
    """Of a worker without a loop, which does not wait for a store that is away."""
    return Streams(
        engine,
        store,
        publisher,
        metrics or WorkerMetrics(4),
        worker,
        Adapt(),
        settings,
        lambda action: action(),
        Policies(Policy(), {}),
        Upgrade(BundleSettings(), engine),
    )
