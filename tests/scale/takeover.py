"""`python -m tests.scale.takeover 2000 6000`: what the embedded broker alone takes for a takeover.

Two plain consumers, no worker: one is killed, and the seconds count until the other has all partitions.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from schemas.config import Kafka
from worker.embedded import start_broker
from worker.kafka_client import create_topics

PARTITIONS = [0, 1, 2, 3]
ROUNDS = 2
CONSUMER = """
import json, sys, time
from kafka import KafkaConsumer
consumer = KafkaConsumer("frames", bootstrap_servers=sys.argv[1], group_id=sys.argv[2],
    session_timeout_ms=int(sys.argv[3]), heartbeat_interval_ms=500, fetch_max_wait_ms=20, enable_auto_commit=False)
last = None
while True:
    consumer.poll(timeout_ms=20)
    assigned = sorted(p.partition for p in consumer.assignment())
    if assigned != last:
        last = assigned
        print(json.dumps([time.time(), assigned]), flush=True)
"""


class Consumer:
    """A process that writes down every change of its assignment."""

    def __init__(self, bootstrap: str, group: str, session_ms: int, log: Path) -> None:
        self._log = log
        with log.open("w") as output:
            command = [sys.executable, "-c", CONSUMER, bootstrap, group, str(session_ms)]
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


def takeover(bootstrap: str, group: str, session_ms: int, folder: Path) -> float:
    first, second = (Consumer(bootstrap, group, session_ms, folder / f"{group}-{i}.log") for i in (1, 2))
    first.wait([second])
    time.sleep(2)
    killed = time.time()
    second.kill()
    seconds = first.wait([]) - killed
    first.kill()
    return round(seconds, 2)


def main() -> None:
    broker = start_broker()
    create_topics(Kafka(bootstrap=broker.bootstrap), len(PARTITIONS))
    with tempfile.TemporaryDirectory() as folder:
        for session in map(int, sys.argv[1:]):
            found = [takeover(broker.bootstrap, f"g{session}-{n}", session, Path(folder)) for n in range(ROUNDS)]
            print(f"session {session} ms: {found} s from kill -9 to the assignment of all partitions", flush=True)
    broker.child.stop(0)


if __name__ == "__main__":
    main()
