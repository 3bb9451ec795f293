"""The frames topic as the broker has it: whether it exists, and whether it is the one that the store has positions of.

To whoever polls, a deleted topic looks like one without records, and one that was created again under its name goes on
where the old one was read to. Kafka gives every topic an id of its own; some brokers do not.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Protocol

from schemas.config import Kafka
from worker.consume.short_logs import REMEDY
from worker.kafka.inside import metadata
from worker.kafka.topic import topic_id

log = logging.getLogger("driftkeel.consume")
PATIENCE_S = 2.0  # a broker that has just started may not know its topics yet; the client asks ten times a second


class Notes(Protocol):
    """What the store knows of topics."""

    def topic_id(self, topic: str, found: str = "") -> str:
        """The id of the topic that positions are of; if none is noted yet, `found` is. Raises UnreachableError."""


def another(settings: Kafka, found: str, noted: str) -> str:
    """The line that says that the store has positions of a topic with another id."""
    topic = f"topic {settings.topics.frames} at {settings.bootstrap}"
    why = f"its id is {found}, and what the store has was read of {noted}"
    return f"{topic} was deleted and created again, or is another cluster's: {why}"


class FramesTopic:
    """Looks at the newest metadata of a consumer. For the thread that polls."""

    def __init__(self, settings: Kafka, consumer: Any, notes: Notes) -> None:
        self._settings, self._consumer, self._notes = settings, consumer, notes
        self._topic = settings.topics.frames
        self._gone_since: float | None = None
        self._gone = self.other = ""
        self._checked = ""

    @property
    def trouble(self) -> str:
        """Why nothing is read; empty where nothing is wrong. `other` is the reason where the topic is not the one that
        was read before. It stays until somebody has mended that and restarts this worker."""
        return self._gone or self.other

    def look(self) -> None:
        """Log that the topic is gone, and that it is back."""
        bootstrap = self._settings.bootstrap
        if metadata(self._consumer).partitions_for_topic(self._topic) is not None:
            if self._gone:
                log.warning("the broker at %s has topic %s again", bootstrap, self._topic)
            self._gone_since, self._gone = None, ""
            return
        now = time.monotonic()
        self._gone_since = self._gone_since or now
        if not self._gone and now - self._gone_since >= PATIENCE_S:
            self._gone = f"the broker at {bootstrap} has no topic {self._topic} any more"
            log.error(
                "%s, and nothing is read; create another, best under a name of its own (kafka.topics.frames), or "
                "correct kafka.bootstrap: see docs/runbooks/other-topic.md",
                self._gone,
            )

    def check(self, begins: bool) -> None:
        """Compare the topic's id with the one in the store, which notes it when reading `begins`. Raises
        UnreachableError."""
        found = topic_id(metadata(self._consumer), self._topic)
        if self.other or not found or not (begins or found != self._checked):
            return
        noted = self._notes.topic_id(self._topic, found if begins else "")
        self._checked = found
        if noted and noted != found:
            self.other = another(self._settings, found, noted)
            log.error("%s; nothing of it is read; %s", self.other, REMEDY)
