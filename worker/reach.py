"""Whether broker and store answer, and whether the broker takes what is published. A thread of its own watches that,
because the loop may be waiting for either, or have no frames."""

from __future__ import annotations

import logging
import threading
import time

from monitoring.metrics import WorkerMetrics
from schemas.config import WorkerConfig
from schemas.errors import UnreachableError
from worker.consume.consumer import FrameConsumer
from worker.log import SAY_AGAIN_S
from worker.publish.publisher import Publisher
from worker.store.retry import StoreRetry
from worker.store.store import StateStore

log = logging.getLogger("driftkeel.reach")
LOOK_S = 2.0
# A broker that answers nothing for so long is away: even an idle worker's client asks many times in between. A broker
# that answers, and takes no record for so long, refuses them; a worker that cannot publish stores and commits nothing.
SILENT_S = 30.0


class Reach:
    """Sets the metrics of when each last answered, and logs that the broker is away or takes nothing.

    Nobody else would notice: the client retries by itself, and its calls look as if there was nothing to read.
    """

    def __init__(
        self,
        config: WorkerConfig,
        metrics: WorkerMetrics,
        consumer: FrameConsumer,
        publisher: Publisher,
        retry: StoreRetry,
    ) -> None:
        self._bootstrap, self._address, self._metrics = config.kafka.bootstrap, config.store.address, metrics
        self._consumer, self._publisher, self._retry = consumer, publisher, retry
        self._store = StateStore(config.store)
        self._say_after = SILENT_S
        self._refuses = False
        self._store_answers = True
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="reach", daemon=True)
        self._thread.start()

    def trouble(self) -> list[str]:
        """What is wrong with broker or store, if anything."""
        silence = self._silence
        away = f"the broker at {self._bootstrap} has not answered for {silence:.0f} s" if silence >= SILENT_S else ""
        store = "" if self._store_answers else f"the store at {self._address} does not answer"
        return [text for text in (away or self._refusal(), store) if text]

    def close(self) -> None:
        """Stop watching. A call of a store that hangs is waited for no longer than a second."""
        self._done.set()
        self._thread.join(timeout=1)

    @property
    def _silence(self) -> float:
        return time.monotonic() - self._consumer.answered()

    def _refusal(self) -> str:
        """What is wrong where the broker does not take what is published; empty where it does."""
        seconds, reason = self._publisher.untaken()
        if seconds < SILENT_S:
            return ""
        said = f": {reason}" if reason else ""
        return f"the broker at {self._bootstrap} has not taken what is published for {seconds:.0f} s{said}"

    def _watch(self) -> None:
        try:
            while not self._done.is_set():
                self._look_at_broker()
                self._look_at_publishing()
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

    def _look_at_publishing(self) -> None:
        refusal, refused = self._refusal(), self._refuses
        self._refuses = bool(refusal)
        if refusal and not refused:
            log.warning("%s; not ready until it does", refusal)
        elif refused and not refusal:
            log.info("the broker at %s takes records again", self._bootstrap)

    def _look_at_store(self) -> None:
        try:
            self._store.ping()
            self._store_answers = self._retry.answers
        except UnreachableError:
            self._store_answers = False
        if self._store_answers:
            self._metrics.store_answered.set_to_current_time()
