"""The topic of frames as the broker has it. To whoever polls, one that is deleted looks like one without records."""

from __future__ import annotations

import logging
import time
from typing import Any

from schemas.config import Kafka

log = logging.getLogger("driftkeel.consume")
PATIENCE_S = 2.0  # a broker that has just started may not know its topics yet; the client asks ten times a second


class FramesTopic:
    """Looks at what the client of a `KafkaConsumer` was told last. For the thread that polls."""

    def __init__(self, settings: Kafka, consumer: Any) -> None:
        self._topic, self._bootstrap, self._known = settings.topics.frames, settings.bootstrap, consumer._cluster
        self._gone_since: float | None = None
        self.trouble = ""  # why nothing is read, where it is gone

    def look(self) -> None:
        """Say so where it is gone, and where it is back."""
        if self._known.partitions_for_topic(self._topic) is not None:
            if self.trouble:
                log.warning("the broker at %s has topic %s again", self._bootstrap, self._topic)
            self._gone_since, self.trouble = None, ""
            return
        now = time.monotonic()
        self._gone_since = self._gone_since or now
        if not self.trouble and now - self._gone_since >= PATIENCE_S:
            self.trouble = f"the broker at {self._bootstrap} has no topic {self._topic} any more"
            log.error(
                "%s, and nothing is read; create another, best under a name of its own (kafka.topics.frames), or "
                "correct kafka.bootstrap: see docs/runbooks/other-topic.md",
                self.trouble,
            )
