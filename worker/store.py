"""Stream states in Redis: claimed by token, written together with their position, in one atomic script.

A stream is one hash, {prefix}:{stream}, with the fields token, owner, header, tensors and event. A claim raises
the token; a write is taken only with the newest token. A worker that was paused while another took its streams over
(a zombie) is so refused. The last update event lies beside the state, so that a crash between writing the state
and publishing the event cannot lose it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from schemas.config import Store as StoreSettings
from schemas.errors import StateError, UnreachableError

log = logging.getLogger("driftkeel.store")
Result = TypeVar("Result")

_CLAIM = """
local token = redis.call('HINCRBY', KEYS[1], 'token', 1)
redis.call('HSET', KEYS[1], 'owner', ARGV[1])
local stored = redis.call('HMGET', KEYS[1], 'header', 'tensors', 'event')
return {token, stored[1], stored[2], stored[3]}
"""

_WRITE = """
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'header', ARGV[2], 'event', ARGV[3])
if ARGV[4] ~= '' then redis.call('HSET', KEYS[1], 'tensors', ARGV[4]) end
return 1
"""


@dataclass(frozen=True)
class Claimed:
    """A claim, and what was stored: header and tensors are None for a stream that was never written."""

    token: int
    header: bytes | None
    tensors: bytes | None
    event: bytes | None


@dataclass(frozen=True)
class Write:
    """A state to write. `tensors` None leaves the stored ones as they are."""

    stream: str
    token: int
    header: bytes
    event: bytes
    tensors: bytes | None


class StateStore:
    """The store's client. Its methods raise UnreachableError where the store does not answer."""

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings
        # No retries in the client: the worker's loop retries, and keeps its place in the consumer group meanwhile.
        self._client = redis.Redis.from_url(
            settings.url.get_secret_value(),
            socket_timeout=5,
            socket_connect_timeout=5,
            retry=Retry(NoBackoff(), 0),
        )
        self._claim = self._client.register_script(_CLAIM)
        self._write = self._client.register_script(_WRITE)

    def key(self, stream: str) -> str:
        """The stream's key; the braces make its name the hash tag of a Redis Cluster."""
        return f"{self._settings.prefix}:{{{quote(stream, safe='')}}}"

    def ping(self) -> None:
        self._reach(lambda: self._client.ping())

    def claim(self, streams: list[str], owner: str) -> list[Claimed]:
        """Take over streams, in order."""
        rows = self._pipelined(self._claim, [([self.key(stream)], [owner]) for stream in streams])
        return [Claimed(int(token), header, tensors, event) for token, header, tensors, event in rows]

    def write(self, writes: list[Write]) -> list[bool]:
        """Write states, in order; False where another worker has claimed the stream since."""
        calls = [([self.key(w.stream)], [w.token, w.header, w.event, w.tensors or b""]) for w in writes]
        return [bool(accepted) for accepted in self._pipelined(self._write, calls)]

    def close(self) -> None:
        self._client.close()

    def _pipelined(self, script: Any, calls: list[tuple[list[str], list[Any]]]) -> list[Any]:
        def run() -> list[Any]:
            pipeline = self._client.pipeline(transaction=False)
            for keys, arguments in calls:
                script(keys=keys, args=arguments, client=pipeline)
            return list(pipeline.execute())

        return self._reach(run)

    def _reach(self, action: Callable[[], Result]) -> Result:
        try:
            return action()
        except redis.exceptions.AuthenticationError as error:
            raise UnreachableError(f"the store at {self._settings.address} refuses the login: {error}") from error
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
            raise UnreachableError(f"the store at {self._settings.address} does not answer: {error}") from error
        except redis.exceptions.ResponseError as error:
            raise StateError(f"the store at {self._settings.address} refuses a command: {error}") from error
