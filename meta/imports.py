"""Imports of user code by `module:name`: factories of networks, methods for the benchmark."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def import_from(folder: Path | None) -> None:
    """Append a folder to the import path, so that installed modules take precedence."""
    if folder is not None and str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))


def imported(name: str, otherwise: str) -> Any:
    """The object named by `module:name`. Raises ImportError with a message for the user.

    `otherwise` is the advice, beside installing it, if the module is not found.
    """
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise ImportError("not of the form module:name")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # Foreign code can raise anything.
        missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        hint = f"install it, or {otherwise}" if missing else "correct it"
        raise ImportError(f"cannot import {module!r} ({type(error).__name__}: {error}); {hint}") from error
    if not hasattr(found, attribute):
        raise ImportError(f"module {module!r} has no {attribute!r}")
    return getattr(found, attribute)
