"""Who is away costs the doctor its patience once, however many are."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from schemas.config import Bundle, Kafka, Store, WorkerConfig
from worker.site.doctor import examine
from worker.store import client as store_client


def test_store_and_broker_are_waited_for_at_the_same_time(
    tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This store hangs up as soon as somebody has come to the broker, and not before."""
    monkeypatch.setattr(store_client, "TIMEOUT_S", 20)

    def hang_up() -> None:
        caller = store.accept()[0]
        broker.accept()[0].close()
        caller.close()

    with socket.create_server(("127.0.0.1", 0)) as store, socket.create_server(("127.0.0.1", 0)) as broker:
        thread = threading.Thread(target=hang_up)
        thread.start()
        config = WorkerConfig(
            kafka=Kafka(bootstrap=f"127.0.0.1:{broker.getsockname()[1]}"),
            store=Store(url=f"redis://127.0.0.1:{store.getsockname()[1]}/0"),
            bundle=Bundle(path=tiny_bundle_path),
        )
        failed = {found.subject: found.text for found in examine(config) if found.level == "failed"}
        thread.join()
    assert set(failed) == {"store", "broker"}
    assert "Timeout" not in failed["store"]
