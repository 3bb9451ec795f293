"""In which partitions streams were met: what is forgotten with one that goes, and what is read again."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from schemas.errors import FrameError
from schemas.frame import Frame
from worker.consume.offsets import Partition
from worker.parts import Parts

log = logging.getLogger("driftkeel.worker")


class Partitions:
    """Keeps what is in memory in step with the partitions that the broker has given this worker."""

    def __init__(self, parts: Parts, max_streams: int) -> None:
        """`max_streams` of the store, for what is said of a stream that may not begin."""
        self._consumer, self._decoding, self._dead_letters = parts.consumer, parts.decoding, parts.dead_letters
        self._batcher, self._streams, self._control = parts.batcher, parts.streams, parts.control
        self._max_streams = max_streams
        self._of: dict[str, set[Partition]] = {}
        self._beyond: dict[Partition, set[int]] = {}

    def load(self, streams: list[str]) -> None:
        """Make streams resident."""
        self._control.met(self._streams.ensure(streams))

    def is_folded(self, frame: Frame) -> bool:
        """Whether a frame is in its stream's state already. Raises FrameError where the stream may not begin."""
        engine = self._streams.engine
        if frame.stream not in engine:
            raise _no_room(self._max_streams)
        where = (frame.position.topic, frame.position.partition)
        self._of.setdefault(frame.stream, set()).add(where)
        header = engine.resident(frame.stream).header
        if not header.has_folded(frame.position):
            return False
        folded = header.positions[frame.position.log] + 1
        if self._consumer.reaches(where, folded):
            return True
        self._beyond.setdefault(where, set()).add(folded)
        return False

    def doubt(self) -> None:
        """Streams claim to have folded more than their partition's log has: none of its frames was folded in, unless
        these streams are found to be wrong."""
        while self._beyond:
            partition, folded = self._beyond.popitem()
            self._consumer.doubt(partition, folded)
            self.drop(partition)

    def drop(self, partition: Partition) -> set[Partition]:
        """Forget a partition: whoever has it now reads again what was not finished.

        A stream that has moved goes with every partition in which it was met; what is ours of these is read again.
        Returns all of these.
        """
        self._decoding.drop(partition)
        self._dead_letters.drop(partition)
        streams = [stream for stream, where in self._of.items() if partition in where]
        self._batcher.drop(streams)
        self._streams.release(streams)
        dropped = {partition}
        for other in {other for stream in streams for other in self._of.pop(stream)} - dropped:
            self._consumer.rewind(other)
            dropped |= self.drop(other)
        return dropped

    def rewind(self, fenced: list[str]) -> None:
        """Streams of ours must be claimed again, mostly as another worker has them. Read their partitions again: the
        broker decides whose they are."""
        self._streams.contest(stream for stream in fenced if stream in self._of)
        for partition in {p for stream in fenced for p in self._of.get(stream, ())}:
            log.warning("streams of partition %d must be claimed again; reading it again", partition[1])
            self._consumer.rewind(partition)
            self.drop(partition)

    def begin_again(self) -> None:
        """A store that was away may have lost its last second: compare every partition and claim every stream anew."""
        for partition in self._consumer.assignment():
            self._consumer.rewind(partition)
            self.drop(partition)

    def forget(self, streams: Iterable[str]) -> None:
        """Streams that made room. All that is known of them is stored: they need not be read again with a partition
        that goes."""
        for stream in streams:
            self._of.pop(stream, None)


def _no_room(most: int) -> FrameError:
    reason = f"its stream is new, and the store has as many as it may (store.max_streams: {most})"
    return FrameError("too_many_streams", f"{reason}: see docs/runbooks/too-many-streams.md")
