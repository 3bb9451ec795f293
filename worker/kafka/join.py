"""A way around what kafka-python 3.0.12 does with a join of the consumer group that is over between two polls.

A join goes on while nobody polls, but only poll collects what came of it. Then poll finds it done and begins another,
for which the whole group joins again: members that do more between polls than wait in them may go on so for ever. And
where only new metadata asked for the join, poll finds nothing left to do: the member sends no heartbeats from then on,
loses its place, has no partitions, and no error says so.
"""

from __future__ import annotations

from typing import Any

PATIENCE_S = 0.1  # in poll, at least, while the group forms
DELAY_S = PATIENCE_S / 2  # long enough for poll to ask, short enough for it to wait


def poll_timeout(consumer: Any, timeout_s: float) -> float:
    """How long the next poll of a `KafkaConsumer` is to take, so that it collects a join that is over or under way.

    Only from the thread that polls, between polls.
    """
    coordinator = consumer._coordinator
    if coordinator is None or not coordinator.rejoining:
        return timeout_s
    coordinator.request_rejoin()
    joined, loop = coordinator._join_task, coordinator._net
    if joined is not None and joined.succeeded():

        async def once_more() -> Any:
            await loop.sleep(DELAY_S)
            return joined.value

        coordinator._join_task = loop.call_soon_with_future(once_more)
    return max(timeout_s, PATIENCE_S)
