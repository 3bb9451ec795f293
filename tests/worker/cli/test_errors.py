"""Mistakes on the command line: one line each that names the option or the file as the user wrote it."""

from __future__ import annotations

import socket
from pathlib import Path
from shlex import split

import pytest
from typer.testing import CliRunner

from schemas.config import WorkerConfig
from schemas.errors import ConfigError, DriftkeelError
from worker.cli.app import app
from worker.console.run import run_console

CREATE = "bundle create --model groupnorm-cnn --weights w.pt --data images --output out --mean 0 --std 1"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (f"{CREATE} --size 0x28", "--size '0x28' is not WIDTHxHEIGHT, such as 640x480"),
        ("produce a.mp4 --size 640", "--size '640' is not WIDTHxHEIGHT, such as 640x480"),
        ("watch --json --table", "--json and --table cannot be used together: leave one out"),
        ("command freeze ''", "stream: String should have at least 1 character"),
        ("command rollback cam 2000", "back: Input should be less than or equal to 1000"),
        ("streams import cam --input none.state", "none.state cannot be read: No such file or directory"),
        ("benchmark tables none.json", "none.json cannot be read: No such file or directory"),
    ],
)
def test_a_mistake_is_named_as_it_was_written(command: str, said: str) -> None:
    result = CliRunner().invoke(app, split(command))
    assert isinstance(result.exception, DriftkeelError), result.output
    assert str(result.exception) == said


def test_a_port_that_is_taken_is_named_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as refused:
            run_console(WorkerConfig(console={"port": port}))
    said = f"console: cannot bind 127.0.0.1:{port}: Address already in use; set console.host or console.port"
    assert str(refused.value) == said


def test_the_next_step_that_init_names_can_be_pasted(tmp_path: Path) -> None:
    folder = tmp_path / "my site"
    told = CliRunner().invoke(app, ["init", str(folder)]).stdout.splitlines()[-1]
    assert split(told)[:3] == ["next:", "cd", str(folder)]
