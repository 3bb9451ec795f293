"""Records between their arrival and their micro-batch: decoded in threads, taken up in order by the worker's loop."""

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

LIGHT = 1 << 20  # pixels; so many take at most some thirty milliseconds, whatever the format
MAX_SHARE = 32  # records per task of a thread: small frames decode faster than a task is handed over
# Tasks per thread that are handed over ahead, so that threads have work while the loop does something else, which may
# be a pass. Fewer tasks of large pictures, because streams take turns only until then.
LIGHT_AHEAD, HEAVY_AHEAD = 8, 2


@dataclass(eq=False, slots=True)
class Arrival:
    """A record that was received, at `received` in monotonic seconds, and not taken up yet.

    `frame`: what it is decoded from, once it was handed over; None again where its partition was dropped. Once it is
    `done`, `result` is the decoded frame, or why there is none; None where it was folded in before, or is too late.
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

    Large pictures have threads of their own, so that small ones never wait for them. A thread's result belongs to its
    `Arrival`. Dropping a partition forgets its arrivals; when the same offsets are read again they are new arrivals,
    which no result that is still under way can reach.
    """

    def __init__(self, decode: Callable[[Frame, float], DecodedFrame | FrameError], threads: int) -> None:
        self._light = _Lane(decode, threads, LIGHT_AHEAD * threads)
        self._heavy = _Lane(decode, threads, HEAVY_AHEAD * threads)
        self._order: dict[Key, deque[Arrival]] = {}
        self._touched: dict[Key, None] = {}  # streams whose first record may be done
        self._count = 0
        self.held = 0  # bytes

    def __len__(self) -> int:
        """How many records."""
        return self._count

    @property
    def running(self) -> list[Future[Any]]:
        """Tasks of the threads. `take` has something new as soon as one of these is done."""
        return [*self._light.running, *self._heavy.running]

    @property
    def busy(self) -> bool:
        """Whether small pictures wait for a thread or are being decoded."""
        return self._light.busy

    @property
    def streams(self) -> set[str]:
        """Streams of the records that were handed over."""
        return {arrival.frame.stream for queue in self._order.values() for arrival in queue if arrival.frame}

    def add(self, received: float, record: Any) -> None:
        """Records of a partition must come in order."""
        arrival = Arrival(received, record, bytes_of(record))
        self._order.setdefault(record.key, deque()).append(arrival)
        heaviness = weight(record.value or b"")
        (self._light if heaviness <= LIGHT else self._heavy).add(arrival, heaviness)
        self._count += 1
        self.held += arrival.size

    def hand_over(self, prepare: Callable[[list[Arrival]], None]) -> None:
        """Give the threads what they have room for. Streams take turns.

        `prepare` sets the `frame` of those that are to be decoded and finishes the others. It may drop partitions.
        """
        begun = [(lane, share) for lane in (self._light, self._heavy) for share in lane.shares()]
        if begun:
            prepare([arrival for _, share in begun for arrival in share])
        for lane, share in begun:
            lane.begin([arrival for arrival in share if arrival.frame and not arrival.done])

    def finish(self, arrival: Arrival, result: DecodedFrame | FrameError | None) -> None:
        """Note what came of an arrival. If it was dropped meanwhile, nobody asks for it."""
        if isinstance(result, FrameError):
            # An error refers by its traceback to the stack frames that hold it. Such a cycle would keep the record and
            # its decoded bytes until garbage is collected, which is triggered by the number of objects, not by bytes.
            result.__traceback__ = result.__cause__ = result.__context__ = None
        arrival.result, arrival.done = result, True
        self._touched[arrival.record.key] = None

    def take(self) -> list[Arrival]:
        """Arrivals that are done. Those of each stream in order: none before all that came before it are done."""
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
        """Forget all records of a partition, also those that are being decoded."""
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
        """Tasks for the threads, as many as they have room for."""
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
        """What the threads have decoded since the last call."""
        for future in [future for future in self.running if future.done()]:
            yield from zip(self.running.pop(future), future.result(), strict=True)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _part(self, share: list[Arrival]) -> list[DecodedFrame | FrameError | None]:
        # An arrival has no frame any more where its partition was dropped meanwhile.
        return [self._decode(frame, one.received) if (frame := one.frame) else None for one in share]
