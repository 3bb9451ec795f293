"""What chaos runs against, by name. A further broker is a module with its class, and a line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.chaos.broker import Broker
from tests.chaos.brokers.cluster import ClusterBroker
from tests.chaos.brokers.embedded import EmbeddedBroker
from tests.chaos.brokers.own import OwnBroker

BROKERS: dict[str, Callable[[Path], Broker]] = {
    broker.name: broker for broker in (OwnBroker, EmbeddedBroker, ClusterBroker)
}
