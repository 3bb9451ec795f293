"""`python -m tests.scale.takeover 2000 6000`: what a broker alone takes for a takeover.

Two plain consumers, no worker: one is killed, and the seconds count until the other has all partitions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from schemas.config import Kafka, Topics
from tests.broker.process import broker_for
from tests.scale.__main__ import BROKER_HELP
from worker.kafka.client import create_topics

PARTITIONS = [0, 1, 2, 3]
ROUNDS = 2
CONSUMER = """
import json, sys, time
from kafka import KafkaConsumer
from worker.kafka.join import keep_joins, poll_timeout
consumer = KafkaConsumer(sys.argv[4], bootstrap_servers=sys.argv[1], group_id=sys.argv[2],
    session_timeout_ms=int(sys.argv[3]), heartbeat_interval_ms=500, fetch_max_wait_ms=20, enable_auto_commit=False)
keep_joins(consumer)
last = None
while True:
    consumer.poll(timeout_ms=1000 * poll_timeout(consumer, 0.02))
    assigned = sorted(p.partition for p in consumer.assignment())
    if assigned != last:
        last = assigned
        print(json.dumps([time.time(), assigned]), flush=True)
"""


class Consumer:
    """A process that writes down every change of its assignment."""

    def __init__(self, bootstrap: str, topic: str, group: str, session_ms: int, log: Path) -> None:
        self._log = log
        with log.open("w") as output:
            command = [sys.executable, "-c", CONSUMER, bootstrap, group, str(session_ms), topic]
            self.process = subprocess.Popen(command, stdout=output)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def last(self) -> tuple[float, list[int]]:
        lines = self._log.read_text().splitlines()
        return tuple(json.loads(lines[-1])) if lines else (0.0, [])

    def wait(self, others: list[Consumer]) -> float:
        """When this and the others share all partitions."""
        while True:
            parts = [self.last[1], *(other.last[1] for other in others)]
            if all(parts) and sorted(itertools.chain(*parts)) == PARTITIONS:
                return self.last[0]
            time.sleep(0.05)


def takeover(bootstrap: str, topic: str, group: str, session_ms: int, folder: Path) -> float:
    first, second = (Consumer(bootstrap, topic, group, session_ms, folder / f"{group}-{i}.log") for i in (1, 2))
    first.wait([second])
    killed = time.time()
    second.kill()
    seconds = first.wait([]) - killed
    first.kill()
    return round(seconds, 2)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.scale.takeover")
    parser.add_argument("sessions", type=int, nargs="+", metavar="MILLISECONDS", help="session timeouts")
    parser.add_argument("--broker", default=os.environ.get("DRIFTKEEL_TEST_BOOTSTRAP", "own"), help=BROKER_HELP)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, broker_for(arguments.broker) as bootstrap:
        for session in arguments.sessions:
            tag = uuid.uuid4().hex[:8]
            topics = Topics(**{name: f"{name}-{tag}" for name in Topics.model_fields})
            create_topics(Kafka(bootstrap=bootstrap, topics=topics), len(PARTITIONS))
            groups = [f"g{session}-{n}-{tag}" for n in range(ROUNDS)]
            found = [takeover(bootstrap, topics.frames, group, session, Path(folder)) for group in groups]
            print(f"session {session} ms: {found} s from kill -9 to the assignment of all partitions", flush=True)


if __name__ == "__main__":
    main()
