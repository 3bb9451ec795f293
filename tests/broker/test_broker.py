"""What the fault tests rely on in their broker: groups as the protocol has them, and nothing lost or doubled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import NodeNotReadyError
from kafka.record.default_records import DefaultRecordBatchBuilder

from tests.broker import errors
from tests.broker.groups import COMPLETING, EMPTY, PREPARING, STABLE, Answer, Group, Member, new_member_id
from tests.broker.log import Log, RefusedError
from tests.broker.process import start_own_broker
from tests.chaos.proxy import FlakyProxy
from tests.servers import wait_until
from worker.embedded import Broker, free_port

SESSION_S, REBALANCE_S = 0.2, 30.0
# kafka-python leaves sockets that were cut to the garbage collector.
cuts = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Client:
    """A member as the coordinator meets it, without a connection."""

    def __init__(
        self, group: Group, instance: str | None = None, session_s: float = 60.0, metadata: bytes = b""
    ) -> None:
        self.group, self.instance, self.session_s, self.metadata = group, instance, session_s, metadata
        self.id, self.generation = "", -1

    async def join(self, version: int = 9) -> Answer:
        """As clients do: again, with the id they are given, where they are told to."""
        while True:
            protocols = [("range", self.metadata)]
            new = Member(new_member_id("c"), self.instance, self.session_s, REBALANCE_S, protocols, ("c", "/here"))
            answer = await self.group.join(version, self.id, new, "consumer")
            self.id = answer["member_id"]
            if answer["error_code"] != errors.MEMBER_ID_REQUIRED:
                self.generation = answer["generation_id"]
                return answer

    async def sync(self, given: dict[str, bytes] | None = None) -> Answer:
        return await self.group.sync(self.id, self.instance, self.generation, given or {})

    def beat(self) -> int:
        return self.group.heartbeat(self.id, self.instance, self.generation)


def group_test(test: Callable[[Group], Awaitable[None]]) -> Callable[[], None]:
    """Runs in a loop of its own; nothing in here waits for a rebalance timeout."""

    def run() -> None:
        asyncio.run(asyncio.wait_for(test(Group("g", lambda group: None)), REBALANCE_S / 2))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def join_all(*clients: Client) -> list[Answer]:
    """One after the other, and with each the earlier ones again; what they are told in the end."""
    answers: list[Answer] = []
    for number, newest in enumerate(clients):
        answers = await asyncio.gather(newest.join(), *(earlier.join() for earlier in clients[:number]))
        assert {answer["error_code"] for answer in answers} == {errors.NONE}
    return answers


async def form(*clients: Client) -> None:
    """All join and get an assignment that says their own id."""
    await join_all(*clients)
    given = {client.id: client.id.encode() for client in clients}
    for answer, client in zip(await asyncio.gather(*(c.sync(given) for c in clients)), clients, strict=True):
        assert (answer["error_code"], answer["assignment"]) == (errors.NONE, client.id.encode())


@group_test
async def test_a_group_forms_once_all_have_joined(group: Group) -> None:
    first, second = Client(group, metadata=b"1"), Client(group, metadata=b"2")
    await form(first)
    join = asyncio.create_task(second.join())
    while first.beat() != errors.REBALANCE_IN_PROGRESS:
        await asyncio.sleep(0)
    assert not join.done()
    told = await first.join()
    assert (await join)["generation_id"] == told["generation_id"] == 2
    assert told["leader"] == first.id
    assert {m["metadata"] for m in told["members"]} == {b"1", b"2"}
    waiting = asyncio.create_task(second.sync())
    await asyncio.sleep(0)
    assert not waiting.done()
    await first.sync({second.id: b"yours"})
    assert (await waiting)["assignment"] == b"yours"
    assert group.state == STABLE


@group_test
async def test_a_dead_member_goes_with_its_session(group: Group) -> None:
    first, dead = Client(group), Client(group, session_s=SESSION_S)
    await form(first, dead)
    while first.beat() == errors.NONE:
        await asyncio.sleep(0.01)
    assert (await first.join())["members"] != []
    assert list(group.members) == [first.id]
    assert dead.beat() == errors.UNKNOWN_MEMBER_ID


@group_test
async def test_members_that_die_while_the_group_forms_do_not_hold_it_up(group: Group) -> None:
    """One before its assignment, as the leader; one that never comes back with the id it was given; one in between."""
    leader, first = Client(group, session_s=SESSION_S), Client(group)
    await join_all(leader, first)
    assert (group.state, group.leader) == (COMPLETING, leader.id)
    waiting = asyncio.create_task(first.sync())
    await asyncio.sleep(0)
    new = Member("pending", None, SESSION_S, REBALANCE_S, [("range", b"")], ("", ""))
    assert (await group.join(9, "", new, "consumer"))["error_code"] == errors.MEMBER_ID_REQUIRED
    assert (await waiting)["error_code"] == errors.REBALANCE_IN_PROGRESS  # the leader's session is over
    third = Client(group, session_s=SESSION_S)
    await asyncio.gather(third.join(), first.join())  # and the third does not ask for what it got
    await first.sync()
    while first.beat() == errors.NONE:
        await asyncio.sleep(0.01)
    assert (await first.join())["error_code"] == errors.NONE
    assert list(group.members) == [first.id]


@group_test
async def test_generations_are_fenced(group: Group) -> None:
    first, second = Client(group), Client(group)
    await form(first)
    old = first.generation
    join = asyncio.create_task(second.join())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert group.state == PREPARING
    assert group.commit_error(first.id, None, old) == errors.NONE  # what is revoked may still be committed
    await asyncio.gather(join, first.join())
    assert group.commit_error(first.id, None, first.generation) == errors.REBALANCE_IN_PROGRESS
    await asyncio.gather(first.sync(), second.sync())
    assert group.commit_error(first.id, None, old) == errors.ILLEGAL_GENERATION
    assert group.commit_error("somebody", None, old) == errors.UNKNOWN_MEMBER_ID
    assert group.commit_error("", None, -1) == errors.UNKNOWN_MEMBER_ID
    assert group.heartbeat(first.id, None, old) == errors.ILLEGAL_GENERATION
    for client in (first, second):
        assert group.leave(client.id, None) == errors.NONE
    assert group.state == EMPTY
    assert group.commit_error("", None, -1) == errors.NONE


@group_test
async def test_a_lost_answer_is_given_again(group: Group) -> None:
    leader, other = Client(group), Client(group)
    await join_all(leader, other)
    assert (await other.join())["generation_id"] == 2
    await asyncio.gather(leader.sync({other.id: b"x"}), other.sync())
    assert (await other.join())["generation_id"] == 2
    assert (await other.sync())["assignment"] == b"x"
    rejoin = asyncio.create_task(leader.join())  # a leader that joins again wants another assignment
    while other.beat() != errors.REBALANCE_IN_PROGRESS:
        await asyncio.sleep(0)
    await other.join()
    assert (await rejoin)["generation_id"] == 3


@group_test
async def test_a_static_member_that_returns_keeps_its_place(group: Group) -> None:
    leader, member = Client(group, instance="a"), Client(group, instance="b")
    await form(leader, member)
    for old in (leader, member):
        back = Client(group, instance=old.instance)
        answer = await back.join()
        assert answer["generation_id"] == old.generation
        assert answer.get("skip_assignment", False) == (old is leader)
        assert (await back.sync())["assignment"] == old.id.encode()
        assert old.beat() == errors.FENCED_INSTANCE_ID
        assert group.commit_error(old.id, old.instance, old.generation) == errors.FENCED_INSTANCE_ID
    assert group.state == STABLE


def batch(sequence: int, values: list[bytes], epoch: int = 0, producer: int = 7) -> bytes:
    builder = DefaultRecordBatchBuilder(2, 0, False, producer, epoch, sequence, 1 << 20)
    for offset, value in enumerate(values):
        builder.append(offset, 1_000 + offset, None, value, [])
    return bytes(builder.build())


def test_what_a_producer_sends_again_counts_once(tmp_path: Path) -> None:
    log = Log(tmp_path / "t-0.log")
    assert log.append(batch(0, [b"a", b"b"])) == 0
    assert log.append(batch(2, [b"c"])) == 2
    again = Log(tmp_path / "t-0.log")
    for known in (log, again):  # also after a restart
        assert known.append(batch(0, [b"a", b"b"])) == 0
        assert known.end == 3
        with pytest.raises(RefusedError, match=str(errors.OUT_OF_ORDER_SEQUENCE_NUMBER)):
            known.append(batch(4, [b"e"]))
        with pytest.raises(RefusedError, match=str(errors.CORRUPT_MESSAGE)):
            known.append(batch(3, [b"d"])[:-1] + b"?")
    assert log.append(batch(0, [b"x"], epoch=1)) == 3
    with pytest.raises(RefusedError, match=str(errors.INVALID_PRODUCER_EPOCH)):
        log.append(batch(3, [b"d"]))
    assert log.append(batch(-1, [b"y"], producer=-1)) == 4
    assert log.append(batch(-1, [b"y"], producer=-1)) == 5
    log.close()
    again.close()


def test_half_a_batch_is_no_batch(tmp_path: Path) -> None:
    log = Log(tmp_path / "t-0.log")
    log.append(batch(0, [b"a"]))
    with (tmp_path / "t-0.log").open("ab") as file:
        file.write(batch(1, [b"b"])[:30])
    again = Log(tmp_path / "t-0.log")
    assert again.append(batch(1, [b"b"])) == 1
    assert again.read(0, 1 << 20, at_least_one=True) == b"".join(b.content for b in again.batches)
    log.close()
    again.close()


def test_a_read_gives_whole_batches_up_to_a_size(tmp_path: Path) -> None:
    log = Log()
    for sequence in range(4):
        log.append(batch(sequence, [b"x" * 100]))
    size = len(log.batches[0].content)
    assert len(log.read(1, 2 * size + 1, at_least_one=False)) == 2 * size
    assert log.read(3, size - 1, at_least_one=False) == b""
    assert len(log.read(3, size - 1, at_least_one=True)) == size
    assert log.since(0) == (0, 1_000)
    assert log.since(5_000) == (-1, -1)


def consumer_of(broker: Broker, **options: object) -> KafkaConsumer:
    fixed = {"group_id": "g", "auto_offset_reset": "earliest", "enable_auto_commit": False, "fetch_max_wait_ms": 20}
    consumer = KafkaConsumer("t", bootstrap_servers=broker.bootstrap, **fixed | options)
    # The client may join before it has heard of the topic's partitions; then it has none, and waits for minutes.
    wait_until(lambda: consumer.partitions_for_topic("t"), "the topic's partitions")
    return consumer


def read(consumer: KafkaConsumer, count: int) -> list[bytes]:
    found: list[bytes] = []

    def enough() -> bool:
        found.extend(r.value for part in consumer.poll(timeout_ms=50).values() for r in part)
        return len(found) >= count

    wait_until(enough, f"{count} records")
    return sorted(found)


def deleted(admin: KafkaAdminClient, topic: str) -> bool:
    """False while the client still waits before it connects again, and says so instead of waiting."""
    try:
        admin.delete_topics([topic])
    except NodeNotReadyError:
        return False
    return True


@cuts
def test_everything_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    """Topics, records, offsets, members: clients go on as if nothing had been."""
    port = free_port()
    broker = start_own_broker(tmp_path, port=port)
    admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap)
    admin.create_topics({"t": {"num_partitions": 2, "replication_factor": 1}}, wait_for_metadata=True)
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap)
    consumer = consumer_of(broker)
    values = [b"%03d" % i for i in range(100)]
    for value in values[:50]:
        producer.send("t", value)
    producer.flush()
    assert read(consumer, 50) == values[:50]
    consumer.commit()
    member = consumer.group_metadata()
    broker.child.process.kill()
    broker.child.process.wait()
    again = start_own_broker(tmp_path, port=port)
    futures = [producer.send("t", value) for value in values[50:]]
    assert all(future.get(120).offset >= 0 for future in futures)
    assert read(consumer, 50) == values[50:]
    consumer.commit()
    assert consumer.group_metadata() == member
    other = consumer_of(again, group_id="other")
    assert read(other, 100) == values
    wait_until(lambda: deleted(admin, "t"), "the deletion")
    assert admin.list_topics() == []
    for client in (producer, consumer, other, admin):
        client.close()
    again.child.stop(0)


@cuts
def test_retries_over_cut_connections_neither_lose_nor_double(tmp_path: Path) -> None:
    port = free_port()
    broker = start_own_broker(advertised=port)
    proxy = FlakyProxy(broker.port, port)
    admin = KafkaAdminClient(bootstrap_servers=f"127.0.0.1:{port}")
    admin.create_topics({"t": {"num_partitions": 1, "replication_factor": 1}}, wait_for_metadata=True)
    producer = KafkaProducer(bootstrap_servers=f"127.0.0.1:{port}", batch_size=0, reconnect_backoff_max_ms=50)
    futures = []
    for number in range(300):
        futures.append(producer.send("t", b"%d" % number))
        if number % 50 == 25:
            proxy.cut()
    offsets = [future.get(120).offset for future in futures]
    assert offsets == list(range(300))
    partition = TopicPartition("t", 0)
    consumer = consumer_of(broker, group_id=None)
    assert consumer.end_offsets([partition]) == {partition: 300}
    for client in (producer, admin, consumer):
        client.close()
    proxy.close()
    broker.child.stop(0)
