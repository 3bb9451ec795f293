"""Commands that compute nothing do not load torch: it takes seconds, and two hundred megabytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from schemas.config import Kafka, Store
from schemas.state import StreamHeader, encode_header
from worker.store.store import StateStore, Write

ROOT = Path(__file__).parents[3]
# What commands load that read a topic for as long as they run, or have servers of their own.
LIGHT = (
    "worker.audit.export",
    "worker.audit.report",
    "worker.compare",
    "worker.console.run",
    "worker.produce.produce",
    "worker.site.doctor",
    "worker.site.folder",
    "worker.watch",
    "monitoring.dashboards.__main__",
    "monitoring.reference",
)
LOADED = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert "torch" not in sys.modules, f"{name} loads torch"
"""


def test_what_shows_and_sends_does_not_load_torch() -> None:
    subprocess.run([sys.executable, "-c", LOADED, *LIGHT], cwd=ROOT, check=True)


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """The environment of processes that end where they load torch."""
    folder = tmp_path / "instead"
    folder.mkdir()
    (folder / "torch.py").write_text("raise SystemExit('torch is loaded')")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


@pytest.fixture
def site_file(kafka_settings: Kafka, store: StateStore, store_settings: Store, tiny_bundle_path: Path, tmp_path: Path):
    """A site whose store has one stream."""
    (claimed,) = store.claim(["cam"], "worker-1")
    header = encode_header(StreamHeader(stream="cam", bundle="b", method="mgg", frames=40, step=5, events=1))
    assert store.write([Write("cam", claimed.token, 1, header, b"", b"tensors")]) == [True]
    path = tmp_path / "site.yaml"
    content = {
        "kafka": kafka_settings.model_dump(mode="json", exclude_none=True),
        "store": {"url": store_settings.url.get_secret_value(), "prefix": store_settings.prefix},
        "bundle": {"path": str(tiny_bundle_path)},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_doctor_loads_torch_for_a_sound_bundle_alone_and_last(
    site_file: Path, without_torch: dict[str, str], tmp_path: Path
) -> None:
    def doctor(**bundle: str) -> tuple[list[str], str]:
        run = [sys.executable, "-m", "worker", "doctor", "--config", str(site_file)]
        environment = {**without_torch, **{f"DRIFTKEEL__BUNDLE__{name}": value for name, value in bundle.items()}}
        result = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
        return [line.split()[1] for line in result.stdout.splitlines() if line.startswith("ok ")], result.stderr

    found, said = doctor()
    assert dict.fromkeys(found) == dict.fromkeys(["versions", "bundle", "store", "broker", "positions"])
    assert "torch is loaded" in said
    found, said = doctor(PATH=str(tmp_path))
    assert dict.fromkeys(found) == dict.fromkeys(["versions", "store", "broker", "positions"])
    assert said == ""


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("streams list", "cam "),
        ("streams show cam", "5 applied, 40 frames"),
        ("streams delete --yes cam", "deleted: 1"),
        ("audit verify --store", "cam@1 is the newest in the store"),
        ("command freeze cam --wait 0", ""),
    ],
)
def test_commands_about_streams_do_without_torch(
    command: str, shown: str, site_file: Path, without_torch: dict[str, str]
) -> None:
    run = [sys.executable, "-m", "worker", *command.split(), "--config", str(site_file)]
    result = subprocess.run(run, cwd=ROOT, env=without_torch, capture_output=True, text=True)
    assert "torch is loaded" not in result.stderr
    assert shown in result.stdout, result.stderr
