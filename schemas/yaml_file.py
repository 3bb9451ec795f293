"""What people write: YAML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from schemas.errors import ConfigError


def yaml_content(path: Path, what: str) -> Any:
    """What the file says; `what` it is stands in errors. Raises ConfigError."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror or error}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{what} {path} is not YAML, line {line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # The second: a date or a number that there is not.
        raise ConfigError(f"{what} {path} is not YAML: {' '.join(str(error).split())}") from error
