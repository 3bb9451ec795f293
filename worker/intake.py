"""From Kafka records to decoded frames: what is bad goes to the dead letters, what is folded already is dropped."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from monitoring.metrics import WorkerMetrics
from schemas.config import Frames
from schemas.errors import FrameError
from schemas.frame import Frame, Position, parse_frame
from worker.decode import DecodedFrame, Decoder
from worker.kafka_batches import Unreadable
from worker.offsets import Offsets
from worker.publish import Publisher
from worker.turns import Arrived

log = logging.getLogger("driftkeel.intake")


class Intake:
    """Validates and decodes; every record is either returned, dead-lettered, or known to be folded in."""

    def __init__(
        self, limits: Frames, decoder: Decoder, offsets: Offsets, publisher: Publisher, metrics: WorkerMetrics
    ) -> None:
        self._limits, self._decoder, self._offsets = limits, decoder, offsets
        self._publisher, self._metrics = publisher, metrics

    def take(
        self,
        arrived: list[Arrived],
        load: Callable[[list[str]], Callable[[Frame], bool]],
        keep_alive: Callable[[], object],
    ) -> list[DecodedFrame]:
        """Decoded frames, in order. `load` makes streams resident and tells whether a frame is folded in already.

        Offsets know of the records already.
        """
        frames: list[tuple[Frame, Arrived]] = []
        bad: list[tuple[Any, FrameError]] = []
        for arrival in arrived:
            record = arrival[1]
            try:
                frames.append((self._parsed(record, _position(record)), arrival))
            except FrameError as error:
                bad.append((record, error))
        self._metrics.frames.inc(len(arrived))
        is_folded = load([frame.stream for frame, _ in frames])
        new: list[tuple[Frame, Arrived]] = []
        again: list[Position] = []
        for frame, arrival in frames:
            if is_folded(frame):
                again.append(frame.position)
            else:
                new.append((frame, arrival))
        self._metrics.frames_again.inc(len(again))
        self._offsets.finished(again)
        decoded: list[DecodedFrame] = []
        results = self._decoder.decode([(frame, at) for frame, (at, _) in new], keep_alive)
        for (_, (_, record)), result in zip(new, results, strict=True):
            if isinstance(result, FrameError):
                bad.append((record, result))
            else:
                decoded.append(result)
        if bad:
            self._bury(bad, keep_alive)
        return decoded

    def _parsed(self, record: Any, position: Position) -> Frame:
        if isinstance(record.value, Unreadable):
            raise FrameError("unreadable", record.value.reason)
        return parse_frame(
            position,
            record.key,
            record.value,
            [(name, value or b"") for name, value in record.headers],
            record.timestamp,
            self._limits.max_bytes,
            self._limits.max_stream_id_bytes,
        )

    def _bury(self, bad: list[tuple[Any, FrameError]], keep_alive: Callable[[], object]) -> None:
        for record, error in bad:
            log.warning("frame %s is a dead letter: %s", _position(record), error, extra=_about(record, error))
            self._publisher.dead_letter(record, error)
            self._metrics.bad_frames.labels(error.kind).inc()
        self._publisher.settle(keep_alive)
        self._offsets.finished(_position(record) for record, _ in bad)


def _position(record: Any) -> Position:
    return Position(record.topic, record.partition, record.offset)


def _about(record: Any, error: FrameError) -> dict[str, str]:
    """What a log line of a record can be found by."""
    stream = (record.key or b"")[:200].decode("utf-8", "replace")
    return {"kind": error.kind, "frame": str(_position(record)), "stream": stream}
