"""The console's pages and their data: a small ASGI application without Kafka and store."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from monitoring.console.fleet import Fleet
from monitoring.console.security import COOKIE, Gate, Session
from schemas.command import Command
from schemas.config import Console
from schemas.errors import DriftkeelError, UnreachableError, mistakes
from schemas.policy import PolicyChange
from schemas.prediction import Prediction

log = logging.getLogger("driftkeel.console")
STATIC = Path(__file__).parent / "static"
TICK_S = 0.5
KEEP_ALIVE_TICKS = 20
MAX_VIEWERS = 32
MAX_THUMBNAILS = 64  # of one request


@dataclass(frozen=True)
class Picture:
    """A small JPEG or PNG, and the prediction of the frame it shows."""

    prediction: Prediction
    image: bytes


class Backend(Protocol):
    """What the application needs of broker, store and workers."""

    async def thumbnails(self, wanted: list[Prediction], large: bool) -> list[Picture]:
        """Small pictures of the frames of these predictions, or of slightly older ones, if they can be fetched soon."""

    async def send(self, command: Command) -> None:
        """Send a command to the workers. Raises UnreachableError."""

    async def stored(self, stream: str) -> dict[str, Any] | None:
        """What the store says of a stream. Raises UnreachableError."""

    def site(self) -> dict[str, Any]:
        """Figures from the workers' metrics, and whether the topics can be read."""


class _Login(BaseModel):
    model_config = ConfigDict(extra="forbid")

    token: str = Field(min_length=1, max_length=1_000)


class _Action(BaseModel):
    """The request that a button sends."""

    model_config = ConfigDict(extra="forbid")

    stream: str = Field(min_length=1, max_length=1_000)
    action: str
    snapshot: int = Field(1, ge=1, le=1_000)
    policy: PolicyChange | None = None
    reason: str = Field("", max_length=1_000)

    def command(self) -> Command:
        return Command.model_validate({**self.model_dump(), "by": "console"})


class Pages:
    """The handlers. `stopping` ends the streams of server-sent events."""

    def __init__(self, fleet: Fleet, backend: Backend, session: Session, stopping: Callable[[], bool]) -> None:
        self._fleet, self._backend, self._session, self._stopping = fleet, backend, session, stopping
        self._viewers = 0

    async def index(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    async def health(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def session(self, request: Request) -> Response:
        """Whether a token is needed, and what an action must carry."""
        if not self._session.knows(request):
            return JSONResponse({"login": True})
        return JSONResponse({"login": False, "csrf": self._session.csrf, "clean": self._fleet.clean})

    async def login(self, request: Request) -> Response:
        try:
            given = _Login.model_validate_json(await _body(request))
        except ValidationError:
            return JSONResponse({"error": 'expected {"token": ...}'}, 400)
        # The address of the connection, as a header can be forged. Checked after the whole request has come: otherwise
        # many unfinished requests could pass the check and then guess at once.
        address = request.client.host if request.client else ""
        if self._session.blocked(address):
            return JSONResponse({"error": "too many wrong tokens; wait a minute"}, 429)
        cookie = self._session.login(given.token, address)
        if cookie is None:
            return JSONResponse({"error": "this is not the console's token"}, 403)
        answer = JSONResponse({"login": False, "csrf": self._session.csrf, "clean": self._fleet.clean})
        answer.set_cookie(
            COOKIE, cookie, httponly=True, samesite="strict", secure=request.url.scheme == "https", path="/"
        )
        return answer

    async def live(self, request: Request) -> Response:
        """Server-sent events: changed tiles, and one stream's new points where `stream` names one."""
        if not self._session.knows(request):
            return _must_log_in()
        if self._viewers >= MAX_VIEWERS:
            return JSONResponse({"error": f"{MAX_VIEWERS} pages are open already"}, 503)
        name = request.query_params.get("stream")
        return StreamingResponse(self._events(name), media_type="text/event-stream")

    async def _events(self, name: str | None) -> AsyncIterator[str]:
        self._viewers += 1
        version = point = event = quiet = 0
        shown = False
        try:
            while not self._stopping():
                changes = self._fleet.changes(version)
                if changes["version"] != version or not version:
                    quiet, version = 0, changes["version"]
                    yield _event("fleet", {**changes, "site": self._backend.site()})
                stream = self._fleet.named(name) if name else None
                detail = self._fleet.detail(stream.index, point, event) if stream else None
                if detail is not None and (detail["next_event"] != event or not shown):
                    shown, point, event = True, detail["next_point"], detail["next_event"]
                    yield _event("stream", detail)
                quiet += 1
                if quiet % KEEP_ALIVE_TICKS == 0:
                    yield _event("site", self._backend.site())
                await asyncio.sleep(TICK_S)
        finally:
            self._viewers -= 1

    async def thumbnails(self, request: Request) -> Response:
        """`s=1.0,7.35`: indices of streams, each with the count of frames when the page's picture was made."""
        if not self._session.knows(request):
            return _must_log_in()
        wanted, counts = [], {}
        for part in request.query_params.get("s", "").split(",")[:MAX_THUMBNAILS]:
            index, _, count = part.partition(".")
            stream = self._fleet.find(int(index)) if index.isdecimal() and len(index) < 12 else None
            if stream is not None and stream.prediction is not None and str(stream.frames) != count:
                wanted.append(stream.prediction)
                counts[stream.name] = (stream.index, stream.frames)
        pictures = await self._backend.thumbnails(wanted, request.query_params.get("large") == "1")
        return JSONResponse([_row(picture, *counts[picture.prediction.stream]) for picture in pictures])

    async def stored(self, request: Request) -> Response:
        """What the store says of the stream `stream`."""
        if not self._session.knows(request):
            return _must_log_in()
        try:
            return JSONResponse(await self._backend.stored(request.query_params.get("stream", "")))
        except UnreachableError as error:
            return JSONResponse({"error": str(error)}, 503)

    async def command(self, request: Request) -> Response:
        """Send a command and answer with its id. Its outcome comes as an update event with this id."""
        if not self._session.allows(request):
            return _must_log_in() if not self._session.knows(request) else JSONResponse({"error": "reload"}, 403)
        try:
            command = _Action.model_validate_json(await _body(request)).command()
        except ValidationError as error:
            where, words = mistakes(error)[0]
            return JSONResponse({"error": f"{where or 'command'}: {words}"}, 400)
        if self._fleet.named(command.stream) is None:
            return JSONResponse({"error": "there is no such stream"}, 404)
        try:
            await self._backend.send(command)
        except DriftkeelError as error:
            return JSONResponse({"error": str(error)}, 503)
        log.info("command %s: %s %s", command.id, command.action, command.stream)
        return JSONResponse({"id": command.id})


def make_app(fleet: Fleet, backend: Backend, settings: Console, stopping: Callable[[], bool]) -> Starlette:
    """The application for these settings."""
    token = settings.token.get_secret_value() if settings.token else None
    pages = Pages(fleet, backend, Session(token), stopping)
    routes = [
        Route("/", pages.index),
        Route("/healthz", pages.health),
        Route("/api/session", pages.session),
        Route("/api/login", pages.login, methods=["POST"]),
        Route("/api/live", pages.live),
        Route("/api/thumbnails", pages.thumbnails),
        Route("/api/stored", pages.stored),
        Route("/api/command", pages.command, methods=["POST"]),
        Mount("/static", _Static(directory=STATIC)),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Gate, settings=settings)])


class _Static(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """Have browsers ask whether their copy is current, so that files of two versions are never mixed."""
        response = super().file_response(*args, **kwargs)
        response.headers["cache-control"] = "no-cache"
        return response


def _row(picture: Picture, index: int, frames: int) -> dict[str, Any]:
    kind = "png" if picture.image.startswith(b"\x89PNG") else "jpeg"
    return {
        "i": index,
        "frames": frames,
        "label": picture.prediction.label,
        "confidence": picture.prediction.confidence,
        "top": [score.model_dump() for score in picture.prediction.top[:3]],
        "src": f"data:image/{kind};base64,{base64.b64encode(picture.image).decode()}",
    }


def _event(kind: str, content: dict[str, Any]) -> str:
    try:
        text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    except ValueError:  # A record has a NaN or an infinity, which JSON does not have.
        text = json.dumps(_finite(content), allow_nan=False, separators=(",", ":"))
    return f"event: {kind}\ndata: {text}\n\n"


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


async def _body(request: Request) -> bytes:
    """The request's body; empty if the connection has ended, as then nobody waits for an answer."""
    try:
        return await request.body()
    except ClientDisconnect:
        return b""


def _must_log_in() -> Response:
    return JSONResponse({"error": "log in with the console's token", "login": True}, 401)
