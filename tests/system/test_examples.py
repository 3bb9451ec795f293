"""What docs/library.md shows, run."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from meta.benchmark.plan import read_benchmark
from meta.mgg import frames_per_update

ROOT = Path(__file__).parents[2]


def test_two_cameras_in_one_process_do_better_than_source() -> None:
    run = subprocess.run(
        [sys.executable, "examples/in_process.py"], cwd=ROOT, capture_output=True, text=True, timeout=800, check=True
    )
    source, adapted = map(float, re.findall(r"([\d.]+)%", run.stdout))
    assert adapted > source + 20


def test_the_lines_in_the_page_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = (ROOT / "docs" / "library.md").read_text().split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {}
    exec(lines, found)
    frames, method = found["frames"], found["method"]
    assert found["labels"].shape == (2 * frames_per_update(method, frames.shape[1]),)
    assert (found["state"]["age"] == 4).all()  # of 64 frames, as worker and benchmark do it


def test_the_plan_of_ones_own_method_can_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "examples")
    monkeypatch.setattr(sys, "path", [*sys.path])
    plan = read_benchmark(Path("own_method.yaml"))
    assert plan.kinds["sure-tent"].name == "sure-tent"
    assert all(generator.bundle.is_dir() for generator in plan.generators)
