"""Calls of the store that are repeated until it answers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from schemas.errors import UnreachableError
from worker.kafka.client import FIRST_PAUSE_S, LONGEST_PAUSE_S
from worker.log import Trouble

log = logging.getLogger("driftkeel.worker")
Result = TypeVar("Result")


class StoreRetry:
    """`retry(action)` calls `action` until it raises no UnreachableError. Belongs to the worker's loop, which stands
    still meanwhile: `keep_alive` is called all the time, to stay in the consumer group.

    `answers`: whether the last call succeeded. From any thread.
    """

    def __init__(
        self, address: str, stop: threading.Event, keep_alive: Callable[[], object], failed: Callable[[], object]
    ) -> None:
        """`failed` hears of every call that failed, to count them."""
        self._address, self._stop, self._keep_alive, self._failed = address, stop, keep_alive, failed
        self._trouble = Trouble(log)
        self.answers = True

    def __call__(self, action: Callable[[], Result]) -> Result:
        """What `action` returns. Raises UnreachableError only once the worker is to stop."""
        pause = FIRST_PAUSE_S
        while True:
            try:
                result = action()
                self._trouble.is_over("the store at %s answers again", self._address)
                self.answers = True
                return result
            except UnreachableError as error:
                self.answers = False
                self._failed()
                self._trouble.goes_on(str(error), "%s; trying again until it answers", error)
            resume = time.monotonic() + pause
            while time.monotonic() < resume:
                if self._stop.is_set():
                    raise UnreachableError(f"the store at {self._address} does not answer")
                self._keep_alive()
            pause = min(2 * pause, LONGEST_PAUSE_S)
