"""The errors that a user is meant to read: each says what is wrong, where, and what to do."""

from __future__ import annotations

from pydantic import ValidationError


class DriftkeelError(Exception):
    """Base of all errors with a message for the user; the command line prints it and exits 1."""


class ConfigError(DriftkeelError):
    """The configuration cannot be used."""


class BundleError(DriftkeelError):
    """A bundle is missing, incomplete, altered, or made for something else."""


class StateError(DriftkeelError):
    """Stored bytes are not a stream state that this version can use.

    What it quotes of them becomes part of an update event, and so is short and text.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message[:1_000].encode(errors="replace").decode())


class FrameError(DriftkeelError):
    """A record cannot become a frame; `kind` is the short class used in metrics and dead letters."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class DataError(DriftkeelError):
    """A data set is missing or damaged."""


class UnreachableError(DriftkeelError):
    """The broker or the store does not answer at its address."""


class LoginError(UnreachableError):
    """The store is there, and does not let us in: no waiting helps, somebody must correct a user or a password."""


class SourceError(DriftkeelError):
    """A video, camera or picture cannot be read, or its frames cannot be sent."""


_SECTION, _LIST = "Input should be a section, keys with values", "Input should be a list, such as [a, b]"
_YAML_WORDS = {"dict_type": _SECTION, "model_type": _SECTION, "list_type": _LIST, "tuple_type": _LIST}


def mistakes(error: ValidationError) -> list[tuple[str, str]]:
    """What was found wrong: the dotted place, empty for the whole, and the words, without those that pydantic puts
    before what validators of ours say, and without Python's names of types."""
    return [
        (
            ".".join(map(str, one["loc"])),
            _YAML_WORDS.get(one["type"], one["msg"]).removeprefix("Value error, "),
        )
        for one in error.errors(include_url=False)
    ]


def first_mistake(error: ValidationError) -> str:
    """The first of these in a line: place and words."""
    return ": ".join(filter(None, mistakes(error)[0]))
