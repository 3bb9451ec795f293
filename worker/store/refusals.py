"""What the store's client raises, in a line that says what is wrong and what to do."""

from __future__ import annotations

import re

import redis.exceptions

from schemas.errors import LoginError, UnreachableError


def as_unreachable(address: str, error: Exception) -> UnreachableError:
    """The store at `address` does not answer, refuses a command, or the login."""
    if isinstance(error, redis.exceptions.AuthenticationError):
        return _refusal(address, error)
    if isinstance(error, redis.exceptions.ResponseError):
        # Loading its data, out of memory, read only after a failover: all may heal, and all are somebody's to mend.
        return UnreachableError(f"the store at {address} refuses a command: {_cause(error)}")
    return _silence(address, error)


def _refusal(address: str, error: BaseException) -> LoginError:
    said = str(error).rstrip(".")
    return LoginError(f"the store at {address} refuses the login: {said}; correct user and password in store.url")


def _silence(address: str, error: Exception) -> UnreachableError:
    """What redis-py takes for a store that does not answer, in a line; it need not be one."""
    # Where a Cluster does not tell its layout, redis-py says that it cannot be reached, or that the node is in none.
    if denied := _reason(error, redis.exceptions.NoPermissionError):
        return UnreachableError(f"the store at {address} refuses a command: {denied}")
    if refused := _reason(error, redis.exceptions.AuthenticationError):
        return _refusal(address, refused)
    # Of each Sentinel that does not help, it describes the whole client.
    said = re.sub(r"<redis\..*?> - (?=\w)", "", str(error))
    if "AuthenticationError" in said:
        settings = "store.sentinel_username and store.sentinel_password"
        return LoginError(f"a Sentinel of the store at {address} refuses the login; correct {settings}")
    return UnreachableError(f"the store at {address} does not answer: {said}")


def _reason(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """The error of this kind that led to `error`."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, kind):
        found = found.__cause__ or found.__context__
    return found


def _cause(error: Exception) -> str:
    """What the store says, without the script around it, of which redis-py and the store quote a part."""
    said = str(error).rpartition(" of pipeline caused error: ")[2]
    return re.sub(r" script: ([0-9a-f]{40},? )?on @user_script.*", "", said, flags=re.DOTALL)
