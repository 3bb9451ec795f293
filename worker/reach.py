"""Whether broker and store answer, watched by a thread of its own: the loop may wait for either, or have no frames."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from monitoring.metrics import WorkerMetrics
from schemas.config import WorkerConfig
from schemas.errors import UnreachableError
from worker.store.store import StateStore

log = logging.getLogger("driftkeel.reach")
LOOK_S = 2.0
SILENT_S = 30.0  # a broker that answers nothing for so long is away; an idle worker's asks many times in between
SAY_AGAIN_S = 300.0


class Reach:
    """Sets when each last answered in the metrics, and says so in the log where the broker does not.

    Nobody else would: the client's calls find nothing to read while it tries again.
    """

    def __init__(
        self,
        config: WorkerConfig,
        metrics: WorkerMetrics,
        broker_answered: Callable[[], float],
        store_serves: Callable[[], bool],
    ) -> None:
        """`broker_answered`: when, in monotonic seconds; `store_serves`: whether it did what the loop last asked for.
        Both are called from another thread."""
        self._bootstrap, self._metrics = config.kafka.bootstrap, metrics
        self._broker_answered, self._store_serves = broker_answered, store_serves
        self._store = StateStore(config.store)
        self._say_after = SILENT_S
        self.store_answers = True
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="reach", daemon=True)
        self._thread.start()

    @property
    def broker_answers(self) -> bool:
        """Whether it has lately."""
        return self._silence < SILENT_S

    def close(self) -> None:
        """Stop looking; a call to a store that hangs is not waited for."""
        self._done.set()
        self._thread.join(timeout=1)

    @property
    def _silence(self) -> float:
        return time.monotonic() - self._broker_answered()

    def _watch(self) -> None:
        try:
            while not self._done.is_set():
                self._look_at_broker()
                self._look_at_store()
                self._done.wait(LOOK_S)
        finally:
            self._store.close()

    def _look_at_broker(self) -> None:
        silence = self._silence
        self._metrics.broker_answered.set(time.time() - silence)
        if silence < SILENT_S:
            if self._say_after > SILENT_S:
                log.info("the broker at %s answers again", self._bootstrap)
            self._say_after = SILENT_S
        elif silence >= self._say_after:
            log.warning("the broker at %s has not answered for %.0f s; trying again", self._bootstrap, silence)
            self._say_after = silence + min(silence, SAY_AGAIN_S)

    def _look_at_store(self) -> None:
        try:
            self._store.ping()
            self.store_answers = self._store_serves()
        except UnreachableError:
            self.store_answers = False
        if self.store_answers:
            self._metrics.store_answered.set_to_current_time()
