"""Who may talk to the console: the checks that stand before every page and every action."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from schemas.config import Console

COOKIE = "driftkeel_console"
CSRF_HEADER = "x-driftkeel-csrf"
MAX_BODY_BYTES = 8_192
WRONG_TOKENS, PER_S = 10, 60.0  # so many wrong tokens in so many seconds, from one address
MOST_GUESSERS = 50  # addresses that wrong tokens came from in this time; further ones have to wait
NETWORK_BITS = 64

_HEADERS = {
    # Nothing but our own files; images also as data, which is how thumbnails come. No inline script, no inline style.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guesses:
    """Wrong tokens of the last minute, by where they came from: who guesses shuts out nobody else, and all guessers
    together have so many guesses."""

    def __init__(self) -> None:
        self._at: dict[str, list[float]] = {}

    def used_up(self, address: str) -> bool:
        """Whether no further token is taken from there for now."""
        since = time.monotonic() - PER_S
        lately = {guesser: [moment for moment in at if moment > since] for guesser, at in self._at.items()}
        self._at = {guesser: at for guesser, at in lately.items() if at}
        wrong = self._at.get(_guesser(address))
        return len(self._at) >= MOST_GUESSERS if wrong is None else len(wrong) >= WRONG_TOKENS

    def add(self, address: str) -> None:
        """One more, where they are not used up."""
        self._at.setdefault(_guesser(address), []).append(time.monotonic())


def _guesser(address: str) -> str:
    """Whom a guess counts for: an IPv4 address, or a network of IPv6, of which one machine may use every address."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if found.version == 4:
        return str(found)
    return str(found.ipv4_mapped or ipaddress.ip_network((found, NETWORK_BITS), strict=False))


class Session:
    """The secrets of one run: restarting the console logs everybody out."""

    def __init__(self, token: str | None) -> None:
        self._token = token
        self._cookie = secrets.token_urlsafe(32)
        self.csrf = secrets.token_urlsafe(32)
        self._guesses = Guesses()

    @property
    def needs_login(self) -> bool:
        return self._token is not None

    def blocked(self, address: str) -> bool:
        """Whether too many wrong tokens came lately from an address, or from too many others."""
        return self._guesses.used_up(address)

    def login(self, token: str, address: str) -> str | None:
        """The cookie for a right token, of who is not `blocked`."""
        if self._token is not None and hmac.compare_digest(token.encode(), self._token.encode()):
            return self._cookie
        self._guesses.add(address)
        return None

    def knows(self, request: Request) -> bool:
        """Whether the request may read."""
        cookie = request.cookies.get(COOKIE, "")
        return not self.needs_login or hmac.compare_digest(cookie.encode(), self._cookie.encode())

    def allows(self, request: Request) -> bool:
        """Whether the request may act: it carries what only a page of ours can have read."""
        given = request.headers.get(CSRF_HEADER, "")
        return self.knows(request) and hmac.compare_digest(given.encode(), self.csrf.encode())


class Gate:
    """Refuses foreign hosts and origins, and large bodies; adds the headers that keep browsers strict."""

    def __init__(self, app: ASGIApp, settings: Console) -> None:
        self._app = app
        self._hosts = {"localhost", settings.host.lower(), *(host.lower() for host in settings.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope["method"], Headers(scope=scope))

        async def send_strict(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await (refusal or self._app)(scope, receive, send_strict)

    def _refusal(self, method: str, headers: Headers) -> JSONResponse | None:
        host = headers.get("host", "")
        if not self._is_ours(host):
            # A page elsewhere may point a name of its own at this address (DNS rebinding); the browser then says so.
            return _refuse(421, "this host name is not one of the console's; add it to console.hosts")
        if method in {"GET", "HEAD"}:
            return None
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return _refuse(403, "the request comes from another site")
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return _refuse(403, "the request comes from another site")
        length = headers.get("content-length", "")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return _refuse(413, f"a request needs a content-length of at most {MAX_BODY_BYTES}")
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return _refuse(415, "requests are application/json")
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name in self._hosts:
            return True
        try:  # An address is no name, and cannot be pointed elsewhere.
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _refuse(status: int, why: str) -> JSONResponse:
    return JSONResponse({"error": why}, status)
