"""A broker of one process, which everybody reaches through a proxy only."""

from __future__ import annotations

from tests.chaos.broker import Broker, Fault
from tests.chaos.harness import COMMANDS, STORE_FAULTS, WORKER_FAULTS, Chaos
from tests.chaos.proxy import FlakyProxy
from worker import embedded


class SingleBroker(Broker):
    """With the faults of its connections. `process` tells its clients to come to `port`."""

    def __init__(self, process: embedded.Broker, port: int) -> None:
        self.process, self.port = process, port
        self._proxy = FlakyProxy(process.port, port)
        self.bootstrap = f"127.0.0.1:{port}"

    @property
    def faults(self) -> list[Fault]:
        of_connections = [self.cut_broker, self.broker_away, self.slow]
        return [*WORKER_FAULTS, *STORE_FAULTS, *of_connections, *COMMANDS]

    def cut_broker(self, chaos: Chaos) -> None:
        self._proxy.cut()

    def broker_away(self, chaos: Chaos) -> None:
        """Mostly for seconds, rarely for a minute."""
        seconds = chaos.random.choice([0.5, 1, 1, 2, 2, 4, 4, 8, 8, 60])
        chaos.away(self._proxy, min(seconds, chaos.longest_outage_s))

    def slow(self, chaos: Chaos) -> None:
        """Every read through one proxy takes longer."""
        proxy = chaos.random.choice([self._proxy, chaos.to_store])
        proxy.delay_s = chaos.random.uniform(0.002, 0.02)
        chaos.pause(chaos.random.uniform(0.5, 2))
        proxy.delay_s = 0.0

    def close(self) -> None:
        self.process.child.stop(0)
        self._proxy.close()
