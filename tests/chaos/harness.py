"""One chaos run: a site behind flaky connections, a schedule of faults by seed, and the checks afterwards."""

from __future__ import annotations

import contextlib
import itertools
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kafka import KafkaProducer

from schemas.command import EVERY_STREAM, Command
from schemas.config import Kafka, Store
from schemas.policy import PolicyChange
from tests.chaos.broker import Broker
from tests.chaos.proxy import FlakyProxy
from tests.chaos.verify import STEP_SCALE, Outcome, frames_in_topic, verify
from tests.conftest import Topic, picture
from tests.system.conftest import Site, WorkerProcess
from worker.control.send import put_command
from worker.embedded import EmbeddedStore, free_port, start_store

STREAMS = [f"cam-{i}" for i in range(8)]
PARTITIONS = 4
FRAMES_PER_SECOND = 40
FRAMES_A_FAULT = 30  # at least; a busy machine sends fewer while the faults happen
SETTLE_S = 600.0
JOIN_S = 60.0
WRITE_INTERVALS_MS = [0, 400]


@dataclass
class Chaos:
    """A running site, and what happens to it whichever broker it has."""

    site: Site
    broker: Broker
    store: EmbeddedStore
    folder: Path
    to_store: FlakyProxy
    random: random.Random
    workers: list[WorkerProcess] = field(default_factory=list)
    stopped: list[tuple[WorkerProcess, float]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    commands: list[Command] = field(default_factory=list)
    longest_outage_s: float = 60
    beside: Path | None = None
    assignments: dict[int, int] = field(default_factory=dict)  # by worker's process id, when membership last changed

    def add_worker(self) -> None:
        """One that writes after every step, or one that always has something in memory that the store has not."""
        store = {**self.site.config["store"], "write_interval_ms": self.random.choice(WRITE_INTERVALS_MS)}
        if self.beside:
            self.site.root = self.random.choice([None, self.beside])
        self.workers.append(self.site.start(store=store))

    def await_group(self) -> None:
        """Where a broker needs that, wait until all workers that run have been assigned partitions since the last of
        them came or went."""
        if not self.broker.waits_for_the_dead:
            return
        deadline = time.monotonic() + JOIN_S
        while not all(
            _assignments(w) > self.assignments.get(w.process.pid, 0) for w in self.workers if not self._is_stopped(w)
        ):
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"the group did not form again in {JOIN_S:.0f} s: where the workers' logs show no error, the "
                    "broker waits for a dead member (docs/guarantees.md)"
                )
            self.pause(0.1)

    def group_changes(self) -> None:
        """A worker is about to come or go."""
        self.assignments = {w.process.pid: _assignments(w) for w in self.workers}

    def pick(self) -> WorkerProcess:
        """One that is not stopped."""
        return self.random.choice([w for w in self.workers if not self._is_stopped(w)])

    def _is_stopped(self, worker: WorkerProcess) -> bool:
        return any(worker is other for other, _ in self.stopped)

    # --- faults; each leaves at least one worker that will go on -------------------------------------------

    def kill(self) -> None:
        """kill -9, and a replacement, at once or after the session is over."""
        self.await_group()
        victim = self.pick()
        self.group_changes()
        self._forget(victim)
        victim.kill()
        self.pause(self.random.choice([0.0, self.broker.session_s + 0.5]))
        self.add_worker()

    def zombie(self) -> None:
        """SIGSTOP for longer than the session; it wakes up later, when others have its streams."""
        self.await_group()
        victim = self.pick()
        self.group_changes()
        victim.signal(signal.SIGSTOP)
        self.stopped.append((victim, time.monotonic() + self.broker.session_s + self.random.uniform(0.5, 3)))
        if len(self.workers) == len(self.stopped):
            self.add_worker()

    def blink(self) -> None:
        """SIGSTOP for less than the session."""
        victim = self.pick()
        victim.signal(signal.SIGSTOP)
        self.pause(self.random.uniform(0.1, self.broker.session_s / 2))
        if not self._is_stopped(victim):
            victim.signal(signal.SIGCONT)

    def restart_worker(self) -> None:
        """SIGTERM, and another."""
        self.await_group()
        victim = self.pick()
        self.group_changes()
        self._forget(victim)
        victim.process.terminate()
        self.add_worker()

    def scale(self) -> None:
        """Up or down to one, two or three workers."""
        self.await_group()
        goal = max(self.random.randint(1, 3), len(self.stopped) + 1)
        if goal > len(self.workers):
            self.group_changes()
        while len(self.workers) < goal:
            self.add_worker()
        while len(self.workers) > goal:
            self.await_group()
            victim = self.pick()
            self.group_changes()
            self._forget(victim)
            victim.process.terminate()

    def restart_store(self) -> None:
        """Stop the store, or kill -9; it comes back with its data."""
        self.store.child.stop(self.random.choice([0, 3]))
        self.pause(self.random.uniform(0.1, 1.5))
        self.store = start_store(self.folder / "store", port=self.store.port)

    def cut_store(self) -> None:
        self.to_store.cut()

    def store_away(self) -> None:
        self.away(self.to_store, self.random.uniform(0.2, 4))

    def store_hangs(self) -> None:
        """Longer than a command may take: workers give up on commands that arrive all the same, later."""
        self.to_store.hold(True)
        self.pause(self.random.uniform(0.5, 7))
        self.to_store.hold(False)

    def command(self) -> None:
        """Tell a stream, or all of them, what shall become of it."""
        action = self.random.choice(["reset", "rollback", "approve", "policy"])
        change = PolicyChange(canary_share=self.random.random()) if action == "policy" else None
        stream = self.random.choice([*STREAMS, EVERY_STREAM])
        command = Command(id=f"chaos-{len(self.commands)}", stream=stream, action=action, policy=change)
        put_command(self.site.kafka, command)
        self.commands.append(command)

    # -----------------------------------------------------------------------------------------------------

    def away(self, proxy: FlakyProxy, seconds: float) -> None:
        proxy.down(True)
        self.pause(seconds)
        proxy.down(False)

    def _forget(self, worker: WorkerProcess) -> None:
        self.workers.remove(worker)
        self.stopped = [(w, t) for w, t in self.stopped if w is not worker]

    def pause(self, seconds: float) -> None:
        """Wait, and wake the zombies whose time has come."""
        deadline = time.monotonic() + seconds
        while True:
            self._wake(time.monotonic())
            left = deadline - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(0.05, left))

    def _wake(self, now: float) -> None:
        for worker, moment in list(self.stopped):
            if now >= moment:
                worker.signal(signal.SIGCONT)
                self.stopped.remove((worker, moment))

    def inject(self) -> str:
        """One fault, drawn by the seed; its name."""
        fault = self.random.choice(self.broker.faults)
        fault(self)
        self.counts[fault.__name__] = self.counts.get(fault.__name__, 0) + 1
        for worker in list(self.workers):
            # A worker that gave up (its broker was away too long while it started) is restarted, as any site would.
            if worker.process.poll() is not None:
                self._forget(worker)
        if len(self.workers) == len(self.stopped):
            self.add_worker()
        return fault.__name__


def _assignments(worker: WorkerProcess) -> int:
    return worker.log.read_text().count("assigned partitions")


WORKER_FAULTS = [Chaos.kill, Chaos.kill, Chaos.zombie, Chaos.zombie, Chaos.blink, Chaos.restart_worker, Chaos.scale]
STORE_FAULTS = [Chaos.store_hangs, Chaos.restart_store, Chaos.store_away, Chaos.cut_store]
COMMANDS = [Chaos.command, Chaos.command]


class Feeder:
    """Sends frames to all streams at a steady pace until told to stop."""

    def __init__(self, kafka: Kafka, seed: int) -> None:
        self._kafka, self._seed = kafka, seed
        self.sent = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        producer = KafkaProducer(bootstrap_servers=self._kafka.bootstrap, batch_size=0)
        for index in itertools.count():
            if self._stop.wait(1 / FRAMES_PER_SECOND):
                break
            # Each another picture: the guard lets repeated ones teach nothing.
            image = picture(self._seed * 1_000_000 + index)
            producer.send(self._kafka.topics.frames, key=STREAMS[index % len(STREAMS)].encode(), value=image)
            self.sent = index + 1
        producer.flush(timeout=240)
        producer.close()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def run(
    faults: int,
    seed: int,
    bundle: Path,
    folder: Path,
    open_broker: Callable[[Path], Broker],
    say: Any = print,
    longest_outage_s: float = 60,
    threads: int = 1,
    mode: Literal["always", "on_demand"] = "always",
    beside: Path | None = None,
) -> Outcome:
    """Inject `faults` faults, let everything settle, and check. Deterministic in its choices by `seed`.

    `open_broker` is one of `tests.chaos.brokers`; `threads` of each worker, and its `adapt.mode`. `beside` has another
    version, which about half of the workers run.
    """
    began = time.monotonic()
    with _site(bundle, folder, seed, open_broker) as (chaos, direct):
        chaos.site.config["threads"] = threads
        chaos.site.config["adapt"] |= {"mode": mode}
        chaos.longest_outage_s, chaos.beside = longest_outage_s, beside
        feeder = Feeder(direct, seed)
        for _ in range(chaos.broker.first_workers):
            chaos.add_worker()
        for number in range(1, faults + 1):
            chaos.pause(chaos.random.uniform(0.1, 1.5))
            name = chaos.inject()
            say(f"fault {number}/{faults}: {name}, {len(chaos.workers)} workers")
        while feeder.sent < FRAMES_A_FAULT * faults:
            chaos.pause(0.1)
        feeder.stop()
        chaos.pause(chaos.broker.session_s + 4)
        say("settling")
        sent, images = frames_in_topic(direct)
        _settle(chaos, sent)
        outcome = verify(chaos.site, direct, sent, images, bundle, chaos.commands)
        outcome.broker = chaos.broker.name
    outcome.faults, outcome.by_kind, outcome.seed = faults, chaos.counts, seed
    outcome.seconds = time.monotonic() - began
    return outcome


def _settle(chaos: Chaos, sent: dict[str, list[str]]) -> None:
    """Wait until every stored state has folded what was sent, or nothing moves any more."""
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        headers = {stream: chaos.site.header(stream) for stream in sent}
        folded = all(h is not None and h.frames >= len(sent[s]) for s, h in headers.items() if sent[s])
        # The commands topic has one partition, and nothing but these: their numbers are its offsets.
        told = {
            stream: max((i for i, c in enumerate(chaos.commands) if c.stream in (stream, EVERY_STREAM)), default=-1)
            for stream in sent
        }
        if folded and all(h.commands.get("commands/0", -1) >= told[s] for s, h in headers.items() if h):
            break
        chaos.pause(0.2)
    for worker in chaos.workers:
        worker.process.terminate()
    for worker in chaos.workers:
        worker.process.wait(120)


@contextlib.contextmanager
def _site(
    bundle: Path, folder: Path, seed: int, open_broker: Callable[[Path], Broker]
) -> Iterator[tuple[Chaos, Kafka]]:
    """Broker and store, and a site whose workers reach the store through a proxy only."""
    with contextlib.ExitStack() as opened:
        store = start_store(folder / "store")
        to_store = FlakyProxy(store.port, free_port())
        broker = open_broker(folder)
        opened.callback(broker.close)
        kafka = Kafka(
            bootstrap=broker.bootstrap,
            group="chaos",
            session_timeout_ms=int(1000 * broker.session_s),
            heartbeat_interval_ms=300,
            fetch_max_wait_ms=20,
        )
        broker.create_topics(kafka, PARTITIONS)
        # The checks read the store past its proxy.
        site = Site(kafka, Store(url=store.url), bundle, folder, Topic(broker.bootstrap))
        site.module = broker.worker_module
        site.config["store"] = {"url": f"redis://127.0.0.1:{to_store.port}/0", "snapshot_every": 3}
        # Without defaults: an earlier version does not know every key.
        site.config["kafka"] = kafka.model_dump(mode="json", exclude_defaults=True) | {"connect_timeout_s": 60}
        site.config["store"]["connect_timeout_s"] = 60
        site.config["adapt"] = {"step_scale": STEP_SCALE}
        chaos = Chaos(site, broker, store, folder, to_store, random.Random(seed))
        opened.callback(lambda: chaos.store.child.stop())
        opened.callback(to_store.close)
        opened.callback(site.kill_all)
        yield chaos, kafka
