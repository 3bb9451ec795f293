"""The broker of the tests: its data outlives it."""

from __future__ import annotations

from pathlib import Path

from tests.broker.process import start_own_broker
from tests.chaos.broker import Fault
from tests.chaos.brokers.single import SingleBroker
from tests.chaos.harness import Chaos
from worker.embedded import free_port


class OwnBroker(SingleBroker):
    name = "own"
    waits_for_the_dead = False

    def __init__(self, folder: Path) -> None:
        self._folder, port = folder, free_port()
        super().__init__(start_own_broker(folder / "broker", folder / "broker.log", free_port(), port), port)

    @property
    def faults(self) -> list[Fault]:
        return [*super().faults, self.restart_broker]

    def restart_broker(self, chaos: Chaos) -> None:
        """kill -9 of the broker; it comes back with its data."""
        self.process.child.stop(0)
        chaos.pause(chaos.random.uniform(0.1, 3))
        folder = self._folder
        self.process = start_own_broker(folder / "broker", folder / "broker.log", self.process.port, self.port)
