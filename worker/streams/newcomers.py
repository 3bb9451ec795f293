"""How many new streams may begin (`store.max_streams`).

Without a limit, a sender that makes up a key for each frame would fill the store, and a full store stops all streams.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger("driftkeel.streams")
SHARE = 10  # one part in so many of the room is given away before the store's streams are counted again
COUNT_AGAIN_S = 60.0  # after there was no room


class Newcomers:
    """Counts the store's streams as seldom as possible: a tenth of the room is given away before the next count. All
    workers do so on their own, so that several of them may exceed the limit, by some percent each."""

    def __init__(self, most: int, count: Callable[[], int]) -> None:
        self._most, self._count = most, count
        self._share = 0
        self._full_until = 0.0

    def admit(self, wanted: int) -> int:
        """How many of the `wanted` new streams may begin."""
        given = 0
        while given < wanted and (self._share or self._counted(given)):
            step = min(self._share, wanted - given)
            self._share -= step
            given += step
        return given

    def _counted(self, given: int) -> int:
        """The next share; 0 where there is no room. `given`: streams that may begin and are not in the store yet."""
        if time.monotonic() < self._full_until:
            return 0
        found = self._count()
        room = self._most - found - given
        if room <= 0:
            self._full_until = time.monotonic() + COUNT_AGAIN_S
            log.error(
                "the store has %d streams of at most %d (store.max_streams): no new one begins", found, self._most
            )
            return 0
        self._share = max(1, room // SHARE)
        return self._share
