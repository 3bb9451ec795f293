"""What an operator does to streams from outside of the workers.

Every change claims the stream first. A worker that has the stream finds its next write refused, reads it again, and
goes on from what was written here. So no worker has to be stopped, and no frame is lost or folded in twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from meta.method import State
from schemas.command import Command
from schemas.config import WorkerConfig
from schemas.errors import StateError
from schemas.state import MAX_EVENTS_BYTES, Snapshot, decode_header
from schemas.state_tensors import StreamState, decode_file, decode_state, encode_file
from schemas.update import UpdateEvent
from worker.control.stored import unknown
from worker.engine.engine import Engine
from worker.guard.answer import Policies
from worker.store.store import Claimed, StateStore
from worker.streams.entry import Entry, as_write
from worker.streams.last_events import after_last_event
from worker.streams.obey import Context, Subject, imported, obey
from worker.streams.restore import chosen_snapshot


class Operator:
    """Changes stored streams. No stream is resident in `engine`, which only knows how their tensors look."""

    def __init__(self, config: WorkerConfig, store: StateStore, engine: Engine, name: str) -> None:
        self._limit, self._compression = config.store.max_state_bytes, config.store.compression
        self._store, self._engine, self._name = store, engine, name
        self._bundle, self._like = engine.bundle_hash, engine.like
        self._context = Context.of(engine, Policies(config.policy, config.streams), name)

    def export(self, stream: str) -> bytes:
        """The stream's state as one file."""
        stored = self._known(stream)
        return encode_file(decode_state(stored.header or b"", stored.tensors or b"", self._like, self._limit))

    def reset(self, stream: str, reason: str) -> UpdateEvent:
        """Back to the source model."""
        return self._obey(Command(stream=stream, action="reset", reason=reason))

    def rollback(self, stream: str, back: int, reason: str) -> UpdateEvent:
        """Back to a snapshot: 1 is the newest."""
        command = Command(stream=stream, action="rollback", snapshot=back, reason=reason)
        self._known(stream)
        self._chosen(stream, back)
        return self._obey(command)

    def import_file(self, stream: str, content: bytes, reason: str) -> UpdateEvent:
        """Give the stream the parameters of a file. It keeps its own position, or starts without one.

        A stream that was deleted here and comes back also gets from the file which commands it had obeyed, and its
        policy. Otherwise it would obey them all again, and a reset of long ago would undo the import.
        """
        try:
            state = decode_file(content, self._like, self._limit)
        except StateError as error:
            raise StateError(f"the file is none that 'driftkeel streams export' wrote: {error}") from error
        self._check_bundle(state)
        comes_back = state.header.stream == stream and self._store.deleted(stream) is not None
        obeyed = {"commands": state.header.commands, "policy": state.header.policy} if comes_back else {}

        def change(subject: Subject, token: int) -> Entry:
            known = replace(subject, header=subject.header.model_copy(update=obeyed))
            return imported(state.tensors, state.header.step, reason, known, self._context, token)

        return self._change(stream, change)

    def _obey(self, command: Command) -> UpdateEvent:
        self._known(command.stream)
        return self._change(command.stream, lambda subject, token: obey(command, subject, self._context, token))

    def _check_bundle(self, state: StreamState) -> None:
        if state.header.bundle != self._bundle:
            raise StateError(f"the state belongs to bundle {state.header.bundle}, this site runs {self._bundle}")

    def _known(self, stream: str) -> Claimed:
        stored = self._store.read(stream)
        _refuse_foreign(stream, stored.foreign)
        if stored.header is None:
            raise unknown(self._store, stream)
        return stored

    def _change(self, stream: str, change: Callable[[Subject, int], Entry]) -> UpdateEvent:
        (claimed,) = self._store.claim([stream], self._name)
        _refuse_foreign(stream, claimed.foreign)
        if len(claimed.event or b"") > MAX_EVENTS_BYTES // 2:
            raise StateError(
                f"too many events of stream {stream!r} wait beside its state and nothing was changed; a worker that "
                f"gets a frame or a command for it publishes them"
            )
        # The event waits beside the state, behind those that wait already, until a worker claims the stream.
        entry = replace(change(self._subject(stream, claimed), claimed.token), waiting=claimed.event or b"")
        if self._store.write([as_write(entry, claimed.token, self._compression)]) != [True]:
            raise StateError(
                f"a worker claimed stream {stream!r} at the same moment and nothing was changed; try again"
            )
        return entry.events[-1].event

    def _subject(self, stream: str, claimed: Claimed) -> Subject:
        begun = self._engine.begun(stream)
        header, tensors = begun.header, begun.tensors
        try:
            header = decode_header(claimed.header) if claimed.header else header
            tensors = decode_state(claimed.header or b"", claimed.tensors or b"", self._like, self._limit).tensors
        except StateError:  # What cannot be read is replaced by the change.
            header = header if header.events else after_last_event(header, claimed.event)
        return Subject(header, tensors, lambda back: self._chosen(stream, back))

    def _chosen(self, stream: str, back: int) -> tuple[Snapshot, State]:
        return chosen_snapshot(self._store, stream, back, self._like, self._bundle, self._limit)


def _refuse_foreign(stream: str, foreign: str) -> None:
    if foreign:
        raise StateError(f"stream {stream!r} cannot be stored: {foreign}")
