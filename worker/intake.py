"""From Kafka records to decoded frames. Bad records become dead letters; frames that are folded in already, or are too
late, are passed over."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from monitoring.metrics import WorkerMetrics
from schemas.config import Frames
from schemas.errors import FrameError
from schemas.frame import Frame, Position, parse_frame
from worker.batch.batcher import MicroBatcher
from worker.batch.lateness import Lateness
from worker.consume.offsets import Offsets
from worker.decode.decoding import Arrival, Decoding
from worker.decode.image import DecodedFrame
from worker.kafka.batches import Unreadable
from worker.log import LineLimit
from worker.publish.dead_letters import BadRecord, DeadLetters

log = logging.getLogger("driftkeel.intake")
Load = Callable[[list[Frame]], object]
IsFolded = Callable[[Frame], bool]


class Intake:
    """Validates records and has them decoded. What is dead-lettered or passed over is finished for `Offsets` here; no
    offset behind it can be committed before."""

    def __init__(
        self,
        limits: Frames,
        lateness: Lateness,
        decoding: Decoding,
        offsets: Offsets,
        dead_letters: DeadLetters,
        metrics: WorkerMetrics,
    ) -> None:
        self._limits, self._lateness, self._decoding, self._offsets = limits, lateness, decoding, offsets
        self._dead_letters, self._metrics = dead_letters, metrics
        self._lines = LineLimit()

    def hand_over(self, load: Load, is_folded: IsFolded) -> None:
        """Give the decoding threads what they have room for.

        `load` makes the streams of frames resident. `is_folded` raises FrameError for a frame of a new stream that has
        no room.
        """
        self._decoding.hand_over(partial(self._prepare, load, is_folded))

    def take(self) -> tuple[list[DecodedFrame], list[BadRecord]]:
        """Decoded frames, those of each stream in order; and bad records, which are to become dead letters."""
        frames: list[DecodedFrame] = []
        bad: list[BadRecord] = []
        for arrival in self._decoding.take():
            if isinstance(arrival.result, FrameError):
                bad.append((arrival.record, arrival.result))
            elif arrival.result is not None:
                frames.append(arrival.result)
        return frames, bad

    def drop_late(self, batcher: MicroBatcher) -> None:
        """Drop frames that have become too late while they waited for their pass (`batch.drop_late`)."""
        if self._lateness.drops:
            now = time.time()
            late = batcher.expire(lambda frame: self._lateness.dropped(frame.sent, frame.received, now))
            self._metrics.dropped.inc(len(late))
            self._offsets.finished(frame.position for frame in late)

    def dead_letter(self, bad: list[BadRecord], patience_s: float = 0.0) -> None:
        """Send records to the dead-letter topic. Those that have arrived there, now or of earlier calls, are finished.
        With `patience_s` it is waited until all have."""
        self._sum_up()
        for record, error in bad:
            if self._lines.one_more(error.kind):
                log.warning("frame %s is a dead letter: %s", Position.of(record), error, extra=_about(record, error))
            self._metrics.bad_frames.labels(error.kind).inc()
        self._dead_letters.send(bad)
        self._offsets.finished(self._dead_letters.delivered(patience_s))

    def _sum_up(self) -> None:
        """Log how many dead letters had no line of their own."""
        for kind, more in self._lines.left_out():
            text = "%d more frames became dead letters of class %s since then, without a line each"
            log.warning(text, more, kind, extra={"kind": kind})

    def _prepare(self, load: Load, is_folded: IsFolded, arrivals: list[Arrival]) -> None:
        self._metrics.frames.inc(len(arrivals))
        for arrival in arrivals:
            try:
                arrival.frame = self._parsed(arrival.record, Position.of(arrival.record))
            except FrameError as error:
                self._decoding.finish(arrival, error)
        load([arrival.frame for arrival in arrivals if arrival.frame])
        # While `load` waited for the store, partitions may have been taken away: their arrivals have no frame any more.
        again = [arrival for arrival in arrivals if arrival.frame and self._is_again(arrival, is_folded)]
        self._metrics.frames_again.inc(len(again))
        self._pass_over(again)
        if self._lateness.drops:
            now = time.time()
            late = [arrival for arrival in arrivals if self._is_late(arrival, now)]
            self._metrics.dropped.inc(len(late))
            self._pass_over(late)

    def _pass_over(self, arrivals: list[Arrival]) -> None:
        self._offsets.finished(Position.of(arrival.record) for arrival in arrivals)
        for arrival in arrivals:
            self._decoding.finish(arrival, None)

    def _is_late(self, arrival: Arrival, now: float) -> bool:
        frame = arrival.frame
        return frame is not None and not arrival.done and self._lateness.dropped(frame.sent, arrival.received, now)

    def _is_again(self, arrival: Arrival, is_folded: IsFolded) -> bool:
        try:
            return arrival.frame is not None and is_folded(arrival.frame)
        except FrameError as error:
            self._decoding.finish(arrival, error)
            return False

    def _parsed(self, record: Any, position: Position) -> Frame:
        if isinstance(record.value, Unreadable):
            raise FrameError("unreadable", record.value.reason)
        return parse_frame(
            position,
            record.key,
            record.value,
            [(name, value or b"") for name, value in record.headers],
            record.timestamp or 0,  # The oldest format of records has none.
            self._limits.max_bytes,
            self._limits.max_stream_id_bytes,
        )


def _about(record: Any, error: FrameError) -> dict[str, str]:
    """The fields by which the log line of a record can be found."""
    stream = (record.key or b"")[:200].decode("utf-8", "replace")
    return {"kind": error.kind, "frame": str(Position.of(record)), "stream": stream}
