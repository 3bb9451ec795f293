"""What an operator does to streams from outside of the workers.

Every change claims the stream first. A worker that has it finds its next write refused, reads the stream again, and
goes on from what was written here: no worker has to be stopped, and no frame is lost or folded twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from torch import Tensor

from schemas.config import WorkerConfig
from schemas.errors import StateError
from schemas.state import (
    StreamHeader,
    StreamState,
    decode_file,
    decode_header,
    decode_state,
    encode_file,
    encode_header,
    encode_tensors,
)
from schemas.update import Decision, UpdateEvent
from worker.compress import pack
from worker.store import Claimed, Overview, StateStore, Write


@dataclass(frozen=True)
class Listed:
    """A stream as `streams list` shows it; `header` is None where it cannot be read."""

    stream: str
    owner: str
    token: int
    header: StreamHeader | None
    tensor_bytes: int
    snapshots: int

    @property
    def condition(self) -> str:
        """In a word: what a worker would find."""
        if self.header is None:
            return "damaged"
        return "expired" if self.header.step and not self.tensor_bytes else "ok"


class Operator:
    """Reads and changes stored streams. `like` are the tensors of a stream that has seen nothing."""

    def __init__(
        self, config: WorkerConfig, store: StateStore, bundle: str, like: dict[str, Tensor], name: str
    ) -> None:
        self._limit, self._compression = config.store.max_state_bytes, config.store.compression
        self._store, self._bundle, self._like, self._name = store, bundle, like, name

    def listed(self, streams: list[str] | None = None) -> list[Listed]:
        """These streams, or all, by name. Raises StateError for an unknown one."""
        names = sorted(self._store.streams()) if streams is None else streams
        return [self._as_listed(name, found) for name, found in zip(names, self._store.overview(names), strict=True)]

    def _as_listed(self, stream: str, found: Overview) -> Listed:
        if not found.token:
            raise _unknown(stream)
        try:
            header = decode_header(found.header) if found.header else StreamHeader(stream=stream, bundle="", method="")
        except StateError:
            header = None
        return Listed(stream, found.owner, found.token, header, found.tensor_bytes, found.snapshots)

    def snapshot_steps(self, stream: str) -> list[int]:
        """The steps at which snapshots were taken, newest first."""
        return [decode_header(header).step for header, _ in self._store.snapshots(stream)]

    def export(self, stream: str) -> bytes:
        """The stream's state as one file."""
        stored = self._known(stream)
        return encode_file(decode_state(stored.header or b"", stored.tensors or b"", self._like, self._limit))

    def reset(self, stream: str, reason: str) -> UpdateEvent:
        """Back to the source model."""
        self._known(stream)
        return self._replace(stream, self._like, 0, "reset", reason)

    def rollback(self, stream: str, back: int, reason: str) -> UpdateEvent:
        """Back to a snapshot: 1 is the newest."""
        self._known(stream)
        snapshots = self._store.snapshots(stream)
        if not 1 <= back <= len(snapshots):
            raise StateError(f"stream {stream!r} has {len(snapshots)} snapshots, there is no number {back}")
        state = decode_state(*snapshots[back - 1], self._like, self._limit)
        self._check_bundle(state)
        return self._replace(stream, state.tensors, state.header.step, "rolled_back", reason)

    def import_file(self, stream: str, content: bytes, reason: str) -> UpdateEvent:
        """The parameters of a file; the stream keeps its own position, or starts without one."""
        state = decode_file(content, self._like, self._limit)
        self._check_bundle(state)
        return self._replace(stream, state.tensors, state.header.step, "imported", reason)

    def _check_bundle(self, state: StreamState) -> None:
        if state.header.bundle != self._bundle:
            raise StateError(f"the state belongs to bundle {state.header.bundle}, this site runs {self._bundle}")

    def _known(self, stream: str) -> Claimed:
        stored = self._store.read(stream)
        if stored.header is None:
            raise _unknown(stream)
        return stored

    def _replace(
        self, stream: str, tensors: dict[str, Tensor], step: int, decision: Decision, reason: str
    ) -> UpdateEvent:
        (claimed,) = self._store.claim([stream], self._name)
        try:
            old = decode_header(claimed.header) if claimed.header else None
        except StateError:
            old = None
        if old is None:
            old = StreamHeader(stream=stream, bundle=self._bundle, method="mgg")
        header = old.model_copy(update={"step": step, "events": old.events + 1, "bundle": self._bundle})
        event = UpdateEvent(
            id=f"{stream}@{header.events}",
            stream=stream,
            time=datetime.now(UTC),
            decision=decision,
            reason=reason,
            frames=[],
            step=step,
            token=claimed.token,
            bundle=self._bundle,
            worker=self._name,
        )
        # Events wait beside the state, one a line, until the stream's next worker publishes them.
        events = b"\n".join([*(claimed.event or b"").splitlines(), event.model_dump_json().encode()])
        content = pack(encode_tensors(tensors, step), self._compression)
        write = Write(stream, claimed.token, header.events, encode_header(header), events, content)
        if self._store.write([write]) != [True]:
            raise StateError(
                f"a worker claimed stream {stream!r} at the same moment and nothing was changed; try again"
            )
        return event


def _unknown(stream: str) -> StateError:
    return StateError(f"stream {stream!r} has no stored state; 'driftkeel streams list' shows those that have")
