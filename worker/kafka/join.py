"""Has poll use the result of a group join that has ended between two polls.

In kafka-python 3.0.12 a join goes on between polls, but only poll collects its result. A poll that finds the join over
begins another one, for which the whole group joins again. Members that do more between polls than they wait in them may
rebalance for ever. And where the join was only for new metadata, poll finds nothing left to do: the member sends no
heartbeats from then on, loses its partitions, and no error says so.
"""

from __future__ import annotations

from typing import Any

PATIENCE_S = 0.1  # the least time of a poll while the group forms


def keep_joins(consumer: Any) -> None:
    """Have a `KafkaConsumer` keep the result of a join until poll collects it, rather than join again."""
    coordinator = consumer._coordinator
    join, complete = coordinator._do_join_and_sync_async, coordinator._on_join_complete_async
    left: tuple[Any, Any] | None = None

    async def join_once() -> Any:
        nonlocal left
        if left is None or left[0] is not coordinator._generation:  # The latter: the membership it was for is over.
            assignment = await join()
            left = coordinator._generation, assignment
        return left[1]

    async def collected(*arguments: Any) -> None:
        nonlocal left
        left = None
        await complete(*arguments)

    coordinator._do_join_and_sync_async, coordinator._on_join_complete_async = join_once, collected


def poll_timeout(consumer: Any, timeout_s: float) -> float:
    """How long the next poll of a `KafkaConsumer` has to take to collect a join that is over or under way. For the
    thread that polls, between polls."""
    coordinator = consumer._coordinator
    if coordinator is None or not coordinator.rejoining:
        return timeout_s
    coordinator.request_rejoin()
    return max(timeout_s, PATIENCE_S)
