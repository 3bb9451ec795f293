"""What a worker says of broker and store while it starts."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

import pytest
from pydantic import SecretStr

from meta.bundle import load_bundle
from monitoring.metrics import WorkerMetrics
from schemas.config import Kafka, Store, WorkerConfig
from schemas.errors import UnreachableError
from worker.embedded import free_port
from worker.parts import connect


def last_answers(kafka: Kafka, store: Store, bundle: Path) -> tuple[float, float]:
    """Of the store and the broker, as a worker shows them that has given up to start."""
    metrics = WorkerMetrics(1)
    config = WorkerConfig(kafka=kafka, store=store)
    with pytest.raises(UnreachableError):
        connect(config, load_bundle(bundle), metrics, None, 1, threading.Event(), lambda act: act(), lambda: None)
    names = (f"driftkeel_{what}_last_answer_timestamp_seconds" for what in ("store", "broker"))
    store_s, broker_s = (metrics.registry.get_sample_value(name) for name in names)
    assert store_s is not None
    assert broker_s is not None
    return store_s, broker_s


def away() -> Kafka:
    return Kafka(bootstrap=f"127.0.0.1:{free_port()}", connect_timeout_s=0.5)


def test_a_store_that_is_away_has_not_answered_and_the_broker_is_not_asked(tiny_bundle_path: Path) -> None:
    store = Store(url=SecretStr(f"redis://127.0.0.1:{free_port()}/0"), connect_timeout_s=0.5)
    store_s, broker_s = last_answers(away(), store, tiny_bundle_path)
    assert store_s == 0
    assert math.isnan(broker_s)


def test_a_broker_that_is_away_has_not_answered(store_settings: Store, tiny_bundle_path: Path) -> None:
    store_s, broker_s = last_answers(away(), store_settings, tiny_bundle_path)
    assert store_s == pytest.approx(time.time(), abs=120)
    assert broker_s == 0
