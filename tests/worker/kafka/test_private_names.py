"""All that the worker uses of kafka-python's private parts, so that a new version is looked at name by name."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import kafka
import pytest

import worker

LOOKED_AT = "3.0.12"
# Of each module, the private names by the class or module of kafka-python that has them.
NAMES: dict[str, dict[str, str]] = {
    "batches": {
        "kafka.consumer.group.KafkaConsumer": "_fetcher",
        "kafka.consumer.fetcher.Fetcher.PartitionRecords": "_unpack_records",
    },
    "client": {"kafka.producer.kafka.KafkaProducer": "_closed _sender"},
    "fenced": {
        "kafka.consumer.group.KafkaConsumer": "_coordinator",
        "kafka.coordinator.consumer.ConsumerCoordinator": "_async_commit_fenced",
        "kafka.coordinator.base.BaseCoordinator": "_handle_heartbeat_response",
    },
    "inside": {
        "kafka.consumer.group.KafkaConsumer": "_cluster _metrics _subscription",
        "kafka.producer.kafka.KafkaProducer": "_metadata _metrics",
        "kafka.metrics.stats.sensor.Sensor": "_last_record_time",
    },
    "join": {
        "kafka.consumer.group.KafkaConsumer": "_coordinator",
        "kafka.coordinator.base.BaseCoordinator": "_do_join_and_sync_async _generation",
        "kafka.coordinator.consumer.ConsumerCoordinator": "_on_join_complete_async",
    },
    "nodes": {
        "kafka.net.manager.KafkaConnectionManager": "_backoff _connect _net",
        "kafka.coordinator.base.BaseCoordinator": "_manager _send_group_coordinator_request",
    },
    "reading": {
        "kafka.consumer.group.KafkaConsumer": "_fetcher",
        "kafka.consumer.fetcher.Fetcher": "_parse_fetched_data",
    },
    "records": {"kafka.record.default_records.DefaultRecordBatch": "_buffer _pos _read_msg"},
    "send": {
        "kafka.producer.kafka.KafkaProducer": "_accumulator _sender",
        "kafka.producer.future.FutureRecordMetadata": "_produce_future",
    },
    "sockets": {
        "kafka.net.transport.KafkaTCPTransport": "_net _sock _write_buffer",
    },
    "unpack": {"kafka.codec": "_detect_xerial_stream"},
}


def used(path: Path) -> set[str]:
    """Private attributes of others that a module reads or sets."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    own = {id(node) for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "self"}
    return {node.attr for node in nodes if node.attr.startswith("_") and node.attr[1] != "_" and id(node) not in own}


def find(owner: str) -> object:
    """A module, or a class in one."""
    parts = owner.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise ImportError(owner)


def test_the_table_has_every_private_name_that_the_worker_uses() -> None:
    folder = Path(worker.__file__).parent
    listed = {module: set(" ".join(names.values()).split()) for module, names in NAMES.items()}
    assert {path.stem: found for path in (folder / "kafka").glob("*.py") if (found := used(path))} == listed
    for part in ("consume", "control", "publish", "streams", "site", "produce"):
        assert not {path: found for path in (folder / part).glob("*.py") if (found := used(path))}


@pytest.mark.parametrize(("module", "owner"), [(module, owner) for module, of in NAMES.items() for owner in of])
def test_kafka_python_has_these_names(module: str, owner: str) -> None:
    source = inspect.getsource(find(owner))
    gone = [name for name in NAMES[module][owner].split() if f"{name}(" not in source and f".{name} = " not in source]
    assert not gone, f"worker/kafka/{module}.py needs {gone} of {owner}, which kafka-python {kafka.__version__} has not"


def test_this_version_of_kafka_python_was_looked_at() -> None:
    assert kafka.__version__ == LOOKED_AT, "see whether each module of worker/kafka is still needed, and still right"
