"""The consumer in groups as Kafka has them, while the worker's loop is busy with other things than polling."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from kafka import KafkaAdminClient, KafkaConsumer
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from kafka.protocol.consumer.metadata import ConsumerProtocolAssignment

from monitoring.metrics import WorkerMetrics
from schemas.config import Kafka
from schemas.errors import ConfigError
from tests.broker.process import bootstrap as bootstrap  # a fixture
from tests.servers import wait_until
from tests.worker.consume.test_consume import Notes
from worker.consume import group as consume
from worker.consume.assignors import GivesUpFirst
from worker.consume.consumer import FrameConsumer
from worker.consume.offsets import Offsets
from worker.kafka.join import keep_joins, poll_timeout

BUSY_S = 0.03  # longer than a broker needs to answer


@pytest.fixture
def make(kafka_settings: Kafka, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FrameConsumer]]:
    monkeypatch.setattr(consume, "METADATA_MAX_AGE_MS", 300)
    made: list[FrameConsumer] = []

    def build(assignment: str, **changes: str) -> FrameConsumer:
        settings = kafka_settings.model_copy(update={"assignment": assignment, **changes})
        made.append(FrameConsumer(settings, Offsets(), Notes(), threading.Event(), WorkerMetrics(1)))
        return made[-1]

    yield build
    for consumer in made:
        consumer.close()


def busy_until(condition: Callable[[], bool], what: str, *consumers: FrameConsumer) -> None:
    """As a loop with steps under way: it only looks in, and then does something else."""

    def look_in() -> bool:
        for consumer in consumers:
            consumer.poll(0.0)
        time.sleep(BUSY_S)
        return condition()

    wait_until(look_in, what)


@pytest.mark.parametrize("assignment", ["range", "cooperative-sticky"])
def test_busy_members_share_partitions(make: Callable[..., FrameConsumer], assignment: str) -> None:
    first, second = make(assignment), make(assignment)
    busy_until(lambda: len(first.assignment()) == 3, "all partitions", first)
    busy_until(lambda: {len(first.assignment()), len(second.assignment())} == {1, 2}, "shared", first, second)
    assert not first.assignment() & second.assignment()


def test_a_join_that_is_over_as_a_poll_begins_is_not_begun_again(
    make: Callable[..., FrameConsumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = make("range")
    coordinator = consumer.consumer._coordinator
    assert coordinator.ensure_coordinator_ready(timeout_ms=120_000)
    coordinator.rejoining = True

    def join() -> bool:
        """As a poll leaves it that is over before. The first only says what name to join by."""
        coordinator._join_task = coordinator._manager.call_soon(coordinator._do_join_and_sync_async)
        wait_until(lambda: coordinator._join_task.is_done, "the answer to a join")
        return bool(coordinator._join_task.succeeded())

    def late(client: KafkaConsumer, timeout_s: float) -> float:
        timeout_s = poll_timeout(client, timeout_s)
        if joining := coordinator._join_task:
            wait_until(lambda: joining.is_done, "the end of the join")
        return timeout_s

    wait_until(join, "a join")
    monkeypatch.setattr(consume, "poll_timeout", late)
    busy_until(lambda: len(consumer.assignment()) == 3, "all partitions", consumer)
    assert consumer.consumer.group_metadata().generation_id == 1


@pytest.mark.parametrize("assignment", ["range", "cooperative-sticky"])
def test_a_member_without_partitions_has_joined(make: Callable[..., FrameConsumer], assignment: str) -> None:
    members = [make(assignment) for _ in range(4)]
    assert not any(member.joined for member in members)

    def shared() -> bool:
        return sorted(len(member.assignment()) for member in members) == [0, 1, 1, 1]

    busy_until(
        lambda: shared() and all(member.joined for member in members), "a member for each and one idle", *members
    )


@pytest.mark.parametrize(("old", "new"), [("range", "cooperative-sticky"), ("cooperative-sticky", "range")])
def test_members_change_to_another_assignment_one_at_a_time(
    make: Callable[..., FrameConsumer], old: str, new: str
) -> None:
    """As a rollout does it: all partitions are shared at every step, by the new rules once the last old one went."""
    group = [make(old), make(old)]
    busy_until(lambda: shared(group, old), "shared by the old rules", *group)
    for _ in range(2):
        group.append(make(new))
        busy_until(lambda: shared(group, "cooperative-sticky"), "shared by old and new", *group)
        group.pop(0).close()
        busy_until(lambda: sum(len(member.assignment()) for member in group) == 3, "the old one's taken over", *group)
    busy_until(lambda: shared(group, new), "shared by the new rules", *group)


def shared(group: list[FrameConsumer], rules: str) -> bool:
    """Whether these have all three partitions, none of them twice, each at least one, and by these rules."""
    parts = [member.assignment() for member in group]
    used = {member.consumer._coordinator._generation.protocol for member in group}
    return all(parts) and sum(map(len, parts)) == len(set.union(*parts)) == 3 and used == {rules}


def test_who_gives_up_first_says_that_it_owns_nothing() -> None:
    """A leader would else wait until it gives up what another is to have, and it has no second round in which to."""
    owned = {}
    for assignor in (CooperativeStickyAssignor(), GivesUpFirst()):
        assignor.on_assignment(ConsumerProtocolAssignment(1, [("frames", [0, 2])], b""), 1)
        owned[type(assignor)] = [part.partitions for part in assignor.metadata({"frames"}).owned_partitions]
    assert owned == {CooperativeStickyAssignor: [[0, 2]], GivesUpFirst: []}


def test_a_group_of_another_program_is_named(make: Callable[..., FrameConsumer], kafka_settings: Kafka) -> None:
    other = KafkaConsumer(
        kafka_settings.topics.frames,
        bootstrap_servers=kafka_settings.bootstrap,
        group_id=kafka_settings.group,
        partition_assignment_strategy=[RoundRobinPartitionAssignor],
    )
    keep_joins(other)  # Or, on a busy machine, it joins for ever, or not at all.
    wait_until(
        lambda: bool(other.poll(1000 * poll_timeout(other, 0.1)) or other.assignment()), "the other's partitions"
    )
    with pytest.raises(
        ConfigError, match=rf"group {kafka_settings.group} at .* share no partitions with kafka.assignment"
    ):
        busy_until(lambda: False, "the refusal", make("range"))
    other.close()


def test_who_has_lost_its_name_to_another_hears_of_it_with_nothing_to_commit(
    make: Callable[..., FrameConsumer], kafka_settings: Kafka
) -> None:
    first = make("range", static_member="hall-1")
    busy_until(lambda: len(first.assignment()) == 3, "all partitions", first)
    second = make("range", static_member="hall-1")
    busy_until(lambda: len(second.assignment()) == 3, "the place of the first", second)
    with pytest.raises(ConfigError, match=r"another worker has joined group .* as kafka\.static_member hall-1"):
        busy_until(lambda: False, "the end of the first", first, second)
    second.poll(0.0)
    assert len(second.assignment()) == 3


@pytest.mark.parametrize("assignment", ["range", "cooperative-sticky"])
def test_partitions_added_while_running(
    make: Callable[..., FrameConsumer], kafka_settings: Kafka, assignment: str
) -> None:
    """Found by itself; the next member's arrival shows that the group goes on."""
    first, topic = make(assignment), kafka_settings.topics.frames
    busy_until(lambda: len(first.assignment()) == 3, "all partitions", first)
    admin = KafkaAdminClient(bootstrap_servers=kafka_settings.bootstrap)
    admin.create_partitions({topic: 5})
    admin.close()
    busy_until(lambda: len(first.assignment()) == 5, "the new partitions", first)
    second = make(assignment)
    busy_until(lambda: {len(first.assignment()), len(second.assignment())} == {2, 3}, "shared", first, second)
    assert first.assignment() | second.assignment() == {(topic, number) for number in range(5)}
