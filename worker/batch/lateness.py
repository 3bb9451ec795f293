"""Which frames have used too much of `batch.latency_budget_ms`: first they make no update (spared), then they are only
predicted (hurried), and with `batch.drop_late` they are dropped in the end."""

from __future__ import annotations

import logging
import math
import time

from schemas.config import Batch

log = logging.getLogger("driftkeel.worker")
HURRIED_AFTER = 0.5  # share of the budget; the rest is for the pass and for what follows it
SPARE = 0.05  # share of the budget by which a pass may take longer than those before it
HALF_LIFE_S = 3.0  # in which the measured duration of the longest pass fades


class Lateness:
    """Times are seconds: `sent` and `now` since the epoch, `received` monotonic. Without a budget nothing is late."""

    def __init__(self, settings: Batch) -> None:
        self.drops, self.budget_ms = settings.drop_late, settings.latency_budget_ms
        self._budget = settings.latency_budget_ms / 1000
        # Midway between max_wait_ms, when frames go anyway, and hurrying: leaving out updates then may avoid that.
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
        """A pass took so long from its beginning until its predictions were sent, at `ended` since the epoch."""
        # Capped, because a longer pass would drop frames that are not even hurried yet.
        most = (1 - SPARE - HURRIED_AFTER) * self._budget
        self._pass, self._ended = min(most, max(seconds, self._longest(ended))), ended

    def spared(self, sent: float, received: float, now: float) -> bool:
        """Whether a frame makes no update, to save time for those behind it. All else is done as usual."""
        return self._budget > 0 and 1000 * _waited(sent, received, now) > self.spared_after_ms

    def hurried(self, sent: float, received: float, now: float) -> bool:
        """Whether a frame is predicted as fast as possible and teaches nothing."""
        return self._budget > 0 and _waited(sent, received, now) > HURRIED_AFTER * self._budget

    def dropped(self, sent: float, received: float, now: float) -> bool:
        """Whether a frame is dropped because its prediction would come too late. Only hurried frames are."""
        return self.drops and _waited(sent, received, now) + self._longest(now) > (1 - SPARE) * self._budget

    def _longest(self, now: float) -> float:
        """The longest recent pass. It fades with time, because no further pass corrects it while all frames are
        dropped."""
        return self._pass * math.exp2(-max(0.0, now - self._ended) / HALF_LIFE_S)


def _waited(sent: float, received: float, now: float) -> float:
    """Seconds since the frame was sent. At least those since it was received: the sender's clock may be ahead, and a
    record need not have a timestamp."""
    here = time.monotonic() - received
    return max(here, now - sent) if sent > 0 else here
