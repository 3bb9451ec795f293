"""`python -m tests.scale.soak --minutes 60 --report docs/results/soak.json`: whether a worker stays as small as it is.

Cameras come and go without end, more of them than may be resident at a time; some records are no frames, commands
come, states expire, and somebody scrapes the metrics. What is measured is the worker's memory, files and series.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import redis
from kafka import KafkaProducer

from schemas.command import Command
from tests.scale.__main__ import BROKER_HELP, PICTURES, a_site
from tests.system.conftest import Site, WorkerProcess
from worker.control.send import put_command

LIVE = 100  # cameras that send
RESIDENT = 64  # of them in memory
STAYS_S = (20.0, 400.0)  # how long a camera sends
RETURNS = 0.3  # share of those that come that were there before
IDLE_TTL_S = 60
COMMAND_S, SAMPLE_S, SCRAPE_S = 5.0, 15.0, 5.0
BAD = 0.002  # share of records that are no frames
SETTLED = 0.25  # share of the run before which nothing counts: caches fill
ACTIONS = ("freeze", "unfreeze", "reset", "rollback")


def cameras(chance: random.Random) -> Iterator[list[str]]:
    """Who sends now: each time it is asked those whose time is over have gone, and others have come."""
    numbers, gone, until = itertools.count(), [], {}
    while True:
        now = time.monotonic()
        for stream in [stream for stream, end in until.items() if end <= now]:
            del until[stream]
            gone.append(stream)
        while len(until) < LIVE:
            back = bool(gone) and chance.random() < RETURNS
            stream = gone.pop(chance.randrange(len(gone))) if back else f"cam-{next(numbers)}"
            until[stream] = now + chance.uniform(*STAYS_S)
        yield list(until)


def drive(site: Site, worker: WorkerProcess, seconds: float, rate: float) -> list[dict[str, Any]]:
    """Send for so long; a sample every SAMPLE_S."""
    chance, samples, sent = random.Random(0), [], 0
    producer = KafkaProducer(bootstrap_servers=site.kafka.bootstrap, linger_ms=5)
    store = redis.Redis.from_url(site.store.url.get_secret_value())
    began = time.monotonic()
    due = {"command": began + COMMAND_S, "scrape": began, "sample": began + SAMPLE_S}
    sending = cameras(chance)
    while (now := time.monotonic()) < began + seconds:
        live = next(sending)
        for _ in range(int((now - began) * rate) - sent):
            bad = chance.random() < BAD
            content = b"no picture" if bad else PICTURES[sent % len(PICTURES)]
            producer.send(site.kafka.topics.frames, content, chance.choice(live).encode())
            sent += 1
        if now >= due["command"]:
            due["command"] += COMMAND_S
            action = chance.choice(ACTIONS)
            put_command(site.kafka, Command(action=action, stream=chance.choice(live), reason="soak"))
        if now >= due["scrape"]:
            due["scrape"] += SCRAPE_S
            text = worker.metrics()
        if now >= due["sample"]:
            due["sample"] += SAMPLE_S
            samples.append({"seconds": round(now - began), "sent": sent, **_sizes(worker, text, store)})
            print(samples[-1], flush=True)
        time.sleep(0.02)
    producer.close()
    return samples


def _up(worker: WorkerProcess) -> bool:
    try:
        return worker.ready()
    except urllib.error.URLError:
        return False


def _sizes(worker: WorkerProcess, metrics: str, store: Any) -> dict[str, float]:
    process = Path(f"/proc/{worker.process.pid}")
    pages = dict(line.split(":") for line in (process / "status").read_text().splitlines())
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line[0] != "#"}
    return {
        "memory_mib": round(int(pages["RssAnon"].split()[0]) / 1024, 1),
        "threads": int(pages["Threads"]),
        "files": len(list((process / "fd").iterdir())),
        "series": len(values),
        "predictions": sum(v for k, v in values.items() if k.startswith("driftkeel_predictions_total")),
        "store_keys": sum(1 for _ in store.scan_iter("*", 1000)),
        "store_mib": round(store.info("memory")["used_memory"] / 2**20, 1),
    }


def summary(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Memory once caches have filled: where it was, and how it grew by a straight line through all samples."""
    late = [s for s in samples if s["seconds"] >= SETTLED * samples[-1]["seconds"]]
    hours, memory = (np.array([s[name] for s in late]) for name in ("seconds", "memory_mib"))
    slope = np.polyfit(hours / 3600, memory, 1)[0]
    return {
        "minutes": round(samples[-1]["seconds"] / 60, 1),
        "frames": samples[-1]["predictions"],
        "memory_mib_first": float(memory[0]),
        "memory_mib_last": float(memory[-1]),
        "memory_mib_per_hour": round(float(slope), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.scale.soak")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=200, help="frames a second of all cameras")
    parser.add_argument("--broker", default="embedded", help=BROKER_HELP)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    with a_site(arguments.broker) as site:
        site.config |= {"adapt": {"max_resident_streams": RESIDENT}}
        site.config["store"] |= {"idle_ttl_s": IDLE_TTL_S}
        worker = site.start()
        worker.wait_until(lambda: _up(worker), "readiness")
        samples = drive(site, worker, 60 * arguments.minutes, arguments.rate)
        code = worker.stop()
        lines = worker.log.read_text().splitlines()
    report = {**summary(samples), "exit_code": code, "log_lines": len(lines), "samples": samples}
    print({name: value for name, value in report.items() if name != "samples"})
    if arguments.report:
        arguments.report.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
