"""Which streams came from which partition: what is forgotten when a partition goes, and what is read again then."""

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
        """`max_streams`: the store's limit, for the error of a new stream that it has no room for."""
        self._consumer, self._decoding, self._dead_letters = parts.consumer, parts.decoding, parts.dead_letters
        self._batcher, self._streams, self._control = parts.batcher, parts.streams, parts.control
        self._max_streams = max_streams
        self._partitions_of: dict[str, set[Partition]] = {}
        self._beyond: dict[Partition, set[int]] = {}

    def load(self, frames: list[Frame]) -> None:
        """Make the streams of these frames resident, except new ones for which the store has no room, and those whose
        partition was taken away while the store was waited for."""
        for frame in frames:
            self._partitions_of.setdefault(frame.stream, set()).add(_partition(frame))
        self._control.loaded(self._streams.ensure((frame.stream for frame in frames), self._partitions_of))
        self.forget(frame.stream for frame in frames if frame.stream not in self._streams.engine)

    def is_folded(self, frame: Frame) -> bool:
        """Whether a frame is in its stream's state already. Raises FrameError for a new stream that has no room."""
        engine = self._streams.engine
        if frame.stream not in engine:
            raise _no_room(self._max_streams)
        where = _partition(frame)
        header = engine.resident(frame.stream).header
        if not header.has_folded(frame.position):
            return False
        folded = header.positions[frame.position.log] + 1
        if self._consumer.reaches(where, folded):
            return True
        self._beyond.setdefault(where, set()).add(folded)
        return False

    def doubt(self) -> None:
        """Have partitions read again, and compared with the store, whose log ends before the position of a stream.

        Either the log is another one, of which nothing was folded in yet, or the stream's position is wrong.
        """
        while self._beyond:
            partition, folded = self._beyond.popitem()
            self._consumer.doubt(partition, folded)
            self.drop(partition)

    def drop(self, partition: Partition) -> set[Partition]:
        """Forget a partition and its streams. Whoever has it now reads again what was not finished.

        A stream that moved between partitions has frames in several, and their order would be lost if the others
        went on. So these are dropped too, and read again where they are still ours. Returns all dropped partitions.
        """
        self._decoding.drop(partition)
        self._dead_letters.drop(partition)
        streams = [stream for stream, where in self._partitions_of.items() if partition in where]
        self._batcher.drop(streams)
        self._streams.release(streams)
        dropped = {partition}
        for other in {other for stream in streams for other in self._partitions_of.pop(stream)} - dropped:
            self._consumer.rewind(other)
            dropped |= self.drop(other)
        return dropped

    def rewind(self, fenced: list[str]) -> None:
        """Read the partitions of these streams again, which claims the streams again: another worker has claimed them.
        The broker decides whose partitions they are."""
        self._streams.contest(stream for stream in fenced if stream in self._partitions_of)
        for partition in {p for stream in fenced for p in self._partitions_of.get(stream, ())}:
            log.warning("streams of partition %d must be claimed again; reading it again", partition[1])
            self._consumer.rewind(partition)
            self.drop(partition)

    def begin_again(self) -> None:
        """After a new connection to the store, which may have lost its last writes: read every partition again. That
        compares the partition's mark and claims its streams anew."""
        for partition in self._consumer.assignment():
            self._consumer.rewind(partition)
            self.drop(partition)

    def forget(self, streams: Iterable[str]) -> None:
        """Streams that are not in memory, or were removed from it to make room. The store has all of these, so that
        their other partitions need not be read again when one goes."""
        for stream in streams:
            self._partitions_of.pop(stream, None)


def _partition(frame: Frame) -> Partition:
    return frame.position.topic, frame.position.partition


def _no_room(most: int) -> FrameError:
    reason = f"its stream is new, and the store has as many as it may (store.max_streams: {most})"
    return FrameError("too_many_streams", f"{reason}: see docs/runbooks/too-many-streams.md")
