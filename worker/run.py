"""The worker: consume, decode, batch, step, commit, until told to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch

from meta.bundle import Bundle
from monitoring.http import MetricsServer, serve_metrics
from monitoring.metrics import WorkerMetrics
from schemas.config import WorkerConfig
from schemas.errors import ConfigError, UnreachableError
from worker.batch.batcher import within_memory, within_method
from worker.engine.device import EXPERIMENTAL, described, out_of_memory, site_device
from worker.flights import HUNG_AFTER_S, Flights
from worker.kafka.client import LONGEST_PAUSE_S, check_checksum_speed
from worker.partitions import Partitions
from worker.parts import connect
from worker.polling import Polling
from worker.process import installed_version, keep_freed_memory, spare_collections, switch_often
from worker.reach import Reach
from worker.site.bundle import site_bundle
from worker.store.retry import StoreRetry
from worker.trace import open_trace

log = logging.getLogger("driftkeel.worker")
STUCK_AFTER_S = 60.0
LAG_INTERVAL_S = 1.0


class Worker:
    """One worker process. `run` returns when `stop` is set."""

    def __init__(self, config: WorkerConfig, stop: threading.Event) -> None:
        self._stop = stop
        keep_freed_memory()
        # Several passes with a thread each, rather than one pass that uses all threads: small layers gain little from
        # being divided. More than two would only wait for the interpreter lock; more workers use more processors.
        threads = config.threads or min(2, torch.get_num_threads())
        torch.set_num_threads(1)
        check_checksum_speed()
        device = site_device(config.device)
        bundle = site_bundle(config, device)
        self.config = config = _fitted(config, bundle, threads)
        where = config.bundle.path, described(device)
        log.info("bundle %s (%s) from %s, computed on %s", bundle.hash, bundle.manifest.name, *where)
        if device.type != "cpu":
            log.warning("device %s is %s", config.device, EXPERIMENTAL)
        if not bundle.is_estimated:
            log.warning(
                "adapt.method is %s: nobody estimates its accuracy, and the guard goes by where its answers leave "
                "source's; methods beside the bundle's generator are there to be compared",
                bundle.method_name,
            )
        self.metrics = _metrics(config, bundle)
        self._trace = open_trace(config.traces, config.worker)
        self._joined = False
        self._refused = self._stuck = 0
        self._hung = False
        self._progress = time.monotonic()
        self._server = self._serve()
        self._retry = retry = StoreRetry(config.store.address, stop, self._keep_alive, self.metrics.store_errors.inc)
        self._parts = parts = connect(config, bundle, self.metrics, self._trace, threads, stop, retry, self._keep_alive)
        self._store = parts.store
        self._consumer = parts.consumer
        self._reach = Reach(config, self.metrics, self._consumer, parts.publisher, retry)
        self._decoding, self._intake, self._batcher = parts.decoding, parts.intake, parts.batcher
        self._streams, self._pending, self._control = parts.streams, parts.pending, parts.control
        self._flights = Flights(config, parts, self.metrics, threads, stop)
        self._partitions = Partitions(parts, config.store.max_streams)
        self._polling = Polling(config.batch, parts, self._flights, self._partitions)
        self._lag_shown = 0.0
        log.info(
            "worker %s: broker %s, topic %s, group %s, store %s, metrics http://%s:%d/metrics",
            config.worker,
            config.kafka.bootstrap,
            config.kafka.topics.frames,
            config.kafka.group,
            config.store.address,
            config.metrics.host,
            self._server.port,
        )

    def _serve(self) -> MetricsServer:
        registry, settings = self.metrics.registry, self.config.metrics
        try:
            return serve_metrics(registry, settings.host, settings.port, self.alive, self.unready)
        except OSError as error:
            raise ConfigError(
                f"metrics.port {settings.port} on {settings.host} cannot be bound: {error.strerror}; "
                "choose another, or 0 for a free one"
            ) from error

    def alive(self) -> bool:
        """Whether the loop has turned lately and no pass hangs."""
        return time.monotonic() - self._progress < STUCK_AFTER_S

    def unready(self) -> str:
        """Why the worker is not ready; empty where it is. A ready worker is in its group and reads all of its
        partitions, broker and store answer, and the broker takes what is published.

        A worker without partitions is ready, too: it is a spare, for which a rollout must not wait for ever.
        """
        if not self._joined:  # Probes may come before the parts, which are asked below, are constructed.
            return f"not in group {self.config.kafka.group} yet"
        trouble = self._reach.trouble()
        if not (trouble or self._retry.answers):
            trouble = [f"the store at {self.config.store.address} does not answer"]
        if self._consumer.trouble:
            trouble.append(self._consumer.trouble)
        elif self._refused:
            trouble.append(
                f"{self._refused} partitions are not read: their log is shorter than what the store has of it"
            )
        if self._stuck:
            trouble.append(f"nothing comes of {self._stuck} partitions although they have more")
        return "; ".join(trouble)

    def run(self) -> None:
        """Turn the loop until told to stop; then finish the steps under way, commit, and leave the group."""
        try:
            while not self._stop.is_set():
                self._turn()
            while self._flights:
                self._move_on()
            self._pending.flush()
        except UnreachableError as error:
            if not self._stop.is_set():
                raise
            # Nothing is lost: what is not committed will be read again.
            log.warning("stopped without waiting any longer: %s", error)
        finally:
            self._close()

    def _turn(self) -> None:
        """Move steps under way on, take up what is decoded, begin passes of what is due, and poll for more."""
        self._move_on(self._decoding.running)
        self._take_up()
        self._obey()
        if not self._flights.takes_in:
            self._flights.begin()
        self._give_way(self._pending.flush_due() + self._streams.returned())
        if self._store.reconnected():  # Before the commit, whose marks would hide that the store has lost writes.
            self._partitions.begin_again()
        self._trim()
        self._streams.engine.pack_idle_headers(time.monotonic())
        if fenced := self._control.look_after_the_rest(self._flights.streams):
            self._partitions.rewind(fenced)
        self._consumer.commit()
        self._joined = self._consumer.joined
        self._refused, self._stuck = self._consumer.refused, self._consumer.stuck
        self.metrics.refused_partitions.set(self._refused)
        self.metrics.stuck_partitions.set(self._stuck)
        self.metrics.buffered.set(len(self._batcher))
        self._show_progress()
        if not self._polling.stocked:
            self._polling.look()
        self._intake.hand_over(self._partitions.load, self._partitions.is_folded)
        self._partitions.doubt()

    def _take_up(self) -> None:
        """Hand decoded frames to the batcher, and bad records to the dead letters."""
        frames, bad = self._intake.take()
        self._batcher.add(frames)
        self._intake.dead_letter(bad)

    def _obey(self) -> None:
        """Have streams obey commands, except those that are in a step."""
        self._control.listen()
        if fenced := self._control.run(self._flights.streams):
            self._partitions.rewind(fenced)

    def _move_on(self, others: Sequence[Future[Any]] = ()) -> None:
        for fenced, span in self._flights.move_on(others):
            self._give_way(fenced, span)

    def _give_way(self, fenced: list[str], span: float = 0.0) -> None:
        """Another worker has claimed these streams. `span`: how long the step took whose write was refused."""
        if fenced:
            self._partitions.rewind(fenced)
            # Two workers that both have frames of a stream (it moved) would take it from each other in lockstep, and
            # neither ever write. So wait at random, up to two steps; but no longer than LONGEST_PAUSE_S, because this
            # step may have waited for the store, and the loop stands still meanwhile.
            span += self.config.batch.max_wait_ms / 1000
            self._stop.wait(random.uniform(0, min(2 * span, LONGEST_PAUSE_S)))  # noqa: S311

    def _trim(self) -> None:
        """Remove the least recently used streams from memory where there are too many, once they are stored."""
        if self._streams.crowded:
            self._give_way(self._pending.flush())
            busy = self._batcher.streams | self._decoding.streams | self._flights.streams
            self._partitions.forget(self._streams.trim(busy))

    def _show_progress(self) -> None:
        """The worker counts as alive whatever the loop waits for, unless a pass hangs."""
        hung, self._hung = self._hung, self._flights.hang
        if not self._hung:
            self._progress = time.monotonic()
            self.metrics.last_progress.set_to_current_time()
        elif not hung:
            log.error(
                "a pass hangs: it began more than %.0f s ago, and its cameras get no predictions; see to %s, "
                "and restart the worker",
                HUNG_AFTER_S,
                self._parts.streams.engine.device,
            )
        self.metrics.partitions.set(len(self._consumer.assignment()))
        if time.monotonic() - self._lag_shown > LAG_INTERVAL_S:
            self._lag_shown = time.monotonic()
            self.metrics.set_lag(self._consumer.lag())

    def _keep_alive(self) -> None:
        """What the loop does while a part waits for broker or store: stay in the consumer group, and take over nothing.
        Partitions may be taken away in this poll, and with them streams that the waiting part is about to use."""
        self._show_progress()
        self._consumer.pause(True)
        self._polling.receive(0.05)

    def _close(self) -> None:
        """Close everything, whatever part of it fails."""
        self._stop.set()  # Also after an error: nothing below must wait for a broker that is away.
        with contextlib.ExitStack() as stack:
            stack.callback(log.info, "worker %s stopped", self.config.worker)
            stack.callback(self._server.close)
            if self._trace is not None:
                stack.callback(self._trace.close)
            stack.callback(self._reach.close)
            stack.callback(self._parts.close)


def _fitted(config: WorkerConfig, bundle: Bundle, threads: int) -> WorkerConfig:
    """The configuration with as many buffered frames as fit into memory, and micro-batches no larger than the method
    gains from."""
    preprocess = bundle.manifest.preprocess
    frame_bytes = preprocess.channels * preprocess.height * preprocess.width
    room = within_memory(config.batch, frame_bytes, threads)
    batch = within_method(room, config.adapt.enabled, bundle.method)
    if batch.max_batch < config.batch.max_batch:
        log.info("batch.max_batch is %d: more at a time teach %s no more", batch.max_batch, bundle.method_name)
    return config.model_copy(update={"batch": batch})


def _metrics(config: WorkerConfig, bundle: Bundle) -> WorkerMetrics:
    """The worker's metrics, with what is known before the first frame."""
    metrics = WorkerMetrics(config.metrics.max_stream_labels, config.metrics.silent_after_s)
    about = {"version": installed_version(), "bundle": bundle.hash, "worker": config.worker}
    metrics.build.info({**about, "group": config.kafka.group})
    metrics.clean_accuracy.set(bundle.manifest.model.clean_accuracy)
    metrics.last_progress.set_to_current_time()  # a start is no standstill since 1970
    return metrics


def run_worker(config: WorkerConfig) -> None:
    """Run a worker in this process until SIGTERM or SIGINT."""
    stop = threading.Event()

    def on_signal(number: int, frame: object) -> None:
        if stop.is_set():
            os._exit(128 + number)  # Asked a second time: do not wait for anything.
        log.info("%s: finishing the step in hand", signal.Signals(number).name)
        stop.set()

    switch_often()
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    try:
        try:
            worker = Worker(config, stop)
        except UnreachableError as error:
            if not stop.is_set():
                raise
            log.warning("stopped before it began: %s", error)
            return
        spare_collections()
        worker.run()
    except torch.cuda.OutOfMemoryError as error:
        raise out_of_memory(config.device, error) from error
