"""Access to the console: the checks before every page and every action."""

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
WRONG_TOKENS, PER_S = 10, 60.0  # most wrong tokens from one address, and the seconds for which they count
MOST_GUESSERS = 50  # most addresses with wrong tokens in this time; further ones have to wait
NETWORK_BITS = 64

_HEADERS = {
    # Only our own files, and images as data URLs for thumbnails. No inline script, no inline style.
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
    """Wrong tokens of the last minute by address. A guesser does not lock out others, and the guesses of all addresses
    together are limited."""

    def __init__(self) -> None:
        self._at: dict[str, list[float]] = {}

    def used_up(self, address: str) -> bool:
        """Whether no further token is accepted from the address for now."""
        since = time.monotonic() - PER_S
        lately = {guesser: [moment for moment in at if moment > since] for guesser, at in self._at.items()}
        self._at = {guesser: at for guesser, at in lately.items() if at}
        wrong = self._at.get(_guesser(address))
        return len(self._at) >= MOST_GUESSERS if wrong is None else len(wrong) >= WRONG_TOKENS

    def add(self, address: str) -> None:
        """Count a wrong token."""
        self._at.setdefault(_guesser(address), []).append(time.monotonic())


def _guesser(address: str) -> str:
    """What a guess counts for: an IPv4 address, or an IPv6 network, as one machine may use all its addresses."""
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
        """Whether too many wrong tokens came lately from this address, or from too many addresses."""
        return self._guesses.used_up(address)

    def login(self, token: str, address: str) -> str | None:
        """The cookie for the right token, else None. Call it only if the address is not `blocked`."""
        if self._token is not None and hmac.compare_digest(token.encode(), self._token.encode()):
            return self._cookie
        self._guesses.add(address)
        return None

    def knows(self, request: Request) -> bool:
        """Whether the request may read."""
        cookie = request.cookies.get(COOKIE, "")
        return not self.needs_login or hmac.compare_digest(cookie.encode(), self._cookie.encode())

    def allows(self, request: Request) -> bool:
        """Whether the request may act: it has the header that only our own page can know."""
        given = request.headers.get(CSRF_HEADER, "")
        return self.knows(request) and hmac.compare_digest(given.encode(), self.csrf.encode())


class Gate:
    """Refuses foreign hosts and origins and large bodies, and adds security headers."""

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
            # DNS rebinding: another site points its own name at this address, and the browser sends that name.
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
        try:  # An address cannot be rebound as a name can.
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _refuse(status: int, why: str) -> JSONResponse:
    return JSONResponse({"error": why}, status)
