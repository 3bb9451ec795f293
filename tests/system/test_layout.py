"""Who may import whom: a reader who knows the data flow can rely on it."""

import ast
import graphlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("schemas", "meta", "monitoring", "worker")  # each may import those before it, none after it


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_none_that_comes_after_it(folder: str) -> None:
    after = FOLDERS[FOLDERS.index(folder) + 1 :]
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / folder).rglob("*.py")
        for name in imports(path)
        if name.split(".")[0] in after
    }
    assert not wrong


def test_the_science_knows_neither_broker_nor_store() -> None:
    known = {name.split(".")[0] for path in (ROOT / "meta").rglob("*.py") for name in imports(path)}
    assert not known & {"kafka", "redis"}


def test_the_folders_of_the_worker_have_an_order() -> None:
    """A folder counts as one, a module beside the folders as one. `graphlib` raises CycleError with the circle."""
    needs: defaultdict[str, set[str]] = defaultdict(set)
    for path in (ROOT / "worker").rglob("*.py"):
        part = path.relative_to(ROOT / "worker").parts[0].removesuffix(".py")
        for name in imports(path):
            top, _, rest = name.partition(".")
            if top == "worker" and rest:
                needs[part].add(rest.split(".")[0])
        needs[part].discard(part)
    order = list(graphlib.TopologicalSorter(needs).static_order())
    assert order.index("consume") < order.index("decode") < order.index("engine") < order.index("step")
