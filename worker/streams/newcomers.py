"""How many streams may still begin, where the store is to have so many at most.

A sender that makes up a key for each frame would otherwise fill the store, and a full store stops every stream.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger("driftkeel.streams")
SHARE = 10
COUNT_AGAIN_S = 60.0  # where there was no room


class Newcomers:
    """Counts the store's streams when it has to, seldom: a tenth of the room that was there is given away before it is
    counted again. As every worker does the same, several of them may go over the limit, by some percent each."""

    def __init__(self, most: int, count: Callable[[], int]) -> None:
        self._most, self._count = most, count
        self._share = 0
        self._full_until = 0.0

    def admit(self, wanted: int) -> int:
        """How many of so many new streams may begin."""
        given = 0
        while given < wanted and (self._share or self._counted(given)):
            step = min(self._share, wanted - given)
            self._share -= step
            given += step
        return given

    def _counted(self, given: int) -> int:
        """The next share; 0 where there is no room. `given`: streams that begin and are not in the store yet."""
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
