"""The dashboards' JSON is what the code says, and asks only for metrics that there are."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring.dashboards.__main__ import FOLDER, files
from monitoring.dashboards.parts import lag_seconds
from monitoring.reference import rows
from tests.servers import promtool

BOARDS = {name: json.loads(content) for name, content in files().items()}
PANELS = [(name, panel) for name, board in BOARDS.items() for panel in board["panels"] if panel["type"] != "row"]
OTHERS = {"up", "scrape_duration_seconds"}  # Prometheus' own


def known() -> set[str]:
    """All sample names that a worker can have."""
    parts = {"histogram": ("_bucket", "_sum", "_count"), "gaugehistogram": ("_bucket", "_gsum", "_gcount")}
    return {name + part for name, kind, _, _ in rows() for part in parts.get(kind, ("",))} | OTHERS


def names_in(expr: str) -> set[str]:
    return set(re.findall(r"\b((?:driftkeel|process|scrape)_\w+|up)\b", re.sub(r'"[^"]*"|by \([^)]*\)', "", expr)))


def test_the_json_is_up_to_date() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(BOARDS)
    for name, content in files().items():
        assert (FOLDER / name).read_text() == content, "run: python -m monitoring.dashboards"


@pytest.mark.parametrize(("board", "panel"), PANELS, ids=[f"{b}: {p['title']}" for b, p in PANELS])
def test_every_panel_says_what_it_shows(board: str, panel: dict[str, Any]) -> None:
    assert len(panel["description"]) > 15
    assert panel["fieldConfig"]["defaults"]["unit"]
    if panel["type"] in ("stat", "table", "heatmap"):
        assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert panel["targets"]
    for target in panel["targets"]:
        found = names_in(target["expr"])
        assert found | set(re.findall("ALERTS", target["expr"])), target["expr"]
        assert found <= known(), target["expr"]
        selectors = re.findall(r"\w+\{([^}]*)\}", target["expr"])
        assert selectors
        assert all(re.search(r'job="\$job"|job=~"\$job\|"', labels) for labels in selectors), target["expr"]
        assert target["datasource"]["uid"] == "${datasource}"


@pytest.mark.parametrize("name", BOARDS)
def test_boards_are_linked_and_nothing_overlaps(name: str) -> None:
    board = BOARDS[name]
    assert [v["name"] for v in board["templating"]["list"]][:2] == ["datasource", "job"]
    # One site at a time: cameras of two may have the same name, and no panel may add them up.
    job = board["templating"]["list"][1]
    assert not job.get("multi")
    assert not job.get("includeAll")
    (link,) = board["links"]
    assert link["tags"] == ["driftkeel"] == board["tags"]
    uids = {other["uid"] for other in BOARDS.values()}
    assert len(uids) == len(BOARDS)
    assert set(re.findall(r"/d/([\w-]+)", json.dumps(board))) <= uids
    cells = [p["gridPos"] for p in board["panels"]]
    for a, b in combinations(cells, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
    assert all(cell["x"] + cell["w"] <= 24 for cell in cells)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_every_series_of_a_stream_is_on_its_page() -> None:
    shown = {
        name
        for panel in BOARDS["stream.json"]["panels"]
        for t in panel.get("targets", ())
        for name in names_in(t["expr"])
    }
    shown |= {name for a in BOARDS["stream.json"]["annotations"]["list"] for name in names_in(a["expr"])}
    assert {name for name in known() if name.startswith("driftkeel_stream_")} == shown - {
        "driftkeel_clock_timestamp_seconds"  # of the worker; ages are by it
    }


def test_provisioning_finds_the_folder() -> None:
    compose = (Path(__file__).parents[2] / "deploy" / "compose.yaml").read_text()
    assert "./grafana/dashboards:/var/lib/grafana/dashboards:ro" in compose


def test_lag_is_that_of_the_worker_that_is_furthest_behind(tmp_path: Path) -> None:
    """As the alert on it has it: in a sum one of many would not show."""
    series = {
        'driftkeel_consumer_lag_records{job="a",instance="slow",partition="0"}': "300x10",
        'driftkeel_predictions_total{job="a",instance="slow"}': "0+60x10",
        'driftkeel_consumer_lag_records{job="a",instance="fast",partition="1"}': "100x10",
        'driftkeel_predictions_total{job="a",instance="fast"}': "0+6000x10",
    }
    expr = lag_seconds('job="a"').replace("$__rate_interval", "5m")
    case = {"expr": expr, "eval_time": "10m", "exp_samples": [{"value": 300}]}
    given = [{"series": name, "values": values} for name, values in series.items()]
    tests = {"tests": [{"interval": "1m", "input_series": given, "promql_expr_test": [case]}]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(tests))
    promtool("test", "rules", tmp_path / "test.yml")
