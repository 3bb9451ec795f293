"""Who a client is: the server's side of SASL/PLAIN (RFC 4616) and SCRAM (RFC 5802)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os

MECHANISMS = ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]
ITERATIONS = 4096


class DeniedError(Exception):
    """Not a user, not the password, or not the protocol."""


class Exchange:
    """One connection's. `answer` takes what the client sends; `user` is set once it is known."""

    def __init__(self, mechanism: str, users: dict[str, str]) -> None:
        self._mechanism, self._users = mechanism, users
        self.user: str | None = None
        self._salt, self._messages, self._name = os.urandom(16), "", ""

    def answer(self, content: bytes) -> bytes:
        """Raises DeniedError."""
        try:
            if self._mechanism == "PLAIN":
                return self._plain(content)
            return self._proof(content.decode()) if self._messages else self._challenge(content.decode())
        except (ValueError, KeyError) as error:
            raise DeniedError from error

    def _plain(self, content: bytes) -> bytes:
        _, name, password = content.decode().split("\0")
        if not hmac.compare_digest(self._users.get(name, "").encode(), password.encode()) or name not in self._users:
            raise DeniedError
        self.user = name
        return b""

    def _challenge(self, first: str) -> bytes:
        bare = first.split(",", 2)[2]  # behind what is said of channel binding and of another identity
        fields = _fields(bare)
        self._name = fields["n"].replace("=2C", ",").replace("=3D", "=")
        nonce = fields["r"] + base64.b64encode(os.urandom(18)).decode()
        reply = f"r={nonce},s={base64.b64encode(self._salt).decode()},i={ITERATIONS}"
        self._messages = f"{bare},{reply}"
        return reply.encode()

    def _proof(self, final: str) -> bytes:
        fields, kind = _fields(final), self._mechanism.removeprefix("SCRAM-").replace("-", "").lower()
        if fields["r"] != _fields(self._messages.split(",", 2)[2])["r"]:
            raise DeniedError
        salted = hashlib.pbkdf2_hmac(kind, self._users[self._name].encode(), self._salt, ITERATIONS)
        key = hmac.digest(salted, b"Client Key", kind)
        messages = f"{self._messages},{final.rsplit(',p=', 1)[0]}".encode()
        signature = hmac.digest(hashlib.new(kind, key).digest(), messages, kind)
        expected = bytes(a ^ b for a, b in zip(key, signature, strict=True))
        if not hmac.compare_digest(expected, base64.b64decode(fields["p"])):
            raise DeniedError
        self.user = self._name
        ours = hmac.digest(hmac.digest(salted, b"Server Key", kind), messages, kind)
        return b"v=" + base64.b64encode(ours)


def _fields(message: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in message.split(","))  # type: ignore[misc]
