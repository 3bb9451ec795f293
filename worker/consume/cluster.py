"""Which Kafka cluster the positions in the store are of.

An offset is valid in one log only. If two sites with a Kafka each shared a store and a prefix, frames of each would be
taken for folded in as far as the other has come, and would get no prediction. So the store has, for each frames topic,
the id of the cluster whose worker came first.
"""

from __future__ import annotations

from typing import Any

from schemas.config import WorkerConfig
from schemas.errors import ConfigError
from worker.kafka.inside import metadata


def cluster_of(consumer: Any) -> str:
    """The id of the cluster that a client of kafka-python has reached; empty where the broker tells none."""
    return str(metadata(consumer).cluster_id or "")


def differ(cluster: str, noted: str) -> bool:
    """Whether these are two different clusters; False where one is empty, which means not known."""
    return bool(cluster and noted) and cluster != noted


def require_cluster(config: WorkerConfig, cluster: str, noted: str, key: str) -> None:
    """Raises ConfigError where the broker is of another cluster than `noted` under `key`."""
    if differ(cluster, noted):
        store, kafka = config.store, config.kafka
        raise ConfigError(
            f"the store at {store.address} has under store.prefix {store.prefix} what was read of topic "
            f"{kafka.topics.frames} in Kafka cluster {noted}, and {kafka.bootstrap} is of cluster {cluster}: give each "
            f"site a store.prefix of its own; where this one has moved, see docs/runbooks/other-topic.md (key {key})"
        )
