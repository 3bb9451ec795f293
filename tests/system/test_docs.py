"""The documentation says nothing that does not work.

`$` lines of `console` blocks are run, page by page, in the place that the page's first line names. Every other mention
of a command is checked against the command line, the Makefile and the modules; YAML against the configuration.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer.main
import yaml
from PIL import Image

from meta.data import fashion_mnist
from schemas.config import WorkerConfig
from schemas.config_file import dotted_keys, load_config
from tests.conftest import SHIPPED_BUNDLE
from tests.system.conftest import Site
from tests.videos import write_video
from worker.cli.app import app
from worker.embedded import free_port
from worker.site.folder import write_site

ROOT = Path(__file__).parents[2]
PAGES = sorted(p for p in (ROOT / "docs").rglob("*.md") if "reference" not in p.parts)
PAGES += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
BLOCK = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.M | re.S)
TESTED = re.compile(r"\A<!-- tested: (.+) -->")
BIN = Path(sys.executable).parent
COMMAND = typer.main.get_command(app)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(page: Path) -> list[str]:
    """What is run: `$` lines, with the lines that a backslash joins to them."""
    found: list[str] = []
    for block in blocks(page, "console"):
        going_on = False
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append(line[2:])
            elif going_on:
                found[-1] += "\n" + line
            going_on = line.endswith("\\") and (line.startswith("$ ") or going_on)
    return found


def shell_lines(page: Path) -> list[str]:
    """Every line of every block that is meant for a shell, run or not, joined over backslashes."""
    texts = [*commands(page), *blocks(page, "", "sh", "bash", "shell")]
    return [line for text in texts for line in text.replace("\\\n", " ").splitlines()]


def mentioned(page: Path) -> Iterator[list[str]]:
    """The words of every `driftkeel` command, in blocks and in running text."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    inline = [match.replace("\n", " ") for match in re.findall(r"`([^`]+)`", text)]
    for line in [*shell_lines(page), *inline]:
        for part in re.split(r"[|&;]|\$\(", line):
            words = shlex.split(part.strip(), comments=True, posix=True) if part.count("'") % 2 == 0 else part.split()
            if words and words[0] in ("driftkeel", ".venv/bin/driftkeel") and len(words) > 1:
                yield words[1:]


TESTED_PAGES = [page for page in PAGES if TESTED.match(page.read_text(encoding="utf-8"))]


def test_pages_that_can_be_run_say_where() -> None:
    assert len(TESTED_PAGES) >= 4
    for page in PAGES:
        assert (page in TESTED_PAGES) == bool(commands(page)), f"{name(page)}: console blocks and 'tested' go together"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_that_is_mentioned_exists(page: Path) -> None:
    for words in mentioned(page):
        command, context = COMMAND, typer.Context(COMMAND)
        rest = list(words)
        while hasattr(command, "get_command"):
            if not rest or not re.fullmatch(r"[a-z-]+", rest[0]) or rest[0].startswith("-"):
                break  # the group itself: `driftkeel streams ...`, `driftkeel --version`
            found = command.get_command(context, rest[0])
            assert found is not None, f"{name(page)}: no command '{' '.join(words)}'"
            command, context, rest = found, typer.Context(found, parent=context), rest[1:]
        rest = rest[: rest.index("--")] if "--" in rest else rest  # what follows is names
        options = [word for word in rest if word.startswith("-") and word != "-"]
        known = {option for p in command.get_params(context) for option in (*p.opts, *p.secondary_opts)}
        unknown = [option for option in options if option.partition("=")[0] not in known]
        assert unknown == [], f"{name(page)}: '{' '.join(words)}'"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_and_modules_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for line in shell_lines(page):
        for target in re.findall(r"\bmake ([a-z]+)", line.partition("#")[0]):
            assert target in targets, f"{name(page)}: make {target}"
        for module in re.findall(r"python3? -m ([\w.]+)", line):
            assert importlib.util.find_spec(module), f"{name(page)}: python -m {module}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_shell_blocks_are_shell(page: Path) -> None:
    for text in [*commands(page), *blocks(page, "sh", "bash", "shell")]:
        checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert checked.returncode == 0, f"{name(page)}: {checked.stderr}\n{text}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_yaml_blocks_are_configuration(page: Path, tmp_path: Path) -> None:
    sections = {key for key in dotted_keys(WorkerConfig) if "." not in key}
    for number, text in enumerate(blocks(page, "yaml")):
        if set(yaml.safe_load(text)) & sections:
            path = tmp_path / f"{number}.yaml"
            path.write_text(text)
            load_config(path)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), f"{name(page)}: {target}"


@pytest.fixture
def empty_folder(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder, and ports of its own for what the page starts."""
    folder = tmp_path / "run"
    folder.mkdir()
    return folder, {
        "DRIFTKEEL__KAFKA__BOOTSTRAP": f"127.0.0.1:{free_port()}",
        "DRIFTKEEL__STORE__URL": f"redis://127.0.0.1:{free_port()}/0",
        "DRIFTKEEL__METRICS__PORT": str(free_port()),
    }


@pytest.fixture
def running_site(site: Site, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A site's folder with a video and pictures; broker, store and a worker with many snapshots run."""
    folder = tmp_path / "run"
    write_site(folder, None, None, None)
    (folder / "pictures").mkdir()
    images = fashion_mnist("test").images[:96]
    enlarged = [np.asarray(Image.fromarray(image).resize((112, 112)).convert("RGB")) for image in images]
    write_video(folder / "belt-1.mp4", enlarged, fps=48)
    for number, image in enumerate(images[:12]):
        Image.fromarray(image).save(folder / "pictures" / f"{number}.png")
        Image.fromarray(image).save(folder / "pictures" / f"{number}.jpg")
    worker = site.start(
        bundle={"path": str(SHIPPED_BUNDLE)},
        store={**site.config["store"], "snapshot_every": 1},
    )
    topics = site.kafka.topics.model_dump()
    environment = {
        **{f"DRIFTKEEL__KAFKA__TOPICS__{key.upper()}": topic for key, topic in topics.items()},
        "DRIFTKEEL__KAFKA__BOOTSTRAP": site.kafka.bootstrap,
        "DRIFTKEEL__STORE__URL": site.store.url.get_secret_value(),
        "DRIFTKEEL__STORE__PREFIX": site.store.prefix,
        "DRIFTKEEL__METRICS__PORT": str(worker.port),
    }
    return folder, environment


@pytest.mark.long
@pytest.mark.parametrize("page", TESTED_PAGES, ids=name)
def test_the_page_s_commands_run(page: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    place = TESTED.match(page.read_text(encoding="utf-8"))
    assert place
    fixture = {"in an empty folder": "empty_folder", "in a running site": "running_site"}[place[1]]
    folder, environment = request.getfixturevalue(fixture)
    # The person's home is not the test's business; what `produce` remembers is there.
    environment = {**os.environ, **environment, "PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    environment["XDG_CONFIG_HOME"] = str(tmp_path / "home")
    script = script_of(commands(page)).replace(":9464", f":{environment['DRIFTKEEL__METRICS__PORT']}")
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "-eu", "-o", "pipefail", "-c", script],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(600)
        finally:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert code == 0, log.read_text()


def script_of(lines: list[str]) -> str:
    """The commands one after another. One that goes to the background is waited for until it says something."""
    parts = ["trap 'for job in $(jobs -p); do kill $job || true; done; wait || true' EXIT"]
    for number, line in enumerate(lines):
        parts.append(f"echo '$' {shlex.quote(line)}")
        if line.endswith(" &"):
            started = f'until [ -s "$HOME/{number}.log" ]; do kill -0 $!; sleep 0.1; done'
            parts += [f'{line[:-2]} >"$HOME/{number}.log" 2>&1 &', started]
        else:
            parts.append(line)
    return "\n".join(parts)


def test_a_command_that_fails_fails_its_page() -> None:
    done = subprocess.run(["bash", "-eu", "-o", "pipefail", "-c", script_of(["true", "false | cat", "true"])])
    assert done.returncode != 0


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "site" / "first-run" / "index.html").is_file()
