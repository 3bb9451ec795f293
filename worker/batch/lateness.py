"""What becomes of frames that have used too much of `batch.latency_budget_ms`."""

from __future__ import annotations

import logging
import math
import time

from schemas.config import Batch

log = logging.getLogger("driftkeel.worker")
HURRIED_AFTER = 0.5  # of the budget; the rest is for the pass, and for what follows it
SPARE = 0.05  # of the budget, by which a pass may take longer than those before it
HALF_LIFE_S = 3.0  # of what is known of the longest pass


class Lateness:
    """Times are seconds: `sent` and `now` since the epoch, `received` monotonic. Without a budget nothing is late."""

    def __init__(self, settings: Batch) -> None:
        self.drops, self.budget_ms = settings.drop_late, settings.latency_budget_ms
        self._budget = settings.latency_budget_ms / 1000
        # Midway between when frames go anyway and when they are hurried, so that the next ones need not be.
        hurried_ms = HURRIED_AFTER * settings.latency_budget_ms
        if 0 < hurried_ms <= settings.max_wait_ms:
            log.warning(
                "batch.max_wait_ms %d is half of batch.latency_budget_ms %d or more: frames that wait so long are only "
                "predicted, and teach nothing, however idle the worker is; lower max_wait_ms, or raise the budget",
                settings.max_wait_ms,
                settings.latency_budget_ms,
            )
        self.spared_after_ms = round((hurried_ms + min(settings.max_wait_ms, hurried_ms)) / 2)
        self._pass, self._ended = 0.0, 0.0

    def took(self, seconds: float, ended: float) -> None:
        """A pass took so long from its beginning until its predictions left, at `ended` since the epoch."""
        # A longer one would drop frames that are not hurried yet.
        most = (1 - SPARE - HURRIED_AFTER) * self._budget
        self._pass, self._ended = min(most, max(seconds, self._longest(ended))), ended

    def spared(self, sent: float, received: float, now: float) -> bool:
        """Whether a frame makes no update, for the sake of those behind it; all else is done as ever."""
        return self._budget > 0 and 1000 * _waited(sent, received, now) > self.spared_after_ms

    def hurried(self, sent: float, received: float, now: float) -> bool:
        """Whether a frame is predicted as fast as can be, and teaches nothing."""
        return self._budget > 0 and _waited(sent, received, now) > HURRIED_AFTER * self._budget

    def dropped(self, sent: float, received: float, now: float) -> bool:
        """Whether a frame is passed over, as its prediction would come too late; none is before it is hurried."""
        return self.drops and _waited(sent, received, now) + self._longest(now) > (1 - SPARE) * self._budget

    def _longest(self, now: float) -> float:
        """The longest pass of late. It fades by the clock: where all frames are dropped no other pass corrects it."""
        return self._pass * math.exp2(-max(0.0, now - self._ended) / HALF_LIFE_S)


def _waited(sent: float, received: float, now: float) -> float:
    """Since it was sent; at least as long as it is here, as the sender's clock may be ahead, and a record need not say
    when that was."""
    here = time.monotonic() - received
    return max(here, now - sent) if sent > 0 else here
