"""Commands on their way into streams: between a stream's steps, once each, with the event that says so.

The worker that holds a stream obeys. A stream that nobody holds is looked after a little later, by whichever worker
is first; that two of them try is harmless, as the second finds its token refused or the command obeyed.
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
from worker.guard.answer import Policies
from worker.store.retry import StoreRetry
from worker.store.store import StateStore
from worker.streams.entry import Entry
from worker.streams.obey import Context, Subject, obey
from worker.streams.pending import PendingWrites
from worker.streams.streams import Streams

log = logging.getLogger("driftkeel.control")
ORPHAN_AFTER_S = 2.0
AT_ONCE = 32  # streams that obey in one turn of the loop, which stands still meanwhile
LOOKED_AT_ONCE = 500
COMMANDS_AT_ONCE = 500  # that a stream obeys with one write: their events lie beside its state, and have their limit
STANDING = frozenset({"freeze", "unfreeze", "policy"})  # what also holds for a stream that begins later


@dataclass(frozen=True)
class _Obeyed:
    """What becomes of a stream, the actions that its events are of, and whether it has more to obey."""

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
        policies: Policies,
        worker: str,
        retry: StoreRetry,
        pending: PendingWrites,
    ) -> None:
        self._commands, self._streams, self._store = commands, streams, store
        self._metrics, self._retry, self._pending = metrics, retry, pending
        self._engine: Engine = streams.engine
        self._context = Context.of(self._engine, policies, worker)
        self._due: set[str] = set()
        self._nobodys: dict[str, float] = {}
        self._orphans: deque[str] = deque()
        self._all: Iterator[list[str]] | None = None  # while a command to all goes through the store
        self._all_again = False
        self._unreadable = 0

    @property
    def due(self) -> set[str]:
        """Streams that must not begin another step before they have obeyed."""
        return self._due

    def loaded(self, streams: Iterable[str]) -> None:
        """Streams that have just become resident: what came while nobody held them is due now."""
        for stream in streams:
            resident = self._engine.resident(stream)
            waiting = self._commands.after(resident.header)
            if _meant(waiting, resident):
                self._due.add(stream)
            elif waiting:
                resident.header = _done(resident.header, waiting)

    def listen(self) -> None:
        """Take in what has come: for streams that are here now, and for those that may turn out to be nobody's."""
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
        """Have streams obey that are due and in no step, some at a time; returns those that another worker has
        claimed."""
        # Who left before obeying may be nobody's by now: claimed by an operator's command, it is silent all the same.
        self._look_later(self._due - self._engine.streams)
        self._due &= self._engine.streams
        return self._run(list(islice((stream for stream in self._due if stream not in busy), AT_ONCE)))

    def _run(self, ready: list[str]) -> list[str]:
        if not ready:
            return []
        # Commands find the stream as it is stored; and the events beside it are in the topic before theirs are there.
        refused = self._pending.flush(ready)
        self._streams.release(refused)
        obeyed = [found for stream in ready if (found := self._obeyed(stream)) is not None]
        self._due.difference_update(stream for stream in ready if stream in self._engine)
        # Some may have gone to other workers while store or broker were waited for.
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
        """See whether anybody has these streams: not at once, and not all workers at the same moment."""
        for stream in streams:
            self._nobodys[stream] = time.monotonic() + ORPHAN_AFTER_S * random.uniform(1, 2)  # noqa: S311

    def look_after_the_rest(self, busy: Container[str]) -> list[str]:
        """Claim streams that nobody holds, have them obey, and let them go again; some at a time. Returns as `run`."""
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
        """The next of all that are stored, while a command to all wants them. One that comes meanwhile goes through
        all of them, too, after it."""
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
            self._all = self._store.pieces()  # From the beginning: who has obeyed is passed over.
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
            return False  # Whoever loads it will say so.

    def _obeyed(self, stream: str) -> _Obeyed | None:
        """The stream after all that it has to obey; None where it has gone, or there is nothing."""
        if stream not in self._engine:
            return None
        resident = self._engine.resident(stream)
        if resident.homeless:
            return None  # They wait until it can be stored that they were obeyed.
        waiting = self._commands.after(resident.header)
        header, own, tensors, approved = resident.header, self._engine.tensors(stream), None, None
        events: tuple[SealedEvent, ...] = ()
        meant = _meant(waiting, resident)
        if more := len(meant) > COMMANDS_AT_ONCE:
            waiting = meant = meant[:COMMANDS_AT_ONCE]
        for numbered in meant:
            subject = Subject(header, tensors or own, partial(self._streams.kept, stream))
            entry = obey(numbered.command, subject, self._context, resident.token)
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
    """To a stream that only begins, what was once done to others means nothing; what holds for all of them does.

    Nor to one whose header was lost, and with it what it has obeyed: all of that would be done to it once more.
    """
    since = resident.lost if resident.stored else math.inf
    return [n for n in waiting if n.command.action in STANDING or n.arrived >= since]


def _done(header: StreamHeader, obeyed: list[Numbered]) -> StreamHeader:
    newest = dict(header.commands)
    for numbered in obeyed:
        position = numbered.position
        newest[position.log] = max(position.offset, newest.get(position.log, -1))
    return header.model_copy(update={"commands": newest})
