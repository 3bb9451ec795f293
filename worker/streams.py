"""Streams between store and engine: claimed and loaded when a frame needs them, written after every step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Set
from datetime import UTC, datetime
from typing import Protocol, TypeVar

from pydantic import ValidationError

from monitoring.metrics import WorkerMetrics
from monitoring.observe import decided
from schemas.config import Adapt
from schemas.config import Store as StoreSettings
from schemas.errors import StateError
from schemas.state import StreamHeader, StreamState, decode_header, decode_state, encode_header, encode_tensors
from schemas.update import UpdateEvent
from worker.compress import pack
from worker.engine import Engine, Proposals
from worker.publish import Publisher
from worker.store import Claimed, StateStore, Write

log = logging.getLogger("driftkeel.streams")
Result = TypeVar("Result")


class Heal(Protocol):
    """Calls the store until it answers."""

    def __call__(self, action: Callable[[], Result]) -> Result:
        """The answer of `action`."""


class Streams:
    """Which streams are resident, and that what is stored and what is in memory agree."""

    def __init__(
        self,
        engine: Engine,
        store: StateStore,
        publisher: Publisher,
        metrics: WorkerMetrics,
        worker: str,
        limits: Adapt,
        settings: StoreSettings,
        heal: Heal,
    ) -> None:
        self.engine, self._store, self._publisher, self._metrics = engine, store, publisher, metrics
        self._worker = worker
        by_bytes = limits.max_resident_bytes // engine.state_bytes
        self._max_resident = max(1, min(limits.max_resident_streams, by_bytes))
        self._max_state_bytes, self._snapshot_every = settings.max_state_bytes, settings.snapshot_every
        self._compression = settings.compression
        self._heal = heal

    def ensure(self, wanted: Iterable[str]) -> None:
        """Make streams resident."""
        wanted = list(dict.fromkeys(wanted))
        # Again, because streams that were resident may go while a store that is away is waited for.
        while missing := [stream for stream in wanted if stream not in self.engine]:
            self._claim(missing)
            self._metrics.resident.set(len(self.engine))

    def _claim(self, streams: list[str]) -> None:
        with self._metrics.store_seconds.labels("claim").time():
            claims = self._heal(lambda: self._store.claim(streams, self._worker))
        for stream, claimed in zip(streams, claims, strict=True):
            self._admit(stream, claimed)

    @property
    def crowded(self) -> bool:
        """Whether more streams are resident than may be."""
        return len(self.engine) > self._max_resident

    def trim(self, busy: Set[str]) -> None:
        """Where too many streams are resident, the least recently used that are not `busy` go."""
        if self.crowded:
            self.release(self.engine.least_recent(len(self.engine) - self._max_resident, busy))

    def release(self, streams: Iterable[str]) -> None:
        """Forget streams; the store has them."""
        streams = list(streams)
        self.engine.release(streams)
        for stream in streams:
            self._metrics.streams.forget(stream)
        self._metrics.resident.set(len(self.engine))

    def write(self, entries: list[tuple[StreamHeader, UpdateEvent, int | None]], proposals: Proposals) -> list[bool]:
        """Store new headers with their events, and tensors where the third is a row of `proposals`.

        False for streams that another worker has claimed since.
        """
        writes = [self._as_write(header, event, row, proposals) for header, event, row in entries]
        with self._metrics.store_seconds.labels("write").time():
            accepted = self._heal(lambda: self._store.write(writes))
        for (header, _, _), write, good in zip(entries, writes, accepted, strict=True):
            if good and header.stream in self.engine:
                resident = self.engine.resident(header.stream)
                resident.header, resident.stored = header, True
            if write.tensors:
                self._metrics.state_bytes.observe(len(write.tensors))
        return accepted

    def _as_write(self, header: StreamHeader, event: UpdateEvent, row: int | None, proposals: Proposals) -> Write:
        tensors = None
        if row is not None:
            tensors = encode_tensors({name: t[row] for name, t in proposals.state.items()}, header.step)
        elif not self.engine.resident(header.stream).stored:
            tensors = encode_tensors(self.engine.tensors(header.stream), header.step)
        return Write(
            header.stream,
            event.token,
            header.events,
            encode_header(header),
            event.model_dump_json().encode(),
            tensors and pack(tensors, self._compression),
            snapshot=event.decision == "applied"
            and self._snapshot_every > 0
            and header.step % self._snapshot_every == 0,
        )

    def _admit(self, stream: str, claimed: Claimed) -> None:
        for content in (claimed.event or b"").splitlines():
            self._publish_again(stream, content)
        state, reset = self._restored(stream, claimed)
        if reset:
            log.warning("stream %s restarts from source: %s", stream, reset)
            event = UpdateEvent(
                id=f"{stream}@{state.header.events}",
                stream=stream,
                time=datetime.now(UTC),
                decision="reset",
                reason=reset,
                frames=[],
                step=0,
                token=claimed.token,
                bundle=self.engine.bundle_hash,
                worker=self._worker,
            )
            self._publisher.update(event)
            decided(self._metrics, event, state.header)
        self.engine.admit(state, claimed.token, stored=bool(claimed.header) and not reset)

    def _restored(self, stream: str, claimed: Claimed) -> tuple[StreamState, str | None]:
        """What was stored; or a fresh state and the reason, which keeps the position wherever it can be read."""
        bundle, method = self.engine.bundle_hash, self.engine.bundle.method_name
        header = StreamHeader(stream=stream, bundle=bundle, method=method)
        if claimed.header is None:
            return StreamState(header=header, tensors=self.engine.like), None
        try:
            old = decode_header(claimed.header)
            if old.stream != stream:
                raise StateError(f"the stored state belongs to stream {old.stream!r}")
            header = old.model_copy(update={"bundle": bundle, "method": method, "step": 0, "events": old.events + 1})
            if (old.bundle, old.method) != (bundle, method):
                reason = f"the stored state belongs to bundle {old.bundle} ({old.method}), this is {bundle} ({method})"
                return StreamState(header=header, tensors=self.engine.like), reason
            if claimed.tensors is None:
                raise StateError("the stored state expired while the stream was idle, or its tensors were evicted")
            return decode_state(claimed.header, claimed.tensors, self.engine.like, self._max_state_bytes), None
        except StateError as error:
            return StreamState(header=header, tensors=self.engine.like), str(error)

    def _publish_again(self, stream: str, content: bytes) -> None:
        """The last event may not have reached the topic before its worker died. Consumers deduplicate on its id."""
        try:
            event = UpdateEvent.model_validate_json(content)
        except ValidationError:
            log.warning("the stored event of stream %s cannot be read and is not published again", stream)
            return
        if event.stream == stream:
            self._publisher.update(event)
