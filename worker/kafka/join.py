"""A way around what kafka-python 3.0.12 does with a join of the consumer group that is over between two polls.

A join goes on while nobody polls, but only poll collects what came of it. Then poll finds it done and begins another,
for which the whole group joins again: members that do more between polls than wait in them may go on so for ever. And
where only new metadata asked for the join, poll finds nothing left to do: the member sends no heartbeats from then on,
loses its place, has no partitions, and no error says so.
"""

from __future__ import annotations

from typing import Any

PATIENCE_S = 0.1  # in poll, at least, while the group forms


def keep_joins(consumer: Any) -> None:
    """Have a `KafkaConsumer` find what came of a join that nobody has collected, rather than join once more."""
    coordinator = consumer._coordinator
    join, complete = coordinator._do_join_and_sync_async, coordinator._on_join_complete_async
    left: tuple[Any, Any] | None = None

    async def join_once() -> Any:
        nonlocal left
        if left is None or left[0] is not coordinator._generation:  # Or that membership is over.
            assignment = await join()
            left = coordinator._generation, assignment
        return left[1]

    async def collected(*arguments: Any) -> None:
        nonlocal left
        left = None
        await complete(*arguments)

    coordinator._do_join_and_sync_async, coordinator._on_join_complete_async = join_once, collected


def poll_timeout(consumer: Any, timeout_s: float) -> float:
    """How long the next poll of a `KafkaConsumer` is to take, so that it collects a join that is over or under way.

    Only from the thread that polls, between polls.
    """
    coordinator = consumer._coordinator
    if coordinator is None or not coordinator.rejoining:
        return timeout_s
    coordinator.request_rejoin()
    return max(timeout_s, PATIENCE_S)
