"""The console's connections. Their number is limited, so idle ones are closed."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0


class Impatient(H11Protocol):
    """Closes a connection that does not send the complete head of its next request within `HEAD_S`.

    uvicorn itself does so only after an answered request, and only if no byte arrives at all.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_or_cancel()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._start_or_cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel()

    def _start_or_cancel(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_S, self.transport.close)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
