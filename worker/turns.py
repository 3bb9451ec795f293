"""Whose frames are decoded next."""

from __future__ import annotations

from collections import Counter
from typing import Any

Arrived = tuple[float, Any]  # when a record came, monotonic seconds, and the record


class Turns:
    """Streams take turns, so that one camera's heavy pictures do not hold up another's."""

    def __init__(self) -> None:
        self._turn = 0
        self._served: dict[bytes | None, int] = {}  # the last turn of streams that wait for their next

    def take(self, waiting: list[Arrived], most: int) -> tuple[list[Arrived], list[Arrived]]:
        """The next of these, at most `most`, as many of each stream as of any other where it has them; and the others.

        Both in the order in which they came. Where there is not a turn for all, streams that waited longest come first.
        """
        if len(waiting) <= most:
            self._served.clear()
            return waiting, []
        seen: Counter[bytes | None] = Counter()
        ranks = []
        for _, record in waiting:
            ranks.append((seen[record.key], self._served.get(record.key, 0)))
            seen[record.key] += 1
        chosen = set(sorted(range(len(waiting)), key=ranks.__getitem__)[:most])
        now = [waiting[i] for i in sorted(chosen)]
        self._turn += 1
        self._served |= dict.fromkeys((record.key for _, record in now), self._turn)
        self._served = {key: turn for key, turn in self._served.items() if key in seen}
        return now, [arrived for i, arrived in enumerate(waiting) if i not in chosen]
