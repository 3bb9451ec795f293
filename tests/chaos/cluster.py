"""Faults that a cluster has and a single broker does not.

There is one worker at a time, and the coordinator of its group stays where it is, on a node that stays. This cluster's
never answers members that have waited too long for others, and refuses those that are told what is theirs after others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from schemas.config import Kafka
from tests.cluster import NODES, PASSING_ERRORS, Cluster

if TYPE_CHECKING:
    from tests.chaos.harness import Chaos


COORDINATOR, *OTHERS = NODES


def set_up(cluster: Cluster, kafka: Kafka, partitions: int) -> None:
    """Create the topics, and name the group's coordinator."""
    many = (kafka.topics.frames, kafka.topics.predictions)  # of a partition this cluster keeps 5 MiB: 6,000 predictions
    for topic in kafka.topics.model_dump().values():
        cluster.create(topic, partitions if topic in many else 1)
    cluster.coordinate(kafka.group, COORDINATOR)


def leaders_move(chaos: Chaos) -> None:
    """Other nodes lead some partitions; the old ones refuse what they are asked."""
    partitions = _all(chaos)
    for topic, partition in chaos.random.sample(partitions, chaos.random.randint(1, len(partitions))):
        chaos.cluster.lead(topic, partition, chaos.random.choice(NODES))


def node_away(chaos: Chaos) -> None:
    """A node is gone for a while, and nobody takes its place."""
    node = chaos.random.choice(OTHERS)
    chaos.cluster.away(node)
    chaos.pause(chaos.random.choice([0.3, 1, 3, 8]))
    chaos.cluster.back(node)


def node_replaced(chaos: Chaos) -> None:
    """As in a rolling restart: a node is gone, others take over what it led, it comes back."""
    node = chaos.random.choice(OTHERS)
    others = [other for other in NODES if other != node]
    chaos.cluster.away(node)
    chaos.pause(chaos.random.uniform(0, 0.5))
    for topic, partition in _all(chaos):
        chaos.cluster.lead(topic, partition, chaos.random.choice(others))
    chaos.pause(chaos.random.uniform(0.5, 4))
    chaos.cluster.back(node)


def errors_pass(chaos: Chaos) -> None:
    """The next requests of a kind are refused, for reasons that pass."""
    request = chaos.random.choice(list(PASSING_ERRORS))
    chaos.cluster.answer(request, chaos.random.choices(PASSING_ERRORS[request], k=chaos.random.randint(1, 6)))


def node_slow(chaos: Chaos) -> None:
    node = chaos.random.choice(NODES)
    chaos.cluster.delay(node, chaos.random.choice([20, 100, 500]))
    chaos.pause(chaos.random.uniform(0.5, 3))
    chaos.cluster.delay(node, 0)


def _all(chaos: Chaos) -> list[tuple[str, int]]:
    return [(topic, partition) for topic, count in chaos.cluster.topics.items() for partition in range(count)]
