"""A real Prometheus scrapes a worker: every panel of every dashboard, and every alert, gets data."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from monitoring.dashboards.__main__ import files
from schemas.config import Kafka, Store
from tests.conftest import Topic, make_tiny_bundle, picture
from tests.monitoring.test_alerts import RULES, rules
from tests.servers import prometheus_tool, promtool, wait_until
from tests.system.conftest import Site, WorkerProcess
from worker.embedded import free_port

STREAMS = [f"cam-{i}" for i in range(4)]
# What Grafana puts in for its variables. The worker runs for seconds here, so windows are of seconds.
VARIABLES = {
    "$__rate_interval": "5s",
    "$__interval": "2s",
    "$__range": "20s",
    "$datasource": "prometheus",
    "$instance": ".*",
    "$job": "driftkeel",
    "$stream": STREAMS[0],
}
OLD = re.compile(r"\boffset \w+")  # nothing here is minutes old
SELDOM = re.compile("job:driftkeel_brief_workers:count15m")  # a number of workers that come and go, as none does here


class Prometheus:
    """A server of its own, and questions to it."""

    def __init__(self, folder: Path, workers: list[WorkerProcess]) -> None:
        self.port = free_port()
        config = {
            "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
            "rule_files": [str(RULES)],
            "scrape_configs": [
                {"job_name": "driftkeel", "static_configs": [{"targets": [f"127.0.0.1:{w.port}" for w in workers]}]}
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.log = folder / "prometheus.log"
        command = [
            prometheus_tool("prometheus"),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--enable-feature=exemplar-storage",
        ]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(120)

    def api(self, path: str, **arguments: Any) -> Any:
        """The answer's data; fails where Prometheus says that the question is wrong."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            pytest.fail(f"{arguments}: {error.read().decode()}")

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=60):
                return True
        except (urllib.error.URLError, ConnectionError):
            return False

    def has_data(self, expr: str, instant: bool = True) -> bool:
        """Whether the answer has a number in it."""
        if instant:
            data = self.api("query", query=expr)
            if data["resultType"] == "scalar":
                return True
            values = [series["value"][1] for series in data["result"]]
        else:
            now = time.time()
            data = self.api("query_range", query=expr, start=now - 20, end=now, step=1)
            values = [value for series in data["result"] for _, value in series["values"]]
        return any(not math.isnan(float(value)) for value in values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prometheus")


def bundle_with_an_estimator(folder: Path) -> Path:
    """An untrained bundle whose estimator says: the surer, the better, and source a little worse; and whose limits
    refuse the updates of dark pictures."""
    make_tiny_bundle(folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["calibration"]["estimator"] = {
        "signals": ["entropy"],
        "centre": [0.5],
        "scale": [0.25],
        "adapted": [1.0, -0.5, 0.0],
        "source": [0.8, -0.5, 0.0],
        "levels": [0.0, 1.0],
        "low": [-0.1, -0.1],
        "high": [0.1, 0.1],
    }
    manifest["limits"]["raw_gradient_norm"] = 600.0  # the guard allows ten times that: dark pictures have eighteen
    path.write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def fed(kafka_settings: Kafka, store_settings: Store, folder: Path, topic: Topic) -> Iterator[tuple[Site, Prometheus]]:
    """A worker and Prometheus that watches it."""
    prometheus_tool("prometheus")
    site = Site(kafka_settings, store_settings, bundle_with_an_estimator(folder / "bundle"), folder, topic)
    worker = site.start(adapt={"mode": "on_demand"})
    prometheus = Prometheus(folder, [worker])
    try:
        wait_until(prometheus.ready, "Prometheus")
        yield site, prometheus
    finally:
        prometheus.close()
        worker.kill()


def feed(site: Site, rounds: Iterator[int]) -> None:
    """Pictures for every stream; then some that repeat, some so dark that their updates are refused, and a record that
    is no frame."""
    number = next(rounds)
    frames = [(stream, picture(100 * number + i)) for i in range(8) for stream in STREAMS]
    frames += [(STREAMS[0], picture(1))] * (8 * (number % 4 == 3))
    frames += [(STREAMS[0], dark(i)) for i in range(8 * (number % 4 == 1))]
    site.send([*frames, ("cam-0", b"no image")])


def dark(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(seed))).point(lambda value: value // 16).save(buffer, "PNG")
    return buffer.getvalue()


def with_variables(expr: str) -> str:
    for name, value in VARIABLES.items():
        expr = expr.replace("${" + name[1:] + "}", value).replace(name, value)
    assert "$" not in expr, expr
    return expr


def panel_queries() -> dict[str, tuple[str, bool]]:
    """PromQL and whether it is asked for one moment, by dashboard, panel and letter."""
    return {
        f"{name}: {panel['title']} {target['refId']}": (with_variables(target["expr"]), target["instant"])
        for name, content in files().items()
        for panel in json.loads(content)["panels"]
        for target in panel.get("targets", ())
    }


def annotation_queries() -> dict[str, tuple[str, bool]]:
    """Annotations without their threshold: events may have happened or not."""
    return {
        f"{name}: annotation {note['name']}": (with_variables(note["expr"]).removesuffix("> 0"), True)
        for name, content in files().items()
        for note in json.loads(content)["annotations"].get("list", ())
    }


def operands(expr: str) -> Iterator[str]:
    """What is compared or joined; within parentheses nothing is taken apart."""
    begin = 0
    for found in re.finditer(r"\b(?:and|unless)\b(?: on \(.*?\))?|\bor\b|[<>=]=(?!~)|\s[<>]\s", expr):
        before = expr[: found.start()]
        if before.count("(") == before.count(")"):
            yield expr[begin : found.start()]
            begin = found.end()
    yield expr[begin:]


def alert_operands() -> dict[str, tuple[str, bool]]:
    """The parts of every alert's and record's expression that are compared or joined, each for itself."""
    parts: dict[str, tuple[str, bool]] = {}
    for rule in rules():
        expr = OLD.sub("offset 3s", rule["expr"])
        expr = re.sub(r"absent\((.*?)\)", r"\1", expr)
        # The worst of what is compared within, or how many there are.
        expr = re.sub(r"^(?:max|count) by \(job\) \(\s*(.*)\)$", r"\1", expr.strip(), flags=re.DOTALL)
        for i, part in enumerate(operands(expr)):
            if not re.fullmatch(r"\s*[-\d.]+\s*", part) and not SELDOM.search(part):
                parts[f"{rule.get('alert', rule.get('record'))} {i}"] = part, True
    return parts


def test_every_panel_and_every_alert_gets_data(fed: tuple[Site, Prometheus]) -> None:
    site, prometheus = fed
    (worker,) = site.running
    wanted = {**panel_queries(), **annotation_queries(), **alert_operands()}
    assert len(wanted) > 100
    rounds, deadline = count(), time.monotonic() + 600
    empty = list(wanted)
    while empty:
        assert worker.process.poll() is None, worker.log.read_text()
        assert time.monotonic() < deadline, "no data for:\n" + "\n".join(f"{n}: {wanted[n][0]}" for n in empty)
        feed(site, rounds)
        empty = [name for name in empty if not prometheus.has_data(*wanted[name])]

    # As they stand: none may be an error, whether it fires or not.
    for rule in rules():
        prometheus.api("query", query=rule["expr"])
    pending = 'ALERTS{alertname=~"Driftkeel(Store|Broker|Worker).*"}'  # of a scrape that took long there may be one
    wait_until(lambda: not prometheus.api("query", query=pending)["result"], "an end of all alerts")
    groups = prometheus.api("rules")["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
    for name, content in files().items():
        for variable in json.loads(content)["templating"]["list"]:
            if variable["type"] == "query":
                metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", with_variables(variable["query"])).groups()
                values = prometheus.api(f"label/{label}/values", **{"match[]": metric})
                assert values, f"{name}: {variable['name']}"
    found = prometheus.api(
        "query_exemplars", query="driftkeel_frame_latency_seconds_bucket", start=time.time() - 900, end=time.time()
    )
    (series,) = {s["seriesLabels"]["__name__"] for s in found}
    assert series == "driftkeel_frame_latency_seconds_bucket"
    assert found[0]["exemplars"][0]["labels"]["frame"].startswith(site.kafka.topics.frames)
    assert re.search(rf'^driftkeel_build_info{{.*group="{site.kafka.group}"', worker.metrics(), re.MULTILINE)
    assert 'reason="other"' not in worker.metrics()  # every reason of the guard has its kind
    assert promtool("check", "metrics", content=worker.metrics()) == ""
