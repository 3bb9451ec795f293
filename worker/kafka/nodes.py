"""Nodes of a cluster that are gone, as each is for a while in a rolling upgrade; kafka-python 3.0.12 has three flaws.

It raises UnknownBrokerIdError where it would send to a node that newer metadata does not name, and nothing in it
catches that. A poll ends with it, as if the broker refused to go on; and what was about to be sent is never heard of
again: a producer waits for ever for its acknowledgement, a consumer for its fetch.

While a group's coordinator is known but cannot be reached, it asks for the coordinator a thousand times a second.

And it takes a connection that ends before the node has said anything for one that was made: it connects again without
a pause, where something in front of the node, such as a load balancer, takes connections that lead nowhere.
"""

from __future__ import annotations

from typing import Any

from kafka.coordinator.base import BaseCoordinator
from kafka.errors import NodeNotReadyError, UnknownBrokerIdError
from kafka.net.manager import KafkaConnectionManager


def wait_for_gone_nodes() -> None:
    """Treat them as nodes that cannot be reached: later, and with newer metadata. From here on, in this process. Again
    does nothing."""
    connect, ask = KafkaConnectionManager.get_connection, BaseCoordinator._send_group_coordinator_request
    begin = KafkaConnectionManager._connect
    if getattr(connect, "waiting", False):
        return

    def get_connection(manager: Any, node: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return connect(manager, node, *arguments, **options)
        except UnknownBrokerIdError as error:
            manager.update_backoff(node)  # By which a group's coordinator is known to be lost, and asked for anew.
            manager.cluster.request_update()
            raise NodeNotReadyError(node) from error

    async def make(
        manager: Any, node: Any, conn: Any, reset_backoff_on_connect: bool = True, timeout_at: float | None = None
    ) -> None:
        before = manager._backoff.get(node.node_id)
        await begin(manager, node, conn, reset_backoff_on_connect=False, timeout_at=timeout_at)
        if not reset_backoff_on_connect:
            return  # Who asks for that sees to the pauses.
        if conn.connected:
            manager.reset_backoff(node.node_id)
        elif manager._backoff.get(node.node_id) is before:
            manager.update_backoff(node.node_id)

    async def find(coordinator: Any) -> Any:
        node = await ask(coordinator)
        if (delay := coordinator._manager.connection_delay(node)) > 0:
            await coordinator._manager._net.sleep(delay)
        return node

    get_connection.waiting = True  # type: ignore[attr-defined]
    KafkaConnectionManager.get_connection, KafkaConnectionManager._connect = get_connection, make
    BaseCoordinator._send_group_coordinator_request = find
