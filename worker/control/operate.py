"""What an operator does to streams from outside of the workers.

Every change claims the stream first. A worker that has it finds its next write refused, reads the stream again, and
goes on from what was written here: no worker has to be stopped, and no frame is lost or folded twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from meta.method import State
from schemas.command import Command
from schemas.config import WorkerConfig
from schemas.errors import StateError
from schemas.policy import Policy
from schemas.state import (
    MAX_EVENTS_BYTES,
    Snapshot,
    StreamHeader,
    StreamState,
    decode_file,
    decode_header,
    decode_state,
    encode_file,
    read_snapshot,
)
from schemas.update import Proxies, UpdateEvent
from worker.engine.engine import Engine
from worker.guard.answer import Policies
from worker.store.store import Claimed, Overview, StateStore
from worker.streams.obey import Entry, Place, Subject, imported, obey
from worker.streams.restore import after_last_event, chosen_snapshot
from worker.streams.streams import as_write


@dataclass(frozen=True)
class Listed:
    """A stream as `streams list` shows it; `header` is None where it cannot be read."""

    stream: str
    owner: str
    token: int
    header: StreamHeader | None
    tensor_bytes: int
    snapshots: int
    foreign: str = ""

    @property
    def condition(self) -> str:
        """In a word: what a worker would find."""
        if self.foreign:
            return "foreign"
        if self.header is None:
            return "damaged"
        return "expired" if self.header.step and not self.tensor_bytes else "ok"


class Operator:
    """Reads and changes stored streams; `engine` has none of them, and knows what they look like."""

    def __init__(self, config: WorkerConfig, store: StateStore, engine: Engine, name: str) -> None:
        self._limit, self._compression = config.store.max_state_bytes, config.store.compression
        self._store, self._engine, self._name = store, engine, name
        self._bundle, self._like = engine.bundle_hash, engine.like
        self._policies = Policies(config.policy, config.streams)
        self._place = Place.of(engine, self._policies, name)

    def listed(self, streams: list[str] | None = None) -> list[Listed]:
        """These streams, or all, by name. Raises StateError for an unknown one."""
        if streams is not None:
            require_known(self._store, streams)
        return listed(self._store, streams)

    def seen(self, found: Listed) -> tuple[Policy, Proxies]:
        """The policy that holds for a stream, and what its state says of its accuracy."""
        header = found.header or StreamHeader(stream=found.stream, bundle="", method="")
        return self._policies.of(header), self._engine.estimate(header)

    def snapshots(self, stream: str) -> list[Snapshot | None]:
        """What is kept for rollback, newest first; None for what cannot be read."""
        return [_snapshot(said) for said in self._store.snapshots(stream)]

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
        """The parameters of a file; the stream keeps its own position, or starts without one.

        One that was deleted here and is to come back keeps, too, which commands it had obeyed, and the rules that came
        of them: else all of them would be done to it once more, and a reset of long ago undo the import.
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
            return imported(state.tensors, state.header.step, reason, known, self._place, token)

        return self._change(stream, change)

    def _obey(self, command: Command) -> UpdateEvent:
        self._known(command.stream)
        return self._change(command.stream, lambda subject, token: obey(command, subject, self._place, token))

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
        # Events wait beside the state until the stream's next worker publishes them.
        entry = replace(change(self._subject(stream, claimed), claimed.token), waiting=claimed.event or b"")
        if self._store.write([as_write(entry, claimed.token, self._compression)]) != [True]:
            raise StateError(
                f"a worker claimed stream {stream!r} at the same moment and nothing was changed; try again"
            )
        return entry.events[-1].event

    def _subject(self, stream: str, claimed: Claimed) -> Subject:
        header = StreamHeader(stream=stream, bundle=self._bundle, method=self._engine.bundle.method_name)
        tensors = self._like
        try:
            header = decode_header(claimed.header) if claimed.header else header
            tensors = decode_state(claimed.header or b"", claimed.tensors or b"", self._like, self._limit).tensors
        except StateError:  # What cannot be read is about to be replaced.
            header = header if header.events else after_last_event(header, claimed.event)
        return Subject(header, tensors, lambda back: self._chosen(stream, back))

    def _chosen(self, stream: str, back: int) -> tuple[Snapshot, State]:
        return chosen_snapshot(self._store, stream, back, self._like, self._bundle, self._limit)


def _snapshot(said: bytes) -> Snapshot | None:
    try:
        return read_snapshot(said)
    except StateError:
        return None


def listed(store: StateStore, streams: list[str] | None = None) -> list[Listed]:
    """What is stored of these streams, or of all, by name; those of which nothing is, are left out."""
    names = sorted(set(store.streams())) if streams is None else streams
    # One that was deleted since the names were asked for is none of them any more.
    known = [one for one in zip(names, store.overview(names), strict=True) if one[1].token or one[1].foreign]
    return [_as_listed(name, overview) for name, overview in known]


def _as_listed(stream: str, found: Overview) -> Listed:
    try:
        header = decode_header(found.header) if found.header else StreamHeader(stream=stream, bundle="", method="")
    except StateError:
        header = None
    return Listed(stream, found.owner, found.token, header, found.tensor_bytes, found.snapshots, found.foreign)


def require_known(store: StateStore, streams: list[str]) -> list[Overview]:
    """What is stored of these, in order. Raises StateError for an unknown one."""
    found = store.overview(streams)
    for stream, overview in zip(streams, found, strict=True):
        if not overview.token and not overview.foreign:
            raise unknown(store, stream)
    return found


def _refuse_foreign(stream: str, foreign: str) -> None:
    if foreign:
        raise StateError(f"stream {stream!r} cannot be stored: {foreign}")


def unknown(store: StateStore, stream: str) -> StateError:
    """The error for a stream of which nothing is stored."""
    if store.deleted(stream) is not None:
        return StateError(f"stream {stream!r} was deleted; 'driftkeel audit show --stream' says when and by whom")
    return StateError(f"stream {stream!r} has no stored state; 'driftkeel streams list' shows those that have")
