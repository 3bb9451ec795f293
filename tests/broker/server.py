"""Connections: frames of bytes in, requests to their functions, responses out, one after the other per connection."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import logging
import ssl
import struct
from typing import Any

from kafka.protocol import metadata, sasl
from kafka.protocol.api_header import RequestHeader

from tests.broker import errors
from tests.broker.requests import HANDLERS, Broker, Call
from tests.broker.sasl import MECHANISMS, DeniedError, Exchange

log = logging.getLogger("tests.broker")
LARGEST_REQUEST = 100 << 20
CLOSE_DELAY_S = 0.1  # after a login that failed: Kafka's connection.failed.authentication.delay.ms
OWN = [
    (metadata.ApiVersionsRequest, metadata.ApiVersionsResponse, 0, 4),
    (sasl.SaslHandshakeRequest, sasl.SaslHandshakeResponse, 0, 1),
    (sasl.SaslAuthenticateRequest, sasl.SaslAuthenticateResponse, 0, 2),
]
BY_KEY = {row[0].API_KEY: row for row in [*HANDLERS, *OWN]}
VERSIONS = [{"api_key": key, "min_version": row[2], "max_version": row[3]} for key, row in sorted(BY_KEY.items())]


class GoneError(Exception):
    """This connection is not served any longer."""


def response(kind: Any, version: int, fields: dict[str, Any], correlation: int) -> bytes:
    """As bytes, with length and header."""
    message = kind(version=version, **_structs(kind, fields))
    message.with_header(correlation_id=correlation)
    return bytes(message.encode(header=True, framed=True))


def _structs(kind: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Lists of plain dictionaries become the protocol's own classes."""
    made = {}
    for name, value in fields.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            inner = kind.fields[name].data_class
            value = [inner(**_structs(inner, item)) for item in value]
        made[name] = value
    return made


class Server:
    """`users` with their passwords: where there are any, every connection has to say who it is."""

    def __init__(self, broker: Broker, users: dict[str, str]) -> None:
        self._broker, self._users = broker, users

    async def serve(self, port: int, tls: ssl.SSLContext | None) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", port, ssl=tls, limit=1 << 20)
        async with server:
            await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(self._broker, self._users, str(writer.get_extra_info("peername")[0]))
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            try:
                while True:
                    (size,) = struct.unpack(">i", await reader.readexactly(4))
                    if not 0 <= size <= LARGEST_REQUEST:
                        raise GoneError(f"a request of {size} bytes")
                    for content in await connection.answer(await reader.readexactly(size)):
                        writer.write(content)
                    await writer.drain()
                    if connection.denied:
                        await asyncio.sleep(CLOSE_DELAY_S)
                        return
            except GoneError as reason:
                log.warning("connection closed: %s", reason)
            finally:
                writer.close()


class Connection:
    """What one client has said so far."""

    def __init__(self, broker: Broker, users: dict[str, str], host: str) -> None:
        self._broker, self._users, self._host = broker, users, host
        self._exchange: Exchange | None = None
        self.denied = False

    async def answer(self, content: bytes) -> list[bytes]:
        """The response's frame; none where the client wants none. Raises GoneError."""
        key, version, correlation = struct.unpack_from(">hhi", content)
        if key not in BY_KEY:
            raise GoneError(f"request {key} is not known")
        request_class, response_class, oldest, newest = BY_KEY[key][:4]
        if request_class is metadata.ApiVersionsRequest and version > newest:  # answered in the oldest version
            fields = {"error_code": errors.UNSUPPORTED_VERSION, "api_keys": VERSIONS}
            return [response(response_class, 0, fields, correlation)]
        if not oldest <= version <= newest:
            raise GoneError(f"{request_class.name} in version {version} is not spoken")
        stream = io.BytesIO(content[:1_000])
        header = RequestHeader.decode(stream, flexible=request_class.flexible_version_q(version))
        request = request_class.decode(memoryview(content)[stream.tell() :], version=version)
        client = (header.client_id or "", f"/{self._host}")
        fields = await self._fields(BY_KEY[key], Call(self._broker, request, version, client))
        if getattr(request, "acks", None) == 0:
            return []
        return [response(response_class, version, fields, correlation)]

    async def _fields(self, row: tuple[Any, ...], call: Call) -> dict[str, Any]:
        kind = row[0]
        if kind is metadata.ApiVersionsRequest:
            return {"error_code": 0, "api_keys": VERSIONS}
        if kind is sasl.SaslHandshakeRequest:
            return self._handshake(call.request.mechanism)
        if kind is sasl.SaslAuthenticateRequest:
            return self._authenticate(bytes(call.request.auth_bytes))
        if self._users and not (self._exchange and self._exchange.user):
            raise GoneError("a request before the client has said who it is")
        fields = row[4](call)
        return await fields if inspect.isawaitable(fields) else fields

    def _handshake(self, mechanism: str) -> dict[str, Any]:
        if mechanism not in MECHANISMS or not self._users:
            return {"error_code": errors.UNSUPPORTED_SASL_MECHANISM, "mechanisms": MECHANISMS if self._users else []}
        self._exchange = Exchange(mechanism, self._users)
        return {"error_code": 0, "mechanisms": MECHANISMS}

    def _authenticate(self, content: bytes) -> dict[str, Any]:
        try:
            if self._exchange is None:
                raise DeniedError
            return {"error_code": 0, "error_message": None, "auth_bytes": self._exchange.answer(content)}
        except DeniedError:
            self.denied = True
            text = "Authentication failed: Invalid username or password"
            return {"error_code": errors.SASL_AUTHENTICATION_FAILED, "error_message": text, "auth_bytes": b""}
