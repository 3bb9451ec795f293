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
    import_from(Path.cwd())
    try:
        found = getattr(importlib.import_module(module), kind)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"own_methods: cannot import {module!r} of {name!r} ({error}); install it, or run where {module}.py lies"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"own_methods: module {module!r} has no {kind!r}") from error
    if not (isinstance(found, type) and issubclass(found, Baseline)):
        raise ConfigError(f"own_methods: {name!r} is no subclass of meta.baselines.Baseline")
    return found


def code_digest(kind: type[Baseline]) -> str:
    """Changes with the module that the class lies in, so that results of older code are not taken for its own."""
    module = inspect.getmodule(kind)
    code = inspect.getsource(module) if module is not None else ""
    return hashlib.sha256(code.encode()).hexdigest()
