"""Code of the user's own, by the name `module:name`: factories of networks, methods for the benchmark."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def import_from(folder: Path | None) -> None:
    """Let modules be imported from a folder too, after what is installed."""
    if folder is not None and str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))


def imported(name: str, otherwise: str) -> Any:
    """What is behind `module:name`. Raises ImportError with words for the user; `otherwise` says what to do where the
    module is not found and not to be installed either."""
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise ImportError("not of the form module:name")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # Somebody else's code, which may raise anything.
        missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        hint = f"install it, or {otherwise}" if missing else "correct it"
        raise ImportError(f"cannot import {module!r} ({type(error).__name__}: {error}); {hint}") from error
    if not hasattr(found, attribute):
        raise ImportError(f"module {module!r} has no {attribute!r}")
    return getattr(found, attribute)
