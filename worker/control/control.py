"""Brings commands to streams: to each between two of its steps, once, with an event that says so.

The worker that has a stream in memory has it obey. A stream that no worker has is claimed for that a little later, by
whichever worker is first. If two try, the second finds its token refused or the command obeyed.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections import deque
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

from monitoring.metrics import WorkerMetrics
from schemas.command import EVERY_STREAM, Action
from schemas.errors import StateError, UnreachableError
from schemas.state import StreamHeader, decode_header
from schemas.update import SealedEvent
from worker.control.commands import CommandList, Numbered
from worker.engine.engine import Engine
from worker.engine.resident import Resident
from worker.store.retry import StoreRetry
from worker.store.store import StateStore
from worker.streams.entry import Entry
from worker.streams.obey import Subject, obey
from worker.streams.pending import PendingWrites
from worker.streams.streams import Streams

log = logging.getLogger("driftkeel.control")
ORPHAN_AFTER_S = 2.0  # before a stream that is not here is claimed to obey, if no other worker has had it obey by then
AT_ONCE = 32  # streams that obey in one turn of the loop, which stands still for them
LOOKED_AT_ONCE = 500  # streams whose headers are read from the store in one turn
COMMANDS_AT_ONCE = 500  # of a stream in one write: their events lie beside its state, where room is limited
STANDING = frozenset({"freeze", "unfreeze", "policy"})  # actions that also hold for streams that begin later


@dataclass(frozen=True)
class _Obeyed:
    """What becomes of a stream, the action of each of its events, and whether it has `more` to obey."""

    entry: Entry
    actions: list[Action]
    more: bool


class Control:
    """Brings commands to streams. Belongs to the worker's loop."""

    def __init__(
        self,
        commands: CommandList,
        streams: Streams,
        store: StateStore,
        metrics: WorkerMetrics,
        retry: StoreRetry,
        pending: PendingWrites,
    ) -> None:
        self._commands, self._streams, self._store = commands, streams, store
        self._metrics, self._retry, self._pending = metrics, retry, pending
        self._engine: Engine = streams.engine
        self._due: set[str] = set()
        # Streams that are not here: first when their headers are to be read, then, when it is time, in a queue.
        self._nobodys: dict[str, float] = {}
        self._orphans: deque[str] = deque()
        self._all: Iterator[list[str]] | None = None  # the store's streams, while a command to all goes through them
        self._all_again = False  # whether another command to all has come meanwhile
        self._unreadable = 0

    @property
    def due(self) -> set[str]:
        """Streams that must not begin another step before they have obeyed.

        Otherwise a stream that is always in a step would never obey.
        """
        return self._due

    def loaded(self, streams: Iterable[str]) -> None:
        """Streams have just become resident. What came while no worker had them is due now."""
        for stream in streams:
            resident = self._engine.resident(stream)
            waiting = self._commands.after(resident.header)
            if _meant(waiting, resident):
                self._due.add(stream)
            elif waiting:
                resident.header = _done(resident.header, waiting)

    def listen(self) -> None:
        """Take in new commands: to streams that are here, and to those that perhaps no worker has."""
        for stream in self._commands.news():
            here = self._engine.streams
            if stream in here:
                self._due.add(stream)
                continue
            if stream == EVERY_STREAM:
                self._due |= here
            self._look_later([stream])
        unreadable = self._commands.unreadable
        self._metrics.commands.labels("unreadable", "refused").inc(unreadable - self._unreadable)
        self._unreadable = unreadable

    def run(self, busy: Container[str]) -> list[str]:
        """Have some of the streams obey that are due and not `busy` in a step. Returns those that another worker has
        claimed."""
        # A stream that was released before it obeyed may be no worker's: perhaps an operator's command has claimed it.
        self._look_later(self._due - self._engine.streams)
        self._due &= self._engine.streams
        return self._run(list(islice((stream for stream in self._due if stream not in busy), AT_ONCE)))

    def _run(self, ready: list[str]) -> list[str]:
        if not ready:
            return []
        # First write and publish what steps have made of the streams: the commands' events will take the place beside
        # the state where the events of these steps lie.
        refused = self._pending.flush(ready)
        self._streams.release(refused)
        obeyed = [found for stream in ready if (found := self._obeyed(stream)) is not None]
        self._due.difference_update(stream for stream in ready if stream in self._engine)
        # Some may have been released while store or broker were waited for.
        obeyed = [found for found in obeyed if found.entry.header.stream in self._engine]
        if not obeyed:
            return refused
        accepted = self._streams.write([found.entry for found in obeyed])
        fenced = [found.entry.header.stream for found, good in zip(obeyed, accepted, strict=True) if not good]
        for found, good in zip(obeyed, accepted, strict=True):
            if good:
                self._finish(found)
        self._metrics.fenced.inc(len(fenced))
        self._streams.release(fenced)
        self._due.update(fenced)
        again = [found.entry.header.stream for found, good in zip(obeyed, accepted, strict=True) if good and found.more]
        return refused + fenced + self._run(again)

    def _look_later(self, streams: Iterable[str]) -> None:
        """Have it checked whether any worker has these streams: later, and not by all workers at the same moment."""
        for stream in streams:
            self._nobodys[stream] = time.monotonic() + ORPHAN_AFTER_S * random.uniform(1, 2)  # noqa: S311

    def look_after_the_rest(self, busy: Container[str]) -> list[str]:
        """Claim streams that no worker has, some at a time, have them obey, and release them. Returns as `run`."""
        now = time.monotonic()
        for stream in [stream for stream, moment in self._nobodys.items() if moment <= now]:
            del self._nobodys[stream]
            if stream == EVERY_STREAM:
                self._all_again = True
            else:
                self._orphans.append(stream)
        if len(self._orphans) < LOOKED_AT_ONCE:
            self._orphans.extend(self._more())
        looked_at = [self._orphans.popleft() for _ in range(min(LOOKED_AT_ONCE, len(self._orphans)))]
        waiting = self._disobedient([stream for stream in looked_at if stream not in self._engine])
        chosen = waiting[:AT_ONCE]
        self._orphans.extend(waiting[AT_ONCE:])
        if not chosen:
            return []
        self.loaded(self._streams.ensure(chosen))
        fenced = self._run([stream for stream in chosen if stream in self._due and stream not in busy])
        self._streams.release(chosen)
        return fenced

    def _more(self) -> list[str]:
        """The next of the store's streams, while a command to all goes through them. For a command that comes meanwhile
        it begins again afterwards."""
        if self._all is None and self._all_again:
            self._all, self._all_again = self._store.pieces(), False
        if self._all is None:
            return []
        piece = self._retry(self._piece)
        if piece is None:
            self._all = None
        return piece or []

    def _piece(self) -> list[str] | None:
        try:
            return next(self._all, None) if self._all is not None else None
        except UnreachableError:
            self._all = self._store.pieces()  # From the beginning: streams that have obeyed are passed over.
            raise

    def _disobedient(self, streams: list[str]) -> list[str]:
        if not streams:
            return []
        found = self._retry(lambda: self._store.overview(streams))
        return [stream for stream, seen in zip(streams, found, strict=True) if self._waits(seen.header)]

    def _waits(self, content: bytes | None) -> bool:
        try:
            return content is not None and bool(self._commands.after(decode_header(content)))
        except StateError:
            return False  # Whoever loads the stream reports that its header is damaged.

    def _obeyed(self, stream: str) -> _Obeyed | None:
        """The stream after the commands that it has to obey; None where there are none, or it was released."""
        if stream not in self._engine:
            return None
        resident = self._engine.resident(stream)
        if resident.homeless:
            return None  # Its commands wait until the store can note that they were obeyed.
        waiting = self._commands.after(resident.header)
        header, own, tensors, approved = resident.header, self._engine.tensors(stream), None, None
        events: tuple[SealedEvent, ...] = ()
        meant = _meant(waiting, resident)
        if more := len(meant) > COMMANDS_AT_ONCE:
            waiting = meant = meant[:COMMANDS_AT_ONCE]
        for numbered in meant:
            subject = Subject(header, tensors or own, partial(self._streams.kept, stream))
            entry = obey(numbered.command, subject, self._streams.context, resident.token)
            header, events = entry.header, events + entry.events
            tensors, approved = entry.tensors or tensors, entry.approved or approved
        if not meant:
            resident.header = _done(header, waiting)
            return None
        return _Obeyed(
            Entry(_done(header, waiting), events, tensors, approved), [n.command.action for n in meant], more
        )

    def _finish(self, obeyed: _Obeyed) -> None:
        entry, stream = obeyed.entry, obeyed.entry.header.stream
        if entry.tensors is not None and stream in self._engine:
            self._engine.replace(stream, entry.tensors)
        self._streams.publish(entry)
        for action, sealed in zip(obeyed.actions, entry.events, strict=True):
            event = sealed.event
            self._metrics.commands.labels(action, "refused" if event.decision == "skipped" else "done").inc()
            about = {"stream": stream, "command": event.command, "decision": event.decision}
            log.info("%s: %s (%s)", event.id, event.decision, event.reason, extra=about)


def _meant(waiting: list[Numbered], resident: Resident) -> list[Numbered]:
    """The commands among these that the stream is to obey.

    A new stream obeys only what still holds (`STANDING`): resets, rollbacks and approvals were meant for the streams of
    that time. So does a stream whose header was lost, and with it what it has obeyed already; it also obeys all
    commands that have come since.
    """
    since = resident.lost if resident.stored else math.inf
    return [n for n in waiting if n.command.action in STANDING or n.arrived >= since]


def _done(header: StreamHeader, obeyed: list[Numbered]) -> StreamHeader:
    """The header with the newest of these commands, per partition of their topic, noted as obeyed."""
    newest = dict(header.commands)
    for numbered in obeyed:
        position = numbered.position
        newest[position.log] = max(position.offset, newest.get(position.log, -1))
    return header.model_copy(update={"commands": newest})
