"""The demo's broker: it has no data to come back with."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.brokers.single import SingleBroker
from worker.embedded import free_port, start_broker


class EmbeddedBroker(SingleBroker):
    name = "embedded"

    def __init__(self, folder: Path) -> None:
        port = free_port()
        super().__init__(start_broker(advertised=port), port)
