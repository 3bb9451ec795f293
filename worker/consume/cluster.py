"""Which Kafka cluster the positions in the store are of.

An offset means something in one log alone. Where two sites with a Kafka each share a store under one prefix, frames of
either seem to be folded as far as the other has come, and have no prediction. So the store knows, per topic of frames,
the cluster of who came first.
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
    """Whether these are two clusters. Empty: it is not known."""
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
