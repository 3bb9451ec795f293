"""Has clients wait for nodes of a cluster that are gone, as each is for a while in a rolling upgrade.

kafka-python 3.0.12 has three flaws there:

- It raises UnknownBrokerIdError where it would send to a node that newer metadata does not name, and catches that
  nowhere. A poll ends with it as with a fatal error; and what was to be sent is lost without a word: a producer waits
  for ever for the acknowledgement, a consumer for the fetch.
- While a group's coordinator is known and cannot be reached, it looks for the coordinator a thousand times a second.
- It takes a connection for established although it ended before the node has answered anything. If something in front
  of a node, such as a load balancer, accepts connections that lead nowhere, it connects again without a pause.
"""

from __future__ import annotations

from typing import Any

from kafka.coordinator.base import BaseCoordinator
from kafka.errors import NodeNotReadyError, UnknownBrokerIdError
from kafka.net.manager import KafkaConnectionManager


def wait_for_gone_nodes() -> None:
    """Patch this process: requests to nodes that are gone are tried again later, with newer metadata. Calling it again
    does nothing."""
    connect, ask = KafkaConnectionManager.get_connection, BaseCoordinator._send_group_coordinator_request
    begin = KafkaConnectionManager._connect
    if getattr(connect, "waiting", False):
        return

    def get_connection(manager: Any, node: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return connect(manager, node, *arguments, **options)
        except UnknownBrokerIdError as error:
            manager.update_backoff(node)  # By this a group's coordinator is known to be lost, and looked for again.
            manager.cluster.request_update()
            raise NodeNotReadyError(node) from error

    async def make(
        manager: Any, node: Any, conn: Any, reset_backoff_on_connect: bool = True, timeout_at: float | None = None
    ) -> None:
        before = manager._backoff.get(node.node_id)
        await begin(manager, node, conn, reset_backoff_on_connect=False, timeout_at=timeout_at)
        if not reset_backoff_on_connect:
            return  # A caller that passes False sees to the pauses itself.
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
