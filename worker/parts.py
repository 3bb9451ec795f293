"""The parts of a worker, constructed and connected once at the start, when broker and store have answered."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from meta.bundle import Bundle
from monitoring.metrics import WorkerMetrics
from schemas.config import WorkerConfig
from schemas.errors import UnreachableError
from worker.batch.batcher import MicroBatcher
from worker.batch.lateness import Lateness
from worker.consume.cluster import require_cluster
from worker.consume.consumer import FrameConsumer
from worker.consume.offsets import Offsets
from worker.control.commands import MAX_KEPT, CommandList, CommandReader
from worker.control.control import Control
from worker.decode.decoding import Decoding
from worker.decode.image import decode_frame
from worker.engine.engine import Engine
from worker.engine.schedule import Scheduler
from worker.engine.warm_up import warm_up
from worker.guard.answer import Policies
from worker.guard.guard import Guard
from worker.intake import Intake
from worker.kafka.client import require_topics, until_reached
from worker.publish.dead_letters import DeadLetters
from worker.publish.publisher import Publisher
from worker.step import Step
from worker.store.retry import StoreRetry
from worker.store.store import StateStore
from worker.streams.pending import PendingWrites
from worker.streams.streams import Streams
from worker.streams.upgrade import Upgrade
from worker.trace import Trace

log = logging.getLogger("driftkeel.worker")
COMMANDS_PATIENCE_S = 10.0
DEAD_LETTERS_PATIENCE_S = 5.0  # of a worker that stops


@dataclass(frozen=True)
class Parts:
    """In the order in which a frame passes through them; then what all of them use."""

    consumer: FrameConsumer
    offsets: Offsets
    decoding: Decoding
    intake: Intake
    lateness: Lateness
    batcher: MicroBatcher
    scheduler: Scheduler
    streams: Streams
    step: Step
    publisher: Publisher
    pending: PendingWrites
    store: StateStore
    commands: CommandReader
    control: Control
    dead_letters: DeadLetters

    def close(self) -> None:
        """Close everything, whatever part of it fails. The group is left last, after the offsets are committed."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.decoding.close)
            stack.callback(self.step.close)
            stack.callback(self.store.close)
            stack.callback(self.publisher.close)
            stack.callback(self.dead_letters.close)
            stack.callback(self.commands.close)
            stack.callback(self.consumer.close)
            stack.callback(self.consumer.commit, now=True)
            with contextlib.suppress(UnreachableError):  # The streams' next owner publishes the last events again.
                self.publisher.settle(lambda: None)
            with contextlib.suppress(UnreachableError):  # The partition's next owner sends the missing ones again.
                self.intake.dead_letter([], DEAD_LETTERS_PATIENCE_S)


def connect(
    config: WorkerConfig,
    bundle: Bundle,
    metrics: WorkerMetrics,
    trace: Trace | None,
    threads: int,
    stop: threading.Event,
    retry: StoreRetry,
    keep_alive: Callable[[], object],
) -> Parts:
    """Wait for broker and store, and construct the parts. `threads` passes run at a time. Raises UnreachableError, or
    ConfigError where a topic is missing or a login is refused.

    Parts that wait for the broker call `keep_alive`, and those that wait for the store use `retry`, which calls it too.
    It polls, so that the worker stays in its group. The broker may take partitions away in that poll: streams that were
    resident before such a call may be gone after it, and whoever waits has to look again.
    """
    adapt, name = config.adapt, config.worker
    store = _within_reach(config, metrics, stop)
    publisher = Publisher(config.kafka, name, stop, metrics.broker_error)
    dead_letters = DeadLetters(Publisher(config.kafka, name, stop, metrics.broker_error))
    offsets = Offsets()
    consumer = FrameConsumer(config.kafka, offsets, store, stop, metrics)
    frames, cluster = config.kafka.topics.frames, consumer.cluster
    found = partial(store.cluster, frames, cluster)
    noted = until_reached(found, f"the store at {config.store.address}", config.store.connect_timeout_s, stop)
    require_cluster(config, cluster, noted, store.cluster_key(frames))
    decode = partial(decode_frame, limits=config.frames, preprocess=bundle.manifest.preprocess)
    decoding = Decoding(decode, config.frames.decode_threads)
    batcher, lateness = MicroBatcher(config.batch, adapt.enabled), Lateness(config.batch)
    policies = Policies(config.policy, config.streams)
    engine = Engine(bundle, adapt.step_scale, adapt.enabled, config.guard.source_share)
    guard = Guard(config.guard, bundle.limits, bundle.source_accuracy)
    upgrade = Upgrade(config.bundle, engine, guard.max_distance)
    streams = Streams(
        engine, store, publisher, metrics, name, adapt, config.store, retry, policies, upgrade, consumer.beyond
    )
    if adapt.enabled:
        warm_up(engine, bundle.manifest.preprocess)
    pending = PendingWrites(streams, publisher, offsets, metrics, config.store.write_interval_ms, keep_alive)
    drift_frames = config.batch.max_batch if adapt.mode == "on_demand" else 0
    step = Step(streams, batcher, guard, publisher, pending, metrics, name, keep_alive, threads, drift_frames, trace)
    listed = CommandList(max_names=max(MAX_KEPT, config.store.max_streams))
    commands = CommandReader(config.kafka, listed)
    control = Control(listed, streams, store, metrics, retry, pending)
    if not commands.caught_up.wait(COMMANDS_PATIENCE_S):
        log.warning("topic %s is not read to its end yet; commands come later", config.kafka.topics.commands)
    return Parts(
        consumer=consumer,
        offsets=offsets,
        decoding=decoding,
        intake=Intake(config.frames, lateness, decoding, offsets, dead_letters, metrics),
        lateness=lateness,
        batcher=batcher,
        scheduler=Scheduler(lateness, config.batch.max_batch, adapt, policies, engine, metrics),
        streams=streams,
        step=step,
        publisher=publisher,
        pending=pending,
        store=store,
        commands=commands,
        control=control,
        dead_letters=dead_letters,
    )


def _within_reach(config: WorkerConfig, metrics: WorkerMetrics, stop: threading.Event) -> StateStore:
    """The store, once it has answered, and the broker with its topics as well."""
    store = StateStore(config.store)
    metrics.store_answered.set(0)
    until_reached(store.ping, f"the store at {config.store.address}", config.store.connect_timeout_s, stop)
    metrics.store_answered.set_to_current_time()
    metrics.broker_answered.set(0)
    require_topics(config.kafka, stop)
    metrics.broker_answered.set_to_current_time()
    return store
