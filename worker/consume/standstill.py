"""Partitions that bring nothing although they have more: to whoever polls, a stuck client looks like one without
records."""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Iterable, Set
from typing import Any

from worker.consume.offsets import Partition
from worker.kafka.inside import assigned

log = logging.getLogger("driftkeel.consume")
STUCK_AFTER_S = 60.0


class Standstill:
    """Knows since when each partition has brought nothing. For the thread that polls."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._since: dict[Partition, float] = {}
        self.stuck: Set[Partition] = frozenset()  # those that have brought nothing for STUCK_AFTER_S

    def polled(self, arrived: Container[Partition], passed_over: Iterable[Partition]) -> None:
        """Call it after each poll, with the partitions that `arrived`; those `passed_over` are not read on purpose."""
        now = time.monotonic()
        unread = self._unread().difference(passed_over)
        self._since = {p: now if p in arrived else self._since.get(p, now) for p in unread}
        stuck = {p for p, since in self._since.items() if now - since >= STUCK_AFTER_S}
        for topic, number in sorted(stuck - self.stuck):
            log.error(
                "nothing has come of partition %d of %s for %.0f s, and that is not its end; "
                "if the broker is well, restart this worker",
                *(number, topic, STUCK_AFTER_S),
            )
        self.stuck = stuck

    def _unread(self) -> set[Partition]:
        """Partitions that are fetched and, by the last fetch, go on behind what was taken of them."""
        return {where for where, state in assigned(self._consumer).items() if _goes_on(state)}


def _goes_on(state: Any) -> bool:
    if state.paused or state.position is None:
        return False
    return state.highwater is None or state.highwater > state.position.offset
