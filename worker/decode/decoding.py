"""Records between their arrival and their micro-batch: decoded beside the worker's loop, taken up in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from schemas.errors import FrameError
from schemas.frame import Frame
from worker.consume.offsets import Partition
from worker.decode.image import DecodedFrame
from worker.decode.turns import Key, RoundRobin
from worker.decode.weigh import weight
from worker.kafka.records import bytes_of

LIGHT = 1 << 20  # pixels that take no more than some thirty milliseconds, whatever the format
MAX_SHARE = 32  # records decoded in one go: small frames decode faster than a task is handed over
# Shares per thread, so that threads find work while the loop does something else, which may be a pass. Of large ones
# fewer, for streams take their turns when these are handed over.
LIGHT_AHEAD, HEAVY_AHEAD = 8, 2


@dataclass(eq=False, slots=True)
class Arrival:
    """A record on its way; `received` in monotonic seconds.

    `frame`: it has been handed over and is to become this, unless it was dropped. Once it is `done`, `result` is the
    frame, or why there is none; None where it was folded in before, or is too late.
    """

    received: float
    record: Any
    size: int  # bytes
    frame: Frame | None = None
    result: DecodedFrame | FrameError | None = None
    done: bool = False

    @property
    def partition(self) -> Partition:
        return self.record.topic, self.record.partition


class Decoding:
    """All records that were received and not taken up. Belongs to the loop; only `decode` runs in threads.

    Large pictures have threads of their own, so that small ones never wait for them. What a thread makes of a record
    stays with its `Arrival`: where a partition is dropped these are forgotten, and the same offsets, read again, are
    other arrivals, whatever is still under way.
    """

    def __init__(self, decode: Callable[[Frame, float], DecodedFrame | FrameError], threads: int) -> None:
        self._light = _Lane(decode, threads, LIGHT_AHEAD * threads)
        self._heavy = _Lane(decode, threads, HEAVY_AHEAD * threads)
        self._order: dict[Key, deque[Arrival]] = {}
        self._touched: dict[Key, None] = {}  # streams whose first record may be done
        self._count = 0
        self.held = 0  # bytes

    def __len__(self) -> int:
        """Records."""
        return self._count

    @property
    def running(self) -> list[Future[Any]]:
        """What to wait for: `take` has something new as soon as one of these is done."""
        return [*self._light.running, *self._heavy.running]

    @property
    def busy(self) -> bool:
        """Whether small pictures wait to be decoded, or are."""
        return self._light.busy

    @property
    def streams(self) -> set[str]:
        """Streams of records that were handed over."""
        return {arrival.frame.stream for queue in self._order.values() for arrival in queue if arrival.frame}

    def add(self, received: float, record: Any) -> None:
        """Records of a partition come in order."""
        arrival = Arrival(received, record, bytes_of(record))
        self._order.setdefault(record.key, deque()).append(arrival)
        heaviness = weight(record.value or b"")
        (self._light if heaviness <= LIGHT else self._heavy).add(arrival, heaviness)
        self._count += 1
        self.held += arrival.size

    def hand_over(self, prepare: Callable[[list[Arrival]], None]) -> None:
        """Give the threads what they have room for, of each stream by turns.

        `prepare` sets the `frame` of those that are to be decoded, and finishes the others. It may drop partitions.
        """
        begun = [(lane, share) for lane in (self._light, self._heavy) for share in lane.shares()]
        if begun:
            prepare([arrival for _, share in begun for arrival in share])
        for lane, share in begun:
            lane.begin([arrival for arrival in share if arrival.frame and not arrival.done])

    def finish(self, arrival: Arrival, result: DecodedFrame | FrameError | None) -> None:
        """Where it was dropped, nothing comes of it."""
        if isinstance(result, FrameError):
            # Its traceback leads by way of frames to whatever holds it. Such a circle stays, with the record and what a
            # decoder has made of it, until garbage is collected; and that counts objects, not their bytes.
            result.__traceback__ = result.__cause__ = result.__context__ = None
        arrival.result, arrival.done = result, True
        self._touched[arrival.record.key] = None

    def take(self) -> list[Arrival]:
        """What is done; of each stream in order, none before all that came before it."""
        for lane in (self._light, self._heavy):
            for arrival, result in lane.finished():
                self.finish(arrival, result)
        taken: list[Arrival] = []
        for key in self._touched:
            queue = self._order.get(key, deque())
            while queue and queue[0].done:
                taken.append(queue.popleft())
            if not queue:
                self._order.pop(key, None)
        self._touched.clear()
        self._forget(taken)
        return taken

    def drop(self, partition: Partition) -> None:
        """Forget all records of a partition, those too that threads are at."""
        for key, queue in list(self._order.items()):
            gone = [arrival for arrival in queue if arrival.partition == partition]
            for arrival in gone:
                arrival.frame = None
                queue.remove(arrival)
            if gone:
                self._forget(gone)
                self._touched[key] = None
        for lane in (self._light, self._heavy):
            lane.drop(partition)

    def close(self) -> None:
        """End the threads."""
        self._light.close()
        self._heavy.close()

    def _forget(self, arrivals: list[Arrival]) -> None:
        self._count -= len(arrivals)
        self.held -= sum(arrival.size for arrival in arrivals)


class _Lane:
    """Some threads, and the records that wait for them."""

    def __init__(self, decode: Callable[[Frame, float], DecodedFrame | FrameError], threads: int, room: int) -> None:
        self._decode, self._room = decode, room
        self._waiting: RoundRobin[tuple[Arrival, int]] = RoundRobin()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.running: dict[Future[list[DecodedFrame | FrameError | None]], list[Arrival]] = {}

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self.running)

    def add(self, arrival: Arrival, heaviness: int) -> None:
        self._waiting.add(arrival.record.key, (arrival, heaviness))

    def drop(self, partition: Partition) -> None:
        self._waiting.drop(lambda waiting: waiting[0].partition == partition)

    def shares(self) -> Iterator[list[Arrival]]:
        """What the threads have room for."""
        for _ in range(self._room - len(self.running)):
            share: list[Arrival] = []
            heaviness = 0
            while self._waiting and heaviness < LIGHT and len(share) < MAX_SHARE:
                arrival, one = self._waiting.next()
                share.append(arrival)
                heaviness += one
            if not share:
                return
            yield share

    def begin(self, share: list[Arrival]) -> None:
        if share:
            self.running[self._pool.submit(self._part, share)] = share

    def finished(self) -> Iterator[tuple[Arrival, DecodedFrame | FrameError | None]]:
        """What the threads have done since."""
        for future in [future for future in self.running if future.done()]:
            yield from zip(self.running.pop(future), future.result(), strict=True)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _part(self, share: list[Arrival]) -> list[DecodedFrame | FrameError | None]:
        # Of a partition that was dropped meanwhile nothing is decoded.
        return [self._decode(frame, one.received) if (frame := one.frame) else None for one in share]
