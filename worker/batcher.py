"""Micro-batches: the frames of one stream that make one update."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from schemas.config import Batch
from worker.decode import DecodedFrame


@dataclass(frozen=True)
class MicroBatch:
    """Frames of one stream, oldest first.

    `adapt`: they make an update. Otherwise, `fold` says whether they count as done without one, for `reason`, or
    are only predicted now and come again with later frames.
    """

    stream: str
    frames: list[DecodedFrame]
    adapt: bool
    fold: bool
    reason: str = ""

    @property
    def unpublished(self) -> list[DecodedFrame]:
        return [frame for frame in self.frames if not frame.published]


@dataclass
class _Waiting:
    held: list[DecodedFrame] = field(default_factory=list)  # predicted, waiting for an update
    fresh: list[DecodedFrame] = field(default_factory=list)  # not predicted yet


class MicroBatcher:
    """Collects frames per stream and closes micro-batches by size or by time.

    All times are monotonic seconds given by the caller.
    """

    def __init__(self, settings: Batch, adapt: bool = True) -> None:
        self._settings, self._adapt = settings, adapt
        self._wait = settings.max_wait_ms / 1000
        self._hold = settings.max_hold_ms / 1000
        self._streams: dict[str, _Waiting] = {}

    def __len__(self) -> int:
        return sum(len(w.held) + len(w.fresh) for w in self._streams.values())

    def add(self, frames: Iterable[DecodedFrame]) -> None:
        """Frames of a stream come in order."""
        for frame in frames:
            self._streams.setdefault(frame.stream, _Waiting()).fresh.append(frame)

    def next_due(self) -> float | None:
        """When the next micro-batch closes by time; None where nothing waits."""
        return min((self._due(waiting) for waiting in self._streams.values()), default=None)

    def take(self, now: float, limit: int) -> list[MicroBatch]:
        """Close what is due, longest overdue first, one micro-batch a stream, up to `limit` frames in all."""
        due = [(self._due(waiting), stream) for stream, waiting in self._streams.items()]
        batches: list[MicroBatch] = []
        room = limit
        for moment, stream in sorted(due):
            if moment > now:
                break
            batch = self._close(stream, now)
            if batches and len(batch.frames) > room:
                self._put_back(batch)
                break
            room -= len(batch.frames)
            batches.append(batch)
            if not self._streams[stream].held and not self._streams[stream].fresh:
                del self._streams[stream]
        return batches

    def hold(self, batch: MicroBatch) -> None:
        """Take back frames that were predicted but not folded."""
        waiting = self._streams.setdefault(batch.stream, _Waiting())
        for frame in batch.frames:
            frame.published = True
        waiting.held = batch.frames + waiting.held

    @property
    def streams(self) -> set[str]:
        """Streams with frames that wait."""
        return set(self._streams)

    def drop(self, streams: Iterable[str]) -> None:
        """Forget the frames of streams that another worker has now, or that are read again."""
        for stream in streams:
            self._streams.pop(stream, None)

    def _due(self, waiting: _Waiting) -> float:
        if len(waiting.held) + len(waiting.fresh) >= self._settings.max_batch and waiting.fresh:
            return float("-inf")
        moments = []
        if waiting.fresh:
            moments.append(waiting.fresh[0].received + self._wait)
        if waiting.held:
            moments.append(waiting.held[0].received + self._hold)
        return min(moments)

    def _close(self, stream: str, now: float) -> MicroBatch:
        waiting = self._streams[stream]
        fill = max(1, self._settings.max_batch - len(waiting.held))
        fresh, waiting.fresh = waiting.fresh[:fill], waiting.fresh[fill:]
        frames, waiting.held = waiting.held + fresh, []
        if not self._adapt:
            return MicroBatch(stream, frames, adapt=False, fold=True, reason="adaptation is switched off")
        if len(frames) >= self._settings.min_adapt:
            return MicroBatch(stream, frames, adapt=True, fold=True)
        too_long = now >= frames[0].received + self._hold
        return MicroBatch(stream, frames, adapt=False, fold=too_long, reason="too few frames within max_hold_ms")

    def _put_back(self, batch: MicroBatch) -> None:
        waiting = self._streams[batch.stream]
        waiting.held = [frame for frame in batch.frames if frame.published]
        waiting.fresh = batch.unpublished + waiting.fresh
