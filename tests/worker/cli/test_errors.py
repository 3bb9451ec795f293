"""Mistakes on the command line: one line each that names the option or the file as the user wrote it."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from schemas.errors import DriftkeelError
from worker.cli.app import app

CREATE = "bundle create --model groupnorm-cnn --weights w.pt --data images --output out --mean 0 --std 1"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (f"{CREATE} --size 0x28", "--size '0x28' is not WIDTHxHEIGHT, such as 640x480"),
        ("produce a.mp4 --size 640", "--size '640' is not WIDTHxHEIGHT, such as 640x480"),
        ("watch --json --table", "--json and --table cannot be used together: leave one out"),
        ("streams import cam --input none.state", "none.state cannot be read: No such file or directory"),
        ("benchmark tables none.json", "none.json cannot be read: No such file or directory"),
    ],
)
def test_a_mistake_is_named_as_it_was_written(command: str, said: str) -> None:
    result = CliRunner().invoke(app, command.split())
    assert isinstance(result.exception, DriftkeelError), result.output
    assert str(result.exception) == said
