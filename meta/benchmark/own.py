"""Code that the benchmark's user brings: methods that follow `meta.baselines.Baseline`, and networks of bundles."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from pathlib import Path
from types import ModuleType

from meta.baselines import Baseline
from meta.imports import import_from, imported
from meta.models import COLLECTIONS
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


def network_code(architecture: str) -> str:
    """Of a network that is no library's, a digest that changes with the module it is named in; else nothing."""
    module, _, _ = architecture.partition(":")
    return "" if module in COLLECTIONS else code_digest(importlib.import_module(module))


def code_digest(of: type[Baseline] | ModuleType) -> str:
    """Changes with the module that the class lies in, so that results of older code are not taken for its own."""
    try:
        code = Path(inspect.getfile(of)).read_bytes()
    except (OSError, TypeError) as error:
        raise ConfigError(f"no file has the code of {of.__name__!r}: {error}") from error
    return hashlib.sha256(code).hexdigest()
