"""Alerts: sound by Prometheus' own tools, each tested both ways, each with a page that says what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.monitoring.test_dashboards import known, names_in
from tests.servers import promtool

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "alerts" / "driftkeel.yml"
TESTS = Path(__file__).with_name("alerts.test.yml")
LIST = ROOT / "docs" / "monitoring.md"
SECTIONS = [
    *("What it means", "Is it urgent?", "First command"),
    *("What to look at", "What to do", "How to know it is over"),
]
WITHOUT_JOB = re.compile(r"\b(?:sum|min|max|count|group|avg)\b(?= by| without|\s*\()(?! by \(job\b)")


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


ALERTS = [rule for rule in rules() if "alert" in rule]


@pytest.mark.parametrize(
    "command", [["check", "rules", str(RULES)], ["test", "rules", str(TESTS)]], ids=["check", "test"]
)
def test_promtool_is_content(command: list[str]) -> None:
    promtool(*command)


@pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_every_alert_says_what_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("warning", "critical")
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "runbook"}
    page = (ROOT / notes["runbook"]).read_text()
    assert rule["alert"] in page
    assert re.findall(r"^## (.*)", page, re.MULTILINE) == SECTIONS
    tests = yaml.safe_load(TESTS.read_text())["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", ()) if case["alertname"] == rule["alert"]]
    assert any(case["exp_alerts"] for case in cases)


@pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_every_alert_is_in_the_list_of_alerts(rule: dict[str, Any]) -> None:
    rows = [line for line in LIST.read_text().splitlines() if line.startswith(f"| {rule['alert']} |")]
    assert len(rows) == 1
    assert f"| {rule['labels']['severity']} |" in rows[0]
    assert f"({rule['annotations']['runbook'].removeprefix('docs/')})" in rows[0]


def test_rules_ask_only_for_what_there_is() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for rule in rules():
        for record in re.findall(r"\w+:\w+:\w+", rule["expr"]):
            assert record in recorded, record
        plain = re.sub(r"\w+:\w+:\w+", "", rule["expr"])
        assert names_in(plain) <= known(), rule["expr"]


def test_what_is_well_at_one_site_hides_nothing_of_another() -> None:
    """Every aggregation keeps the job, which is the site, and so does every join."""
    for rule in rules():
        plain = re.sub(r"\w+:\w+:\w+", "", rule["expr"])
        assert not WITHOUT_JOB.findall(plain), rule["expr"]
        assert all(labels.startswith("job") for labels in re.findall(r"\bon \(([^)]*)\)", rule["expr"]))
        assert all("job" not in labels for labels in re.findall(r"\bignoring \(([^)]*)\)", rule["expr"]))


def test_every_runbook_belongs_to_an_alert() -> None:
    pages = {path.name for path in (ROOT / "docs" / "runbooks").glob("*.md")}
    assert pages == {Path(rule["annotations"]["runbook"]).name for rule in ALERTS}


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "runbooks").glob("*.md")), ids=lambda page: page.stem)
def test_runbooks_have_one_first_command_and_say_what_it_shows(page: Path) -> None:
    sections = dict(re.findall(r"^## (.*)\n\n((?:(?!## ).*\n)+)", page.read_text(), re.MULTILINE))
    assert re.match(r"```sh\n[^\n]+\n```\n\n\S", sections["First command"])
    assert "**" in sections["Is it urgent?"]  # yes, no, or when


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "runbooks").glob("*.md")), ids=lambda page: page.stem)
def test_runbooks_name_metrics_and_rules_that_there_are(page: Path) -> None:
    spans = " ".join(re.findall(r"`([^`]+)`", page.read_text()))
    records = set(re.findall(r"\b[a-z]\w+:[a-z]\w+:[a-z]\w+", spans))
    assert records <= {rule["record"] for rule in rules() if "record" in rule}
    assert names_in(re.sub(r"\w+:\w+:\w+", "", spans)) <= known()
