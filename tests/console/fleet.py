"""A page with hundreds of cameras: what an update costs in the browser, and the console in processor time.

A feeder writes what workers would: for every camera two predictions a second and an update event a second, with frames
that can be fetched for pictures. Times are from the arrival of a message in the page to the end of the frame that shows
it, as the page itself notes them (`performance.measure`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from kafka import KafkaProducer
from playwright.sync_api import Page, sync_playwright

from schemas.config import Kafka
from tests.browser import chromium_options
from tests.conftest import picture
from tests.monitoring.console.records import event, prediction
from worker.embedded import embedded_services
from worker.kafka.client import connection, create_topics

SCROLLS = 12


def measure(streams: int, seconds: float, report: Path | None) -> None:
    """Print the results, and write them to `report`."""
    with embedded_services() as (broker, store, folder), tempfile.TemporaryDirectory() as scratch:
        kafka = Kafka(bootstrap=broker.bootstrap)
        create_topics(kafka, 4)
        content = {
            "kafka": {"bootstrap": broker.bootstrap},
            "store": {"url": store.url},
            "console": {"port": 0},
        }
        path = Path(scratch) / "console.yaml"
        path.write_text(yaml.safe_dump(content))
        console = subprocess.Popen(
            [sys.executable, "-m", "worker", "console", "--config", str(path)],
            stdout=subprocess.PIPE,
            stderr=(folder / "console.log").open("wb"),
            text=True,
        )
        stop = threading.Event()
        rounds: list[float] = []
        feeder = threading.Thread(target=_feed, args=(kafka, streams, stop, rounds))
        feeder.start()
        try:
            assert console.stdout is not None
            found = re.search(r"http://\S+", console.stdout.readline())
            assert found, (folder / "console.log").read_text()
            results = _look(found[0], streams, seconds, console.pid)
        finally:
            stop.set()
            feeder.join()
            console.terminate()
            console.wait(20)
    # Under load a round may begin late; what was fed is what counts.
    per_second = (len(rounds) - 1) / (rounds[-1] - rounds[0])
    results["fed_per_second"] = {"predictions": round(streams * per_second), "events": round(streams * per_second / 2)}
    text = json.dumps(results, indent=2)
    print(text)
    if report:
        report.write_text(text + "\n")


def _feed(kafka: Kafka, streams: int, stop: threading.Event, rounds: list[float]) -> None:
    """Until `stop`: a round every half second, half of the cameras' events in each; notes when each began."""
    random = np.random.default_rng(0)
    producer = KafkaProducer(**connection(kafka), linger_ms=20, batch_size=256 << 10)
    topics = kafka.topics
    names = [f"line-{i % 20:02d}-camera-{i:03d}" for i in range(streams)]
    frame = picture(1, (320, 240), "JPEG")
    sent = [producer.send(topics.frames, key=name.encode(), value=frame).get(30) for name in names]
    places = [f"{m.topic}/{m.partition}/{m.offset}" for m in sent]
    # Nine in ten are fine, as on a good day; each wanders.
    level = np.where(random.random(streams) < 0.9, 0.93, 0.78)
    number = 0
    while not stop.is_set():
        began = time.monotonic()
        rounds.append(began)
        number += 1
        accuracy = np.clip(level + 0.03 * random.standard_normal(streams), 0, 1)
        for i, name in enumerate(names):
            answer = prediction(name, id=places[i], estimated_accuracy=float(accuracy[i]), label=f"part {number % 10}")
            producer.send(topics.predictions, key=name.encode(), value=answer.model_dump_json().encode())
            if i % 2 == number % 2:
                change = event(name, number, float(accuracy[i]), source=0.7, low=0.6, high=1.0)
                producer.send(topics.updates, key=name.encode(), value=change.model_dump_json().encode())
        producer.flush()
        stop.wait(max(0.0, 0.5 - (time.monotonic() - began)))
    producer.close(timeout=5)


def _look(url: str, streams: int, seconds: float, console: int) -> dict[str, Any]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**chromium_options())
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(url)
        page.wait_for_function(
            "n => [...document.querySelectorAll('.chip b')].reduce((a, b) => a + Number(b.textContent), 0) >= n",
            arg=streams,
            timeout=60_000,
        )
        page.locator(".tile img.there").nth(10).wait_for()
        page.evaluate(_WATCH)
        used, began = _cpu_seconds(console), time.monotonic()
        still = _times(page, seconds / 2)
        moving = _times(page, seconds / 2, scrolls=SCROLLS)
        share = (_cpu_seconds(console) - used) / (time.monotonic() - began)
        results = {
            "command": f"python -m tests.console fleet --streams {streams} --seconds {seconds:g}",
            "browser": f"Chromium {browser.version}, headless, 1280 x 800",
            "processors": os.cpu_count(),
            "streams": streams,
            "update_ms": _summary(still),
            "update_ms_while_scrolling": _summary(moving),
            "scripting_ms": _summary(page.evaluate("scripting")),
            "elements_in_the_grid": page.locator(".cell").count(),
            "tasks_over_100_ms": page.evaluate("longTasks.filter((ms) => ms > 100).length"),
            "heap_megabytes": round(page.evaluate("performance.memory.usedJSHeapSize") / 2**20, 1),
            "console_processor_share": round(share, 3),
        }
        browser.close()
    return results


_WATCH = """() => {
  window.longTasks = [];
  window.scripting = [];
  new PerformanceObserver((list) => longTasks.push(...list.getEntries().map((e) => e.duration)))
    .observe({ type: "longtask" });
  new PerformanceObserver((list) => scripting.push(...list.getEntries()
    .filter((e) => e.name === "apply").map((e) => e.duration))).observe({ type: "measure" });
}"""


def _times(page: Page, seconds: float, scrolls: int = 0) -> list[float]:
    page.evaluate("performance.clearMeasures('update')")
    pause = 1_000 * seconds / max(1, scrolls)
    for _ in range(scrolls):
        page.mouse.wheel(0, 900)
        page.wait_for_timeout(pause)
    if not scrolls:
        page.wait_for_timeout(pause)
    times: list[float] = page.evaluate("performance.getEntriesByName('update').map((entry) => entry.duration)")
    return times


def _summary(times: list[float]) -> dict[str, float]:
    values = np.array(times)
    return {
        "updates": len(times),
        "median": round(float(np.median(values)), 1),
        "p95": round(float(np.quantile(values, 0.95)), 1),
        "worst": round(float(values.max()), 1),
    }


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
