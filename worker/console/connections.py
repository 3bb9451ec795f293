"""The console's connections: one that asks for nothing is closed, for there are only so many."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0


class Impatient(H11Protocol):
    """Closes a connection whose next request has not begun with a whole head in `HEAD_S`, however slowly bytes come.

    uvicorn does so only after a request that was answered, and only where no byte comes at all.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end()

    def _wait(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._end()
        elif self._patience is None:
            self._patience = self.loop.call_later(HEAD_S, self.transport.close)

    def _end(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
