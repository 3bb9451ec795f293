"""Methods that the benchmark's user brings: a class that follows `meta.baselines.Baseline`, named in the plan."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path

from meta.baselines import Baseline
from meta.imports import import_from, imported
from schemas.errors import ConfigError


def own_method(name: str) -> type[Baseline]:
    """The class behind `module:Class`, of what is installed or else in the current folder. Raises ConfigError."""
    import_from(Path.cwd())
    try:
        found = imported(name, "run in the folder it lies in")
    except ImportError as error:
        raise ConfigError(f"own_methods: {name!r}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Baseline)):
        raise ConfigError(f"own_methods: {name!r} is no subclass of meta.baselines.Baseline")
    return found


def code_digest(kind: type[Baseline]) -> str:
    """Changes with the module that the class lies in, so that results of older code are not taken for its own."""
    try:
        code = Path(inspect.getfile(kind)).read_bytes()
    except (OSError, TypeError) as error:
        raise ConfigError(f"own_methods: no file has the code of {kind.__name__!r}: {error}") from error
    return hashlib.sha256(code).hexdigest()
