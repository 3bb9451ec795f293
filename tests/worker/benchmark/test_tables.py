import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from meta.benchmark.accuracy import batch_norms
from meta.benchmark.plan import cells_of, read_benchmark
from schemas.errors import ConfigError, DataError
from worker.benchmark.tables import markdown
from worker.benchmark.throughput_tables import BARS
from worker.cli.app import app

RESULTS = Path(__file__).parents[3] / "docs" / "results"
SUMMARIES = "| setting | best published |", "| ours over the best baseline"
ROWS = {
    "accuracy": ["| mgg (ours) |", "| source |"],
    "throughput": [f"| {text} (" for text, _, _ in BARS.values()],
    "proxies": ["| **combination** |", "| held-out shifts, adapted |"],
    "guard": ["| slow_poison | 5,000 | no |", "| healthy |"],
}


@pytest.mark.parametrize("kind", ROWS)
def test_every_committed_report_has_its_tables(kind: str) -> None:
    result = CliRunner().invoke(app, ["benchmark", "tables", str(RESULTS / f"{kind}.json")])
    assert result.exit_code == 0, result.output
    assert all(row in result.output for row in ROWS[kind])


def test_the_tables_of_the_guide_to_trust_are_those_of_its_records() -> None:
    page = (RESULTS.parent / "trust.md").read_text()
    for kind in ("proxies", "guard"):
        for table in markdown(RESULTS / f"{kind}.json").split("\n\n"):
            assert table in page


def test_the_tables_of_the_science_are_those_of_its_records() -> None:
    tables = markdown(RESULTS / "accuracy.json")
    assert (RESULTS.parent / "accuracy.md").read_text().endswith(f"\n\n{tables}\n")
    pages = ((RESULTS.parent / name).read_text() for name in ("science.md", "other-nets.md"))
    shown = [text for page in pages for text in page.split("\n\n") if text.startswith(SUMMARIES)]
    assert len(shown) > 6
    assert all(text in tables for text in shown)
    assert len(set(shown)) == len(shown)


def test_the_accuracy_records_are_of_the_bundles_that_are_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle that changes changes the keys of its cells: then they are to be measured anew."""
    monkeypatch.chdir(RESULTS.parents[1])
    config = read_benchmark(RESULTS / "accuracy.yaml")
    planned = {cell.key for cell in cells_of(config, batch_norms(config))}
    measured = {cell["key"] for cell in json.loads((RESULTS / "accuracy.run.json").read_text())["cells"]}
    assert measured <= planned


def test_the_tables_of_performance_are_those_of_the_record() -> None:
    page = (RESULTS.parent / "performance.md").read_text()
    assert all(table in page for table in markdown(RESULTS / "throughput.json").split("\n\n"))


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    for content, reason in (("no JSON", "Expecting value"), ("[1]", "no report"), ('{"a": 1}', "no report")):
        path.write_text(content)
        with pytest.raises(DataError, match=reason):
            markdown(path)
    with pytest.raises(ConfigError, match="--plot draws"):
        markdown(RESULTS / "guard.json", tmp_path / "plot.svg")
