"""What people write: YAML files."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from schemas.errors import ConfigError

MOST_MERGED = 10_000  # keys that a section takes over by '<<'; ten lines can ask for a billion


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice: PyYAML takes the last, and the first section would be gone without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is there a second time; put both into one", key.start_mark
                )
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        own = len(node.value)
        super().flatten_mapping(node)
        if len(node.value) > own + MOST_MERGED:
            why = f"'<<' merges more than {MOST_MERGED:,} keys into one section"
            raise yaml.constructor.ConstructorError(None, None, why, node.start_mark)


def yaml_content(path: Path, what: str) -> Any:
    """What the file says; `what` it is stands in errors. Raises ConfigError."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a safe loader
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror or error}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{what} {path} is not YAML, line {line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # The second: a date or a number that there is not.
        raise ConfigError(f"{what} {path} is not YAML: {' '.join(str(error).split())}") from error
