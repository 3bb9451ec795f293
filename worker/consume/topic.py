"""The topic of frames as the broker has it: whether it is there, and whether it is the one that the store knows.

To whoever polls, one that is deleted looks like one without records, and one that was created again under its name goes
on where the old one was read to. Kafka gives every topic an id of its own; some brokers give none.
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
        """The id of the topic that positions are of; `found` is noted where none is. Raises UnreachableError."""


def another(settings: Kafka, found: str, noted: str) -> str:
    """What is wrong where the store has positions of a topic with another id, in a line."""
    topic = f"topic {settings.topics.frames} at {settings.bootstrap}"
    why = f"its id is {found}, and what the store has was read of {noted}"
    return f"{topic} was deleted and created again, or is another cluster's: {why}"


class FramesTopic:
    """Looks at what the client of a `KafkaConsumer` was told last. For the thread that polls."""

    def __init__(self, settings: Kafka, consumer: Any, notes: Notes) -> None:
        self._settings, self._consumer, self._notes = settings, consumer, notes
        self._topic = settings.topics.frames
        self._gone_since: float | None = None
        self._gone = self.other = ""
        self._checked = ""

    @property
    def trouble(self) -> str:
        """Why nothing is read; empty where nothing is wrong. `other`: because it is not the topic that was read before,
        and stays so until somebody has seen to it and this worker begins again."""
        return self._gone or self.other

    def look(self) -> None:
        """Say so where it is gone, and where it is back."""
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
        """Compare its id with the store's, which notes it once reading `begins`. Raises UnreachableError."""
        found = topic_id(metadata(self._consumer), self._topic)
        if self.other or not found or not (begins or found != self._checked):
            return
        noted = self._notes.topic_id(self._topic, found if begins else "")
        self._checked = found
        if noted and noted != found:
            self.other = another(self._settings, found, noted)
            log.error("%s; nothing of it is read; %s", self.other, REMEDY)
