"""The console's access to broker and store: blocking clients, called in a pool of threads."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kafka.errors import KafkaError

from monitoring.console.app import Picture
from schemas.command import Command
from schemas.config import WorkerConfig
from schemas.errors import StateError, UnreachableError
from schemas.prediction import Prediction
from schemas.state import decode_header
from worker.console.site import WorkerScrape
from worker.console.thumbnails import Thumbnails
from worker.console.topics import TopicReader
from worker.control.send import put_command
from worker.store.store import StateStore

SEND_TIMEOUT_S = 10.0


class SiteBackend:
    """The `monitoring.console.app.Backend` of a real site."""

    def __init__(self, config: WorkerConfig, topics: TopicReader, site: WorkerScrape) -> None:
        self._config, self._topics, self._site = config, topics, site
        self._thumbnails = Thumbnails(config.kafka, config.frames)
        self._store = StateStore(config.store)
        self._store_lock = threading.Lock()
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="console")

    async def thumbnails(self, wanted: list[Prediction], large: bool) -> list[Picture]:
        return await self._run(self._thumbnails.get, wanted, large) if wanted else []

    async def send(self, command: Command) -> None:
        await self._run(self._send, command)

    async def stored(self, stream: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = await self._run(self._stored, stream)
        return found

    def site(self) -> dict[str, Any]:
        return {**self._site.figures(), "topics": self._topics.reached}

    def known_streams(self) -> list[str]:
        """The streams that have a state. Raises UnreachableError."""
        with self._store_lock:
            return sorted(self._store.streams())

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._thumbnails.close()
        self._store.close()

    async def _run(self, action: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, action, *arguments)

    def _send(self, command: Command) -> None:
        """Send, and wait for the broker's acknowledgement. Raises UnreachableError."""
        kafka = self._config.kafka
        try:
            put_command(kafka, command, "console", SEND_TIMEOUT_S)
        except (KafkaError, OSError) as error:
            raise UnreachableError(
                f"the command could not be sent to topic {kafka.topics.commands}: {error or type(error).__name__}"
            ) from error

    def _stored(self, stream: str) -> dict[str, Any] | None:
        with self._store_lock:
            (found,) = self._store.overview([stream])
        if not found.token:
            return None
        header = None
        with contextlib.suppress(StateError):  # The worker replaces a damaged header; the rest can be shown.
            header = decode_header(found.header or b"")
        drift = header and header.drift
        return {
            "owner": found.owner,
            "token": found.token,
            "bytes": found.tensor_bytes,
            "snapshots": found.snapshots,
            "drift": drift and ("moving" if drift.adapting else "settled"),
            **{name: header and getattr(header, name) for name in ("frames", "step", "method", "bundle")},
        }
