"""Errors of the store's client as one line each, which says what is wrong and what to do."""

from __future__ import annotations

import re

import redis.exceptions

from schemas.errors import LoginError, UnreachableError


def as_unreachable(address: str, error: Exception) -> UnreachableError:
    """The store at `address` does not answer, refuses a command, or the login."""
    if isinstance(error, redis.exceptions.AuthenticationError):
        return _refusal(address, error)
    if isinstance(error, redis.exceptions.ResponseError):
        # It loads its data, is out of memory, or is read-only after a failover. All of these may pass.
        return UnreachableError(f"the store at {address} refuses a command: {_cause(error)}")
    return _silence(address, error)


def _refusal(address: str, error: BaseException) -> LoginError:
    said = str(error).rstrip(".")
    return LoginError(f"the store at {address} refuses the login: {said}; correct user and password in store.url")


def _silence(address: str, error: Exception) -> UnreachableError:
    """The error where redis-py calls the store unreachable, although it may be something else."""
    # If a Cluster refuses to tell its layout, redis-py says that it cannot be reached, or that the node is in none.
    if denied := _reason(error, redis.exceptions.NoPermissionError):
        return UnreachableError(f"the store at {address} refuses a command: {denied}")
    if refused := _reason(error, redis.exceptions.AuthenticationError):
        return _refusal(address, refused)
    # For each Sentinel that does not help, the message has the description of the whole client.
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
    """The store's message, without the parts of the script that redis-py and the store quote."""
    said = str(error).rpartition(" of pipeline caused error: ")[2]
    return re.sub(r" script: ([0-9a-f]{40},? )?on @user_script.*", "", said, flags=re.DOTALL)
