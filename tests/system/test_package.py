"""Wheel and sdist: built, installed into an environment of their own, and used from outside the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "results")


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # which may name us
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=480, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that comes of it and of nothing else."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source", cwd=folder)
    return folder / "dist"


def test_package_chart_and_changelog_are_of_one_version() -> None:
    version = PROJECT["project"]["version"]
    chart = yaml.safe_load((ROOT / "deploy/helm/driftkeel/Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (version, version)
    released = re.findall(r"^## (\d\S*) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == version


def test_the_wheel_alone_has_all_that_commands_need(packages: Path, tmp_path: Path) -> None:
    (wheel,) = packages.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    scripts = tmp_path / "venv" / "bin"
    site_packages = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    pip = [sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, wheel, cwd=tmp_path)
    # The dependencies are those of this environment; its own, editable driftkeel is not reached by a path entry.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    driftkeel = scripts / "driftkeel"
    script = "import worker, schemas; print(worker.__file__, schemas.__file__)"
    where = run(scripts / "python", "-c", script, cwd=tmp_path)
    assert where.count(str(site_packages)) == 2
    assert run(driftkeel, "--version", cwd=tmp_path) == f"driftkeel {PROJECT['project']['version']}\n"
    assert "produce" in run(driftkeel, "--help", cwd=tmp_path)
    run(driftkeel, "init", "site", cwd=tmp_path)
    site = tmp_path / "site"
    assert "bundles/fashion-mnist" in run(driftkeel, "config", "--config", "driftkeel.yaml", cwd=site)
    assert "sound: bundle " in run(driftkeel, "bundle", "show", "bundles/fashion-mnist", cwd=site)
    script = (
        "from worker.site.folder import EXAMPLE_BUNDLE, shipped; print(shipped(EXAMPLE_BUNDLE))"  # the demo's default
    )
    assert str(site_packages) in run(scripts / "python", "-c", script, cwd=tmp_path)
    for package in ("schemas", "meta", "monitoring", "worker"):
        assert (site_packages / package / "py.typed").is_file()
    pages = site_packages / "monitoring" / "console" / "static"
    for name in ("index.html", "main.js", "console.css", "vendor/uPlot.esm.js", "vendor/uPlot-LICENSE"):
        assert (pages / name).is_file()


def test_the_sdist_has_what_the_wheel_is_made_of_and_no_more(packages: Path) -> None:
    (sdist,) = packages.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "driftkeel.example.yaml", "deploy/compose.yaml"} <= names
    assert not any(name.startswith((".venv", "docs/results", "build")) for name in names)
    assert sdist.stat().st_size < 2_000_000


def test_every_package_of_the_repository_is_in_the_wheel() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("schemas", "meta", "monitoring", "worker")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert listed == found | {"worker.shipped"}
