"""What becomes of frames that have used too much of `batch.latency_budget_ms`."""

from __future__ import annotations

import time

from schemas.config import Batch

HURRIED_AFTER = 0.5  # of the budget; the rest is for the pass, and for what follows it
FORGETS = 0.98  # of the longest pass of late, with each further one


class Lateness:
    """Times are seconds: `sent` and `now` since the epoch, `received` monotonic. Without a budget nothing is late."""

    def __init__(self, settings: Batch) -> None:
        self._budget = settings.latency_budget_ms / 1000
        self._pass = 0.0
        self.drops = settings.drop_late

    def took(self, seconds: float) -> None:
        """A pass took so long from its beginning until its predictions left."""
        self._pass = max(seconds, FORGETS * self._pass)

    def hurried(self, sent: float, received: float, now: float) -> bool:
        """Whether a frame is predicted as fast as can be, and teaches nothing."""
        return self._budget > 0 and _waited(sent, received, now) > HURRIED_AFTER * self._budget

    def dropped(self, sent: float, received: float, now: float) -> bool:
        """Whether a frame is left without a prediction, which would come too late; never before it is hurried, or a
        worker whose passes take longer than the budget would answer nothing for ever."""
        if not (self.drops and self.hurried(sent, received, now)):
            return False
        return _waited(sent, received, now) + self._pass > self._budget


def _waited(sent: float, received: float, now: float) -> float:
    return now - sent if sent > 0 else time.monotonic() - received  # a record need not say when it was sent
