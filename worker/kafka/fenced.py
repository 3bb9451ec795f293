"""A way around what kafka-python 3.0.12 does where a heartbeat says that another member has taken this one's name.

It sends no more heartbeats, and tells nobody: the member goes on reading partitions that are another's, until it next
has something to commit.
"""

from __future__ import annotations

from typing import Any

from kafka.errors import FencedInstanceIdError


def raise_when_fenced(consumer: Any) -> None:
    """From its next heartbeat on, poll of this `KafkaConsumer` raises FencedInstanceIdError, as it does after a commit
    that says so."""
    coordinator = consumer._coordinator
    handle = coordinator._handle_heartbeat_response

    def heard(*arguments: Any) -> Any:
        try:
            return handle(*arguments)
        except FencedInstanceIdError:
            coordinator._async_commit_fenced = True
            raise

    coordinator._handle_heartbeat_response = heard
