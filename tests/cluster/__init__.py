"""A cluster of Kafka nodes for tests: the one that librdkafka brings for its own tests, another implementation of the
protocol than `tests/broker`.

Its nodes go away and come back, its leaders and coordinators move, and it answers with errors when told to. Left out:
the topics' settings, replicas that lag, transactions that hide records; data is in memory, 5 MiB a partition. Its
coordinator is too simple for groups of several members. It knows older versions of the protocol, which `told` has the
clients speak.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path

import confluent_kafka
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer

NODES = (1, 2, 3)
PROTOCOL = (2, 3)
# Requests of the protocol, by their numbers, and what a real broker may answer them for a while.
PRODUCE, FETCH, METADATA, OFFSET_COMMIT, OFFSET_FETCH, FIND_COORDINATOR, JOIN, HEARTBEAT, SYNC, PRODUCER_ID = (
    *(0, 1, 3, 8, 9, 10, 11, 12, 14),
    22,
)
PASSING_ERRORS = {
    PRODUCE: [5, 6, 7, 13, 19, 20],  # no leader, another, timed out, network, too few replicas (also after the append)
    FETCH: [3, 5, 6],
    METADATA: [5],
    OFFSET_COMMIT: [7, 14, 15, 16, 27],  # timed out, loading, no coordinator, another, rebalancing
    OFFSET_FETCH: [14, 15, 16],
    FIND_COORDINATOR: [15],
    JOIN: [14, 15, 16],
    HEARTBEAT: [15, 16, 27],
    SYNC: [15, 16, 27],
    PRODUCER_ID: [14],
}
_PRODUCER = 0  # librdkafka's kinds of clients


class Cluster:
    """As many nodes as NODES, on loopback. Raises RuntimeError where one of its calls fails."""

    def __init__(self) -> None:
        (path,) = (Path(confluent_kafka.__file__).parent.parent / "confluent_kafka.libs").glob("librdkafka*")
        self._library = ctypes.CDLL(str(path))
        for name in ("conf_new", "new", "mock_cluster_new"):
            getattr(self._library, f"rd_kafka_{name}").restype = ctypes.c_void_p
        self._library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
        said = ctypes.create_string_buffer(512)
        configuration = ctypes.c_void_p(self._library.rd_kafka_conf_new())
        self._client = ctypes.c_void_p(self._library.rd_kafka_new(_PRODUCER, configuration, said, ctypes.sizeof(said)))
        self._cluster = ctypes.c_void_p(self._library.rd_kafka_mock_cluster_new(self._client, len(NODES)))
        self.topics: dict[str, int] = {}  # their partitions
        self.bootstrap: str = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()

    def create(self, topic: str, partitions: int, copies: int = len(NODES)) -> None:
        self._call("topic_create", topic.encode(), partitions, copies)
        self.topics[topic] = partitions

    def lead(self, topic: str, partition: int, node: int) -> None:
        """From now on this node leads the partition."""
        self._call("partition_set_leader", topic.encode(), ctypes.c_int32(partition), ctypes.c_int32(node))

    def coordinate(self, group: str, node: int) -> None:
        """From now on this node is the group's coordinator."""
        self._call("coordinator_set", b"group", group.encode(), ctypes.c_int32(node))

    def away(self, node: int) -> None:
        """Close the node's connections, and take no new ones; metadata does not name it any more."""
        self._call("broker_set_down", ctypes.c_int32(node))

    def back(self, node: int) -> None:
        self._call("broker_set_up", ctypes.c_int32(node))

    def delay(self, node: int, milliseconds: int) -> None:
        """Each answer of the node takes so much longer."""
        self._call("broker_set_rtt", ctypes.c_int32(node), milliseconds)

    def answer(self, request: int, errors: Sequence[int]) -> None:
        """Answer the next requests of this kind with these errors."""
        codes = (ctypes.c_int * len(errors))(*errors)
        push = self._library.rd_kafka_mock_push_request_errors_array
        push(self._cluster, ctypes.c_int16(request), ctypes.c_size_t(len(errors)), codes)

    def close(self) -> None:
        self._library.rd_kafka_mock_cluster_destroy(self._cluster)
        self._library.rd_kafka_destroy(self._client)

    def _call(self, name: str, *arguments: object) -> None:
        if code := getattr(self._library, f"rd_kafka_mock_{name}")(self._cluster, *arguments):
            raise RuntimeError(f"{name} {arguments}: error {code} of librdkafka")


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Clients that are made meanwhile, in this process, speak the cluster's versions of the protocol.

    They would ask for them in a version that it does not know, and its answer to that is not what Kafka's would be.
    """
    kinds = (KafkaAdminClient, KafkaConsumer, KafkaProducer)
    before = [kind.DEFAULT_CONFIG["api_version"] for kind in kinds]
    for kind in kinds:
        kind.DEFAULT_CONFIG["api_version"] = PROTOCOL
    try:
        yield
    finally:
        for kind, version in zip(kinds, before, strict=True):
            kind.DEFAULT_CONFIG["api_version"] = version
