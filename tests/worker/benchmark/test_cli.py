import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from schemas.errors import ConfigError, DataError
from worker.cli.app import app


def test_tables_of_a_report(tmp_path: Path) -> None:
    record = {
        "data": "d",
        "model": "m",
        "setting": "continual",
        "shift": "fog",
        "severity": 5,
        "batch": 16,
        "method": "tent",
        "variant": "tuned",
        "seed": 0,
        "accuracy": 0.75,
        "source_accuracy": 0.5,
    }
    report = tmp_path / "report.json"
    report.write_text(json.dumps([record]))
    result = CliRunner().invoke(app, ["benchmark", "tables", str(report), "--plot", str(tmp_path / "plot.svg")])
    assert result.exit_code == 0
    assert "| tent (tuned) | 75.0 |" in result.output
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")


def test_what_is_wrong_with_a_report_or_a_plan(tmp_path: Path) -> None:
    empty = tmp_path / "empty.json"
    empty.write_text("{}")
    with pytest.raises(DataError, match="no report"):
        CliRunner().invoke(app, ["benchmark", "tables", str(empty)], catch_exceptions=False)
    arguments = ["benchmark", "accuracy", "--config", str(tmp_path / "none.yaml"), "--report", str(empty)]
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize("run", ["demo --html", "demo --report", "demo --picture", "benchmark guard --report"])
@pytest.mark.parametrize("file", ["absent/report", "."])
def test_a_long_run_begins_only_where_its_report_can_be_written(run: str, file: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*run.split(), str(tmp_path / file)])
    assert isinstance(result.exception, ConfigError)
    assert "cannot be written" in str(result.exception)


def test_the_example_is_measured_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[Path, Path, str]] = []
    monkeypatch.setattr("worker.benchmark.guard.run_guard", lambda *given: measured.append(given[:3]))
    monkeypatch.chdir(tmp_path)
    for options in ([], ["--bundle", "my bundle"]):
        CliRunner().invoke(app, ["benchmark", "guard", "--report", "r.json", *options], catch_exceptions=False)
    (example, _, command), (own, _, own_command) = measured
    assert (example / "manifest.json").is_file()
    assert command == "driftkeel benchmark guard --report r.json"
    assert (str(own), own_command) == ("my bundle", f"{command} --bundle 'my bundle'")
