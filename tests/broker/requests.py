"""One function per request: from the decoded request to the fields of its response."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from kafka.protocol import admin, consumer, metadata, producer

from tests.broker import errors
from tests.broker.data import Data
from tests.broker.groups import EMPTY, Answer, Member, new_member_id
from tests.broker.log import Log, RefusedError

NODE = 1
CLUSTER = "driftkeel-tests"
TOPIC_RESOURCE = 2
DEFAULTS = {
    "max.message.bytes": "1048588",
    "min.insync.replicas": "1",
    "cleanup.policy": "delete",
    "retention.ms": "604800000",
}
LATEST, EARLIEST, MAX_TIMESTAMP = -1, -2, -3
ALL = -1  # acks of a producer
RESPONSES_END = 1 << 30  # of a Fetch without a limit of its own


@dataclass
class Broker:
    """Data and the address that clients are told to come to."""

    data: Data
    host: str
    port: int
    reading_ms: int = 0  # a fetch that may wait for less gets none of the records that are there


@dataclass
class Call:
    """A request, and who sent it."""

    broker: Broker
    request: Any
    version: int
    client: tuple[str, str] = ("", "")
    _codes: list[int] = field(default_factory=list)

    @property
    def data(self) -> Data:
        return self.broker.data


def _code(action: Callable[[], object]) -> int:
    try:
        action()
    except RefusedError as error:
        return error.code
    return errors.NONE


def _records(by_topic: Iterable[tuple[str, Answer]], name: str, partitions: str) -> list[Answer]:
    """Answers per partition, put together by topic."""
    ordered = sorted(by_topic, key=lambda item: item[0])
    grouped = itertools.groupby(ordered, key=lambda item: item[0])
    return [{name: topic, partitions: [answer for _, answer in items]} for topic, items in grouped]


# --- topics --------------------------------------------------------------------------------------------------------


def describe_topics(call: Call) -> Answer:
    topics = call.data.topics
    asked = call.request.topics
    everything = asked is None or (not asked and call.version == 0)
    names = list(topics) if everything else [topic.name for topic in asked]
    found = []
    for name in names:
        known = name in topics
        partitions = [
            {"error_code": 0, "partition_index": i, "leader_id": NODE, "leader_epoch": 0}
            | {"replica_nodes": [NODE], "isr_nodes": [NODE], "offline_replicas": []}
            for i in range(len(topics[name].partitions) if known else 0)
        ]
        code = errors.NONE if known else errors.UNKNOWN_TOPIC_OR_PARTITION
        found.append({"error_code": code, "name": name, "partitions": partitions})
    return {
        "brokers": [_node(call)],
        "cluster_id": CLUSTER,
        "controller_id": NODE,
        "topics": found,
    }


def _node(call: Call) -> Answer:
    return {"node_id": NODE, "host": call.broker.host, "port": call.broker.port}


def describe_cluster(call: Call) -> Answer:
    node = {"broker_id": NODE, "host": call.broker.host, "port": call.broker.port}
    return {"error_code": 0, "cluster_id": CLUSTER, "controller_id": NODE, "brokers": [node]}


def create_topics(call: Call) -> Answer:
    found = []
    for topic in call.request.topics:
        configs = {config.name: config.value for config in topic.configs or ()}
        count = 1 if topic.num_partitions == -1 else topic.num_partitions
        code = _code(lambda t=topic, n=count, c=configs: call.data.create_topic(t.name, n, c))
        found.append({"name": topic.name, "error_code": code, "error_message": None, "num_partitions": count})
    return {"topics": found}


def create_partitions(call: Call) -> Answer:
    found = []
    for topic in call.request.topics:
        code = _code(lambda t=topic: call.data.grow_topic(t.name, t.count))
        found.append({"name": topic.name, "error_code": code, "error_message": None})
    return {"results": found}


def delete_topics(call: Call) -> Answer:
    names = [topic.name for topic in call.request.topics or ()] or call.request.topic_names
    found = [{"name": name, "error_code": _code(lambda n=name: call.data.delete_topic(n))} for name in names]
    return {"responses": found}


def delete_records(call: Call) -> Answer:
    """Those before an offset, as a topic's retention does."""

    def one(topic: str, partition: Any) -> Answer:
        try:
            log = call.data.partition(topic, partition.partition_index)
            if not 0 <= partition.offset <= log.end:
                raise RefusedError(errors.OFFSET_OUT_OF_RANGE)
            log.start = max(log.start, partition.offset)
            answer = {"low_watermark": log.start, "error_code": errors.NONE}
        except RefusedError as error:
            answer = {"low_watermark": -1, "error_code": error.code}
        return {"partition_index": partition.partition_index} | answer

    found = [(t.name, one(t.name, p)) for t in call.request.topics for p in t.partitions]
    return {"topics": _records(found, "name", "partitions")}


def describe_configs(call: Call) -> Answer:
    results = []
    for resource in call.request.resources:
        topic = call.data.topics.get(resource.resource_name) if resource.resource_type == TOPIC_RESOURCE else None
        missing = resource.resource_type == TOPIC_RESOURCE and topic is None
        values = DEFAULTS | (topic.configs if topic else {})
        configs = [
            {"name": name, "value": value, "read_only": False, "is_sensitive": False, "synonyms": []}
            for name, value in values.items()
            if resource.configuration_keys is None or name in resource.configuration_keys
        ]
        results.append(
            {
                "error_code": errors.UNKNOWN_TOPIC_OR_PARTITION if missing else errors.NONE,
                "error_message": None,
                "resource_type": resource.resource_type,
                "resource_name": resource.resource_name,
                "configs": [] if missing else configs,
            }
        )
    return {"results": results}


def alter_configs(call: Call) -> Answer:
    """Of topics: settings are given a value, or taken away."""
    found = []
    for resource in call.request.resources:
        changes = {config.name: config.value for config in resource.configs}
        code = _code(lambda r=resource, c=changes: call.data.configure_topic(r.resource_name, c))
        about = {"resource_type": resource.resource_type, "resource_name": resource.resource_name}
        found.append({"error_code": code, "error_message": None} | about)
    return {"responses": found}


# --- records -------------------------------------------------------------------------------------------------------


def produce(call: Call) -> Answer:
    def one(topic: str, partition: Any) -> Answer:
        try:
            base = _append(call.data, topic, partition, call.request.acks)
        except RefusedError as error:
            return {"index": partition.index, "error_code": error.code, "base_offset": -1}
        return {"index": partition.index, "error_code": 0, "base_offset": base, "log_start_offset": 0}

    found = [(t.name, one(t.name, p)) for t in call.request.topic_data for p in t.partition_data]
    return {"responses": _records(found, "name", "partition_responses")}


def _append(data: Data, topic: str, partition: Any, acks: int) -> int:
    log = data.partition(topic, partition.index)
    content, configs = bytes(partition.records or b""), DEFAULTS | data.topics[topic].configs
    if len(content) > int(configs["max.message.bytes"]):
        raise RefusedError(errors.MESSAGE_TOO_LARGE)
    if acks == ALL and int(configs["min.insync.replicas"]) > 1:  # There is one: this node.
        raise RefusedError(errors.NOT_ENOUGH_REPLICAS)
    return log.append(content)


async def fetch(call: Call) -> Answer:
    """Waits until there are `min_bytes`, at most `max_wait_ms`. No fetch sessions: the answer says so with id 0."""
    deadline = time.monotonic() + call.request.max_wait_ms / 1000
    given_up = call.request.max_wait_ms < call.broker.reading_ms
    appended = asyncio.Event()
    logs = [log for t in call.request.topics for p in t.partitions if (log := _existing(call.data, t.topic, p))]
    for log in logs:
        log.waiting.add(appended)
    try:
        while True:
            appended.clear()
            found, size, failed = _fetch_now(call)
            left = deadline - time.monotonic()
            if given_up:
                found, size = [(topic, answer | {"records": b""}) for topic, answer in found], 0
            if failed or size >= call.request.min_bytes or left <= 0:
                return {"error_code": 0, "session_id": 0, "responses": _records(found, "topic", "partitions")}
            try:
                await asyncio.wait_for(appended.wait(), left)
            except TimeoutError:
                continue
    finally:
        for log in logs:
            log.waiting.discard(appended)


def _existing(data: Data, topic: str, partition: Any) -> Log | None:
    try:
        return data.partition(topic, partition.partition)
    except RefusedError:
        return None


def _fetch_now(call: Call) -> tuple[list[tuple[str, Answer]], int, bool]:
    """What there is now; its bytes; whether a partition cannot be read, so that there is nothing to wait for."""
    left, size, failed = call.request.max_bytes or RESPONSES_END, 0, False
    found: list[tuple[str, Answer]] = []
    for topic in call.request.topics:
        for partition in topic.partitions:
            answer: Answer = {"partition_index": partition.partition, "error_code": 0, "high_watermark": -1}
            try:
                log = call.data.partition(topic.topic, partition.partition)
                if not log.start <= partition.fetch_offset <= log.end:
                    raise RefusedError(errors.OFFSET_OUT_OF_RANGE)
                records = log.read(partition.fetch_offset, min(left, partition.partition_max_bytes), not size)
                answer |= {"high_watermark": log.end, "last_stable_offset": log.end, "log_start_offset": log.start}
            except RefusedError as error:
                records, failed = b"", True
                answer["error_code"] = error.code
            size += len(records)
            left = max(0, left - len(records))
            found.append((topic.topic, answer | {"records": records, "aborted_transactions": None}))
    return found, size, failed


def list_offsets(call: Call) -> Answer:
    def one(topic: str, partition: Any) -> Answer:
        answer: Answer = {"partition_index": partition.partition_index, "error_code": 0, "leader_epoch": 0}
        try:
            log = call.data.partition(topic, partition.partition_index)
        except RefusedError as error:
            return answer | {"error_code": error.code}
        offset, timestamp = {LATEST: (log.end, -1), EARLIEST: (log.start, -1)}.get(partition.timestamp, (-1, -1))
        if partition.timestamp == MAX_TIMESTAMP and log.batches:
            offset, timestamp = log.since(max(batch.newest_ms for batch in log.batches))
        elif partition.timestamp >= 0:
            offset, timestamp = log.since(partition.timestamp)
        return answer | {"offset": offset, "timestamp": timestamp}

    found = [(t.name, one(t.name, p)) for t in call.request.topics for p in t.partitions]
    return {"topics": _records(found, "name", "partitions")}


def leader_epochs(call: Call) -> Answer:
    def one(topic: str, partition: Any) -> Answer:
        answer = {"partition": partition.partition, "leader_epoch": 0}
        try:
            return answer | {"error_code": 0, "end_offset": call.data.partition(topic, partition.partition).end}
        except RefusedError as error:
            return answer | {"error_code": error.code}

    found = [(t.topic, one(t.topic, p)) for t in call.request.topics for p in t.partitions]
    return {"topics": _records(found, "topic", "partitions")}


def init_producer(call: Call) -> Answer:
    if call.request.transactional_id is not None:
        return {"error_code": errors.INVALID_REQUEST, "producer_id": -1, "producer_epoch": -1}
    return {"error_code": 0, "producer_id": call.data.new_producer(), "producer_epoch": 0}


# --- groups --------------------------------------------------------------------------------------------------------


def find_coordinator(call: Call) -> Answer:
    if call.version < 4:
        return {"error_code": 0, "error_message": None} | _node(call)
    keys = call.request.coordinator_keys
    return {"coordinators": [{"key": key, "error_code": 0, "error_message": None} | _node(call) for key in keys]}


async def join_group(call: Call) -> Answer:
    request = call.request
    member = Member(
        id=new_member_id(request.group_instance_id or call.client[0]),
        instance=request.group_instance_id,
        session_s=request.session_timeout_ms / 1000,
        rebalance_s=max(request.rebalance_timeout_ms, request.session_timeout_ms) / 1000,
        protocols=[(protocol.name, bytes(protocol.metadata)) for protocol in request.protocols],
        client=call.client,
    )
    group = call.data.group(request.group_id)
    return await group.join(call.version, request.member_id, member, request.protocol_type)


async def sync_group(call: Call) -> Answer:
    request = call.request
    given = {a.member_id: bytes(a.assignment) for a in request.assignments}
    group = call.data.group(request.group_id)
    return await group.sync(request.member_id, request.group_instance_id, request.generation_id, given)


def heartbeat(call: Call) -> Answer:
    request = call.request
    group = call.data.group(request.group_id)
    return {"error_code": group.heartbeat(request.member_id, request.group_instance_id, request.generation_id)}


def leave_group(call: Call) -> Answer:
    group = call.data.group(call.request.group_id)
    if call.version < 3:
        return {"error_code": group.leave(call.request.member_id, None)}
    members = [
        {
            **{"member_id": member.member_id, "group_instance_id": member.group_instance_id},
            "error_code": group.leave(member.member_id, member.group_instance_id),
        }
        for member in call.request.members
    ]
    return {"error_code": 0, "members": members}


def commit_offsets(call: Call) -> Answer:
    request = call.request
    group = call.data.group(request.group_id)
    refused = group.commit_error(request.member_id, request.group_instance_id, request.generation_id_or_member_epoch)
    accepted: dict[tuple[str, int], tuple[int, str | None]] = {}
    found = []
    for topic in request.topics:
        for partition in topic.partitions:
            where = (topic.name, partition.partition_index)
            code = refused or _code(lambda w=where: call.data.partition(*w))
            if not code:
                accepted[where] = (partition.committed_offset, partition.committed_metadata)
            found.append((topic.name, {"partition_index": partition.partition_index, "error_code": code}))
    if accepted:
        call.data.commit(group, accepted)
    return {"topics": _records(found, "name", "partitions")}


def fetch_offsets(call: Call) -> Answer:
    group = call.data.group(call.request.group_id)
    asked = call.request.topics
    wanted = list(group.offsets) if asked is None else [(t.name, p) for t in asked for p in t.partition_indexes]
    found = []
    for topic, index in wanted:
        offset, note = group.offsets.get((topic, index), (-1, ""))
        answer = {"partition_index": index, "committed_offset": offset, "metadata": note, "error_code": 0}
        found.append((topic, answer))
    return {"error_code": 0, "topics": _records(found, "name", "partitions")}


def list_groups(call: Call) -> Answer:
    groups = [
        {"group_id": g.name, "protocol_type": g.protocol_type or "", "group_state": g.state}
        for g in call.data.groups.values()
        if not call.request.states_filter or g.state in call.request.states_filter
    ]
    return {"error_code": 0, "groups": groups}


def describe_groups(call: Call) -> Answer:
    groups = []
    for name in call.request.groups:
        group = call.data.groups.get(name)
        members = [
            {
                **{"member_id": m.id, "group_instance_id": m.instance},
                **{"client_id": m.client[0], "client_host": m.client[1]},
                **{"member_metadata": m.metadata(group.protocol), "member_assignment": m.assignment},
            }
            for m in (group.members.values() if group else ())
        ]
        groups.append(
            {
                **{"error_code": 0, "group_id": name, "group_state": group.state if group else "Dead"},
                **{"protocol_type": (group and group.protocol_type) or "", "members": members},
                "protocol_data": (group and group.state != EMPTY and group.protocol) or "",
            }
        )
    return {"groups": groups}


def delete_groups(call: Call) -> Answer:
    names = call.request.groups_names
    found = [{"group_id": name, "error_code": _code(lambda n=name: call.data.delete_group(n))} for name in names]
    return {"results": found}


# By the name of the request: what answers it, and the versions that are spoken. None of them knows topics by id.
Handler = Callable[[Call], Answer | Awaitable[Answer]]
HANDLERS: list[tuple[Any, Any, int, int, Handler]] = [
    (producer.ProduceRequest, producer.ProduceResponse, 3, 9, produce),
    (producer.InitProducerIdRequest, producer.InitProducerIdResponse, 0, 4, init_producer),
    (consumer.FetchRequest, consumer.FetchResponse, 4, 12, fetch),
    (consumer.ListOffsetsRequest, consumer.ListOffsetsResponse, 1, 7, list_offsets),
    (consumer.OffsetForLeaderEpochRequest, consumer.OffsetForLeaderEpochResponse, 2, 4, leader_epochs),
    (consumer.JoinGroupRequest, consumer.JoinGroupResponse, 2, 9, join_group),
    (consumer.SyncGroupRequest, consumer.SyncGroupResponse, 0, 5, sync_group),
    (consumer.HeartbeatRequest, consumer.HeartbeatResponse, 0, 4, heartbeat),
    (consumer.LeaveGroupRequest, consumer.LeaveGroupResponse, 0, 5, leave_group),
    (consumer.OffsetCommitRequest, consumer.OffsetCommitResponse, 2, 8, commit_offsets),
    (consumer.OffsetFetchRequest, consumer.OffsetFetchResponse, 1, 7, fetch_offsets),
    (metadata.MetadataRequest, metadata.MetadataResponse, 0, 9, describe_topics),
    (metadata.FindCoordinatorRequest, metadata.FindCoordinatorResponse, 0, 4, find_coordinator),
    (admin.CreateTopicsRequest, admin.CreateTopicsResponse, 2, 6, create_topics),
    (admin.CreatePartitionsRequest, admin.CreatePartitionsResponse, 0, 3, create_partitions),
    (admin.DeleteTopicsRequest, admin.DeleteTopicsResponse, 1, 5, delete_topics),
    (admin.DeleteRecordsRequest, admin.DeleteRecordsResponse, 0, 2, delete_records),
    (admin.DescribeConfigsRequest, admin.DescribeConfigsResponse, 1, 4, describe_configs),
    (admin.IncrementalAlterConfigsRequest, admin.IncrementalAlterConfigsResponse, 0, 1, alter_configs),
    (admin.DescribeClusterRequest, admin.DescribeClusterResponse, 0, 0, describe_cluster),
    (admin.ListGroupsRequest, admin.ListGroupsResponse, 0, 4, list_groups),
    (admin.DescribeGroupsRequest, admin.DescribeGroupsResponse, 0, 5, describe_groups),
    (admin.DeleteGroupsRequest, admin.DeleteGroupsResponse, 0, 2, delete_groups),
]
