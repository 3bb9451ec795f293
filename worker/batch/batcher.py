"""Micro-batches: the frames of one stream that make one update."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from itertools import dropwhile

from meta.method import Method
from meta.mgg import frames_per_update
from schemas.config import Batch
from schemas.prediction import Parameters
from worker.decode.image import DecodedFrame

MAX_TURNS = 1 << 16  # streams whose last turn is remembered
PREDICT_ONLY = 4  # times max_batch: the frames that a stream which makes no update may have in one pass
SMALL_PASS = 32  # frames; smaller passes are not worth their overhead


@dataclass(frozen=True)
class MicroBatch:
    """Frames of one stream, oldest first.

    `adapt`: they make an update. `fold` without `adapt`: they are folded in without one, for `reason`. Neither: they
    are predicted now, held, and come again with later frames. `answer`: whose parameters answer. `hurried`: they are
    predicted as fast as possible and teach nothing.
    """

    stream: str
    frames: list[DecodedFrame]
    adapt: bool
    fold: bool
    reason: str = ""
    answer: Parameters = "adapted"
    hurried: bool = False

    @property
    def unpublished(self) -> list[DecodedFrame]:
        """Those whose prediction was not sent yet."""
        return [frame for frame in self.frames if not frame.published]


@dataclass
class _Waiting:
    held: list[DecodedFrame] = field(default_factory=list)  # predicted, waiting for an update
    fresh: list[DecodedFrame] = field(default_factory=list)  # not predicted yet

    @property
    def frames(self) -> int:
        return len(self.held) + len(self.fresh)


def within_memory(settings: Batch, frame_bytes: int, threads: int) -> Batch:
    """The same settings with no more buffered frames, of `frame_bytes` each, than fit into `max_buffered_bytes`; but
    with enough for two full passes for each of the `threads`."""
    room = max(settings.max_buffered_bytes // frame_bytes, 2 * threads * settings.max_pass)
    return settings.model_copy(update={"max_buffered": min(settings.max_buffered, room)})


def within_method(settings: Batch, adapt: bool, method: Method) -> Batch:
    """The same settings; where frames `adapt`, with micro-batches no larger than `method` gains from."""
    most = max(settings.min_adapt, frames_per_update(method, settings.max_batch)) if adapt else settings.max_batch
    return settings.model_copy(update={"max_batch": most})


class MicroBatcher:
    """Collects frames per stream and closes micro-batches by size or by time. Streams take turns.

    All times are monotonic seconds, given by the caller.
    """

    def __init__(self, settings: Batch, adapt: bool = True) -> None:
        self._settings, self._adapt = settings, adapt
        self._wait = settings.max_wait_ms / 1000
        self._hold = settings.max_hold_ms / 1000
        self._streams: dict[str, _Waiting] = {}
        self._count = 0
        self._turns: dict[str, int] = {}
        self._turn = 0

    def __len__(self) -> int:
        """How many frames wait."""
        return self._count

    def add(self, frames: Iterable[DecodedFrame]) -> None:
        """Frames of a stream must come in order."""
        for frame in frames:
            self._streams.setdefault(frame.stream, _Waiting()).fresh.append(frame)
            self._count += 1

    def expire(self, is_late: Callable[[DecodedFrame], bool]) -> list[DecodedFrame]:
        """Remove and return frames that are not predicted yet and too late for it: of each stream the oldest ones."""
        late: list[DecodedFrame] = []
        for stream, waiting in list(self._streams.items()):
            if not waiting.fresh or not is_late(waiting.fresh[0]):
                continue
            fresh = list(dropwhile(is_late, waiting.fresh))
            late += waiting.fresh[: len(waiting.fresh) - len(fresh)]
            waiting.fresh = fresh
            if not waiting.frames:
                del self._streams[stream]
        self._count -= len(late)
        return late

    def next_due(self) -> float | None:
        """When the next micro-batch closes by time; None where nothing waits."""
        pressed = self._pressed
        return min((self._due(waiting, pressed) for waiting in self._streams.values()), default=None)

    def take(
        self,
        now: float,
        limit: int,
        busy: Container[str] = (),
        shares: int = 1,
        least: int = 1,
        predicts_only: Callable[[str, DecodedFrame], bool] = lambda stream, oldest: False,
    ) -> list[MicroBatch]:
        """The micro-batches of one pass: of what is due, one per stream, up to `limit` frames in all. None of `busy`
        streams, and nothing at all while fewer than `least` frames are due.

        The stream whose last turn is longest ago goes first, so that no stream can keep others from their turns.
        What is due is divided by `shares`, so that as many passes find work, unless these would be too small.
        Once there is a pass, streams that are not due ride along where they gain nothing by waiting (see `_riders`).
        A stream that makes no update by `predicts_only`, which gets the oldest of its frames that is not predicted yet,
        may have more frames than `max_batch` in the pass.
        """
        pressed = self._pressed
        due = [
            (self._turns.get(stream, 0), moment, stream)
            for stream, waiting in self._streams.items()
            if stream not in busy and (moment := self._due(waiting, pressed)) <= now
        ]
        closing = [stream for _, _, stream in sorted(due)]
        most: dict[str, int] = {}
        ready = 0
        for stream in closing:
            if ready >= max(least, limit * shares):
                break  # Enough for all passes. There may be a thousand more streams, which need not be looked at.
            most[stream] = self._most(stream, limit, predicts_only)
            ready += min(most[stream], self._streams[stream].frames)
        if ready < max(1, least):
            return []
        self._turn += 1
        room = min(limit, max(SMALL_PASS, -(-ready // shares)))
        batches: list[MicroBatch] = []
        usual = self._settings.max_batch
        for stream in closing + self._riders(now, closing, busy, any(moment > -math.inf for _, moment, _ in due)):
            batch = self._close(stream, now, pressed, min(most.get(stream, usual), max(usual, room)))
            if batches and len(batch.frames) > room:
                self._put_back(batch)
                break
            room -= len(batch.frames)
            self._count -= len(batch.frames)
            batches.append(batch)
            self._took_turn(stream)
        return batches

    def _riders(self, now: float, closing: list[str], busy: Container[str], timed: bool) -> list[str]:
        """Streams that are not due and gain nothing by waiting, in the order of their turns: those that expect no
        further frame before they are due, and, where `timed`, those that have enough frames for an update.

        The next frame is expected after the mean gap between the waiting frames, and not before as much time again has
        passed as since the last one. So slow cameras share a pass, rather than have one each for a frame or two. Fast
        cameras that go together once are due together from then on, in fewer and larger passes. The latter only where
        some stream is due by time (`timed`): beside a backlog, which fills a micro-batch for every pass, all others
        would go with few frames each time.
        """
        enough = max(2, self._settings.min_adapt, self._settings.max_batch // 4) if timed else math.inf
        found = []
        due = set(closing)
        for stream, waiting in self._streams.items():
            if stream in due or stream in busy or not waiting.fresh:
                continue
            first, last = waiting.fresh[0].received, waiting.fresh[-1].received
            gap = (last - first) / max(1, len(waiting.fresh) - 1)
            if waiting.frames >= enough or max(last + gap, 2 * now - last) >= first + self._wait:
                found.append((self._turns.get(stream, 0), first, stream))
        return [stream for _, _, stream in sorted(found)]

    def hold(self, batch: MicroBatch) -> None:
        """Take back frames that were predicted and not folded in. They wait for more, to make an update together."""
        waiting = self._streams.setdefault(batch.stream, _Waiting())
        for frame in batch.frames:
            frame.published = True
        waiting.held = batch.frames + waiting.held
        self._count += len(batch.frames)

    @property
    def streams(self) -> set[str]:
        """Streams with frames that wait."""
        return set(self._streams)

    def drop(self, streams: Iterable[str]) -> None:
        """Forget the frames of streams that another worker has now, or whose partitions are read again."""
        for stream in streams:
            waiting = self._streams.pop(stream, None)
            if waiting is not None:
                self._count -= waiting.frames

    def _took_turn(self, stream: str) -> None:
        if not self._streams[stream].fresh:
            del self._streams[stream]
        self._turns.pop(stream, None)
        self._turns[stream] = self._turn
        if len(self._turns) > MAX_TURNS:  # Forget silent streams: the dict is in the order of the turns.
            self._turns = dict(list(self._turns.items())[MAX_TURNS // 2 :])

    def _most(self, stream: str, limit: int, predicts_only: Callable[[str, DecodedFrame], bool]) -> int:
        waiting, most = self._streams[stream], self._settings.max_batch
        if waiting.frames <= most:
            return most
        return most if self._adapt and not predicts_only(stream, waiting.fresh[0]) else min(limit, PREDICT_ONLY * most)

    def _due(self, waiting: _Waiting, pressed: bool) -> float:
        if waiting.frames >= self._settings.max_batch and waiting.fresh:
            return -math.inf
        if waiting.held and pressed:
            return -math.inf
        moments = []
        if waiting.fresh:
            moments.append(waiting.fresh[0].received + self._wait)
        if waiting.held:
            moments.append(waiting.held[0].received + self._hold)
        return min(moments)

    def _close(self, stream: str, now: float, pressed: bool, most: int) -> MicroBatch:
        waiting = self._streams[stream]
        fill = max(1, most - len(waiting.held))
        fresh, waiting.fresh = waiting.fresh[:fill], waiting.fresh[fill:]
        frames, waiting.held = waiting.held + fresh, []
        if not self._adapt:
            return MicroBatch(stream, frames, adapt=False, fold=True, reason="adaptation is switched off")
        if len(frames) >= self._settings.min_adapt:
            return MicroBatch(stream, frames, adapt=True, fold=True)
        if pressed:
            return MicroBatch(stream, frames, adapt=False, fold=True, reason="too few frames, and max_buffered wait")
        too_long = now >= frames[0].received + self._hold
        return MicroBatch(stream, frames, adapt=False, fold=too_long, reason="too few frames within max_hold_ms")

    @property
    def _pressed(self) -> bool:
        """Whether the buffer is full. No more frames can come then, so that held ones would wait in vain."""
        return self._count >= self._settings.max_buffered

    def _put_back(self, batch: MicroBatch) -> None:
        waiting = self._streams[batch.stream]
        waiting.held = [frame for frame in batch.frames if frame.published]
        waiting.fresh = batch.unpublished + waiting.fresh
