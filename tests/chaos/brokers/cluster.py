"""The three nodes of tests/cluster, and faults that a cluster has and a single broker does not.

There is one worker at a time, and the coordinator of its group stays where it is, on a node that stays. This cluster's
never answers members that have waited too long for others, and refuses those that are told what is theirs after others.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from schemas.config import Kafka
from tests.chaos.broker import Broker, Fault
from tests.chaos.harness import Chaos
from tests.cluster import NODES, PASSING_ERRORS, Cluster, told

COORDINATOR, *OTHERS = NODES


class ClusterBroker(Broker):
    name = "cluster"
    session_s = 6.0  # its coordinator waits for members for a second less, and forgets those that wait longer
    first_workers = 1
    worker_module = "tests.cluster"

    def __init__(self, folder: Path) -> None:
        self._cluster = Cluster()
        self.bootstrap = self._cluster.bootstrap
        self._open = contextlib.ExitStack()
        self._open.callback(self._cluster.close)
        self._open.enter_context(told())

    @property
    def faults(self) -> list[Fault]:
        of_nodes = [self.leaders_move, self.node_away, self.node_replaced, self.errors_pass]
        return [*of_nodes * 3, self.node_slow, Chaos.restart_worker, Chaos.cut_store, Chaos.command]

    def create_topics(self, kafka: Kafka, partitions: int) -> None:
        """And name the group's coordinator."""
        many = (kafka.topics.frames, kafka.topics.predictions)  # It keeps 5 MiB of a partition: 6,000 predictions.
        for topic in kafka.topics.model_dump().values():
            self._cluster.create(topic, partitions if topic in many else 1)
        self._cluster.coordinate(kafka.group, COORDINATOR)

    def close(self) -> None:
        self._open.close()

    def leaders_move(self, chaos: Chaos) -> None:
        """Other nodes lead some partitions; the old ones refuse what they are asked."""
        partitions = self._partitions()
        for topic, partition in chaos.random.sample(partitions, chaos.random.randint(1, len(partitions))):
            self._cluster.lead(topic, partition, chaos.random.choice(NODES))

    def node_away(self, chaos: Chaos) -> None:
        """A node is gone for a while, and nobody takes its place."""
        node = chaos.random.choice(OTHERS)
        self._cluster.away(node)
        chaos.pause(chaos.random.choice([0.3, 1, 3, 8]))
        self._cluster.back(node)

    def node_replaced(self, chaos: Chaos) -> None:
        """As in a rolling restart: a node is gone, others take over what it led, it comes back."""
        node = chaos.random.choice(OTHERS)
        others = [other for other in NODES if other != node]
        self._cluster.away(node)
        chaos.pause(chaos.random.uniform(0, 0.5))
        for topic, partition in self._partitions():
            self._cluster.lead(topic, partition, chaos.random.choice(others))
        chaos.pause(chaos.random.uniform(0.5, 4))
        self._cluster.back(node)

    def errors_pass(self, chaos: Chaos) -> None:
        """The next requests of a kind are refused, for reasons that pass."""
        request = chaos.random.choice(list(PASSING_ERRORS))
        self._cluster.answer(request, chaos.random.choices(PASSING_ERRORS[request], k=chaos.random.randint(1, 6)))

    def node_slow(self, chaos: Chaos) -> None:
        node = chaos.random.choice(NODES)
        self._cluster.delay(node, chaos.random.choice([20, 100, 500]))
        chaos.pause(chaos.random.uniform(0.5, 3))
        self._cluster.delay(node, 0)

    def _partitions(self) -> list[tuple[str, int]]:
        return [(topic, partition) for topic, count in self._cluster.topics.items() for partition in range(count)]
