"""Methods that the benchmark's user brings: a class that follows `meta.baselines.Baseline`, named in the plan."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from pathlib import Path

from meta.baselines import Baseline
from meta.models import import_from
from schemas.errors import ConfigError


def own_method(name: str) -> type[Baseline]:
    """The class behind `module:Class`, of what is installed or else in the current folder. Raises ConfigError."""
    module, _, kind = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), kind)):
        raise ConfigError(f"own_methods: {name!r} is no module:Class, such as own_method:SureTent")
    import_from(Path.cwd())
    try:
        found = getattr(importlib.import_module(module), kind)
    except (ImportError, SyntaxError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module
        hint = f"install it, or run where {module}.py lies" if missing else "correct it"
        raise ConfigError(f"own_methods: cannot import {module!r} of {name!r} ({error}); {hint}") from error
    except AttributeError as error:
        raise ConfigError(f"own_methods: module {module!r} has no {kind!r}") from error
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
