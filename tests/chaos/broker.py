"""What a chaos run has to know of a broker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from schemas.config import Kafka
from worker.kafka.client import create_topics

if TYPE_CHECKING:
    from tests.chaos.harness import Chaos

Fault = Callable[["Chaos"], None]


class Broker(ABC):
    """Runs from when it is made, with what it keeps in a folder, until `close`."""

    name: str
    session_s = 2.0
    first_workers = 2
    worker_module = "worker"
    # Whether it may wait for ever for a member that dies while the group forms (docs/guarantees.md). Members then come
    # and go one change at a time.
    waits_for_the_dead = True
    bootstrap: str  # where clients reach it, the feeder and the checks, too

    @property
    @abstractmethod
    def faults(self) -> list[Fault]:
        """What may happen, each as often as it is named. The seed draws by the order."""

    def create_topics(self, kafka: Kafka, partitions: int) -> None:
        create_topics(kafka, partitions)

    @abstractmethod
    def close(self) -> None: ...
