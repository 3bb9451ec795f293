"""The state that a claim found in the store; where it cannot be used, a fresh one, and why."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from meta.method import State
from schemas.errors import StateError
from schemas.state import Snapshot, StreamHeader, decode_header
from schemas.state_tensors import StreamState, decode_snapshot, decode_state, decode_tensors
from schemas.update import Decision
from worker.engine.engine import Engine
from worker.store.compress import unpack
from worker.store.store import Claimed, StateStore
from worker.streams.last_events import after_last_event
from worker.streams.obey import with_other_parameters
from worker.streams.upgrade import Upgrade

log = logging.getLogger("driftkeel.streams")


@dataclass(frozen=True)
class Restored:
    """The state to load. `change`: why it differs from what was stored; None where it does not. `lost`: not even the
    stored header could be read."""

    state: StreamState
    change: str | None = None
    approved: State | None = None
    decision: Decision = "reset"
    lost: bool = False


class Restorer:
    """Reads stored states for the bundle that `engine` runs."""

    def __init__(self, engine: Engine, upgrade: Upgrade, max_state_bytes: int) -> None:
        self._engine, self._upgrade, self._max_state_bytes = engine, upgrade, max_state_bytes

    def restored(self, stream: str, claimed: Claimed) -> Restored:
        """The stored state; or a fresh one and the reason. The position is kept wherever the header can be read, so
        that no frame is folded in twice."""
        bundle, method = self._engine.bundle_hash, self._engine.bundle.method_name
        fresh = self._engine.begun(stream).header
        if claimed.header is None:  # New, or deleted before: then its last event is there.
            return self._from_source(after_last_event(fresh, claimed.event), None)
        try:
            old = decode_header(claimed.header)
            if old.stream != stream:
                raise StateError(f"the stored state belongs to stream {old.stream!r}")
        except StateError as error:
            return replace(self._from_source(after_last_event(fresh, claimed.event), str(error)), lost=True)
        if (old.bundle, old.method) != (bundle, method):
            return self._moved(old, claimed)
        fresh = with_other_parameters(old, 0)
        approved = self._approved(old, claimed.approved)
        fresh.approved = old.approved if approved else None
        try:
            if (tensors := claimed.tensors) is None:
                raise StateError("the stored state expired while the stream was idle, or its tensors were evicted")
            if not tensors:
                raise StateError(
                    f"the stored state is empty or has more than store.max_state_bytes = {self._max_state_bytes}"
                )
            state = decode_state(claimed.header, tensors, self._engine.like, self._max_state_bytes)
        except StateError as error:
            return self._from_source(fresh, str(error), approved)
        state.header.approved = fresh.approved
        return Restored(state, None, approved)

    def _moved(self, old: StreamHeader, claimed: Claimed) -> Restored:
        """A state of another bundle, carried over or reset."""
        if (tensors := claimed.tensors) is not None and len(tensors) > self._max_state_bytes:
            tensors = None
        carried = self._upgrade.moved(old, tensors)
        if carried.tensors is None:
            return self._from_source(carried.header, carried.why)
        approved = self._approved(old, claimed.approved)
        carried.header.approved = old.approved if approved else None
        return Restored(StreamState(header=carried.header, tensors=carried.tensors), carried.why, approved, "carried")

    def _from_source(self, header: StreamHeader, reason: str | None, approved: State | None = None) -> Restored:
        return Restored(StreamState(header=header, tensors=self._engine.like), reason, approved)

    def _approved(self, header: StreamHeader, content: bytes | None) -> State | None:
        """The approved parameters. None where they are damaged or gone: source answers then, as nobody approved
        anything else."""
        if header.approved is None:
            return None
        try:
            if content is None:
                raise StateError("they are not in the store")
            return decode_tensors(content, header.approved, self._engine.source)
        except StateError as error:
            log.error("approved parameters of stream %s cannot be used, source answers: %s", header.stream, error)
            return None


def chosen_snapshot(
    store: StateStore, stream: str, back: int, like: State, bundle: str, max_bytes: int
) -> tuple[Snapshot, State]:
    """The `back`th stored snapshot, 1 being the newest. Raises StateError where there is none, or none that fits the
    bundle and `max_bytes`."""
    count, said, packed = store.snapshot(stream, back)
    if not count:
        raise StateError(f"stream {stream!r} has no snapshots yet; 'reset' leads back to the source model")
    if not 1 <= back <= count:
        kept = f"{count} snapshot{'' if count == 1 else 's'}"
        raise StateError(f"stream {stream!r} has {kept}, there is no number {back}; 'streams show' lists them")
    try:
        if not said:
            raise StateError(f"it is damaged, or has more than store.max_state_bytes = {max_bytes}")
        return decode_snapshot(said, unpack(packed, max_bytes), like, bundle)
    except StateError as error:
        elsewhere = "roll back to another, or reset the stream to the source model"
        raise StateError(f"snapshot {back} of stream {stream!r} cannot be used: {error}; {elsewhere}") from error
