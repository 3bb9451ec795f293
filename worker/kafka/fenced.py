"""Has poll raise when a heartbeat's answer says that another member has taken this one's static name.

kafka-python 3.0.12 sends no more heartbeats then, and raises nothing: the member goes on reading partitions that
another has, until it next has something to commit.
"""

from __future__ import annotations

from typing import Any

from kafka.errors import FencedInstanceIdError


def raise_when_fenced(consumer: Any) -> None:
    """Have poll of a `KafkaConsumer` raise FencedInstanceIdError after a heartbeat, as it does after a commit."""
    coordinator = consumer._coordinator
    handle = coordinator._handle_heartbeat_response

    def heard(*arguments: Any) -> Any:
        try:
            return handle(*arguments)
        except FencedInstanceIdError:
            coordinator._async_commit_fenced = True
            raise

    coordinator._handle_heartbeat_response = heard
