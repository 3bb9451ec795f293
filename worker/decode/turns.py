"""Which stream's frames are decoded next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Key = bytes | None
One = TypeVar("One")


class RoundRobin(Generic[One]):
    """Queues by stream that take turns, so that one camera's many pictures do not hold up another's."""

    def __init__(self) -> None:
        self._waiting: dict[Key, deque[One]] = {}  # in the order of the next turns

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, key: Key, one: One) -> None:
        """Put one behind those of the same stream. A stream that had none has its turn after all others."""
        self._waiting.setdefault(key, deque()).append(one)

    def next(self) -> One:
        """The first of the stream whose turn it is. Something must be waiting."""
        key = next(iter(self._waiting))
        queue = self._waiting.pop(key)
        one = queue.popleft()
        if queue:
            self._waiting[key] = queue
        return one

    def drop(self, gone: Callable[[One], bool]) -> None:
        """Remove those that are `gone`."""
        kept = {key: deque(one for one in queue if not gone(one)) for key, queue in self._waiting.items()}
        self._waiting = {key: queue for key, queue in kept.items() if queue}
