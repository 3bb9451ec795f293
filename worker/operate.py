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
from worker.store import Claimed, StateStore, Write


@dataclass(frozen=True)
class Listed:
    """A stream as `streams list` shows it; `header` is None where it cannot be read."""

    stream: str
    owner: str
    token: int
    header: StreamHeader | None
    state_bytes: int
    snapshots: list[int]


class Operator:
    """Reads and changes stored streams. `like` are the tensors of a stream that has seen nothing."""

    def __init__(
        self, config: WorkerConfig, store: StateStore, bundle: str, like: dict[str, Tensor], name: str
    ) -> None:
        self._limit, self._compression = config.store.max_state_bytes, config.store.compression
        self._store, self._bundle, self._like, self._name = store, bundle, like, name

    def listed(self, stream: str) -> Listed:
        """One stream. Raises StateError for an unknown one."""
        stored = self._known(stream)
        try:
            header = decode_header(stored.header or b"")
        except StateError:
            header = None
        steps = [decode_header(snapshot).step for snapshot, _ in self._store.snapshots(stream)]
        return Listed(stream, self._store.owner(stream), stored.token, header, len(stored.tensors or b""), steps)

    def streams(self) -> list[str]:
        return sorted(self._store.streams())

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
            raise StateError(f"stream {stream!r} has no stored state; 'driftkeel streams list' shows those that have")
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
