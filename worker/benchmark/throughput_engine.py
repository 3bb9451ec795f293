"""The engine alone, against a bare loop of the same net on the same micro-batches, and against a loop over streams."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meta.bundle import Bundle
from meta.method import State
from schemas.config import Guard as GuardSettings
from schemas.frame import Position
from schemas.state import StreamHeader
from schemas.state_tensors import StreamState
from worker.batch.batcher import MicroBatch
from worker.decode.image import DecodedFrame
from worker.decode.pixels import normalise_pixels
from worker.engine.engine import SOURCE_SHARE, Engine
from worker.engine.judge import judge
from worker.engine.resident import LIFETIME_S, PARSED
from worker.guard.guard import Guard

GROWN = 1_000  # frames
WARM_UPS = 2
CYCLE = round(1 / SOURCE_SHARE)  # passes in which source answers every stream once


@dataclass(frozen=True)
class Case:
    """`streams` micro-batches of `frames` frames each in one pass, prepared for all ways of running them."""

    bundle: Bundle
    streams: int
    frames: int

    @property
    def total(self) -> int:
        return self.streams * self.frames

    def micro_batches(self) -> list[MicroBatch]:
        preprocess = self.bundle.manifest.preprocess
        shape = (preprocess.height, preprocess.width) + ((3,) if preprocess.channels == 3 else ())
        random = np.random.default_rng(0)
        return [
            MicroBatch(
                f"stream-{s}",
                [
                    DecodedFrame(
                        f"stream-{s}",
                        Position("frames", 0, f),
                        random.integers(0, 256, shape, np.uint8),
                        datetime.now(UTC),
                        0.0,
                    )
                    for f in range(self.frames)
                ],
                adapt=True,
                fold=True,
            )
            for s in range(self.streams)
        ]


def engine_pass(case: Case) -> Callable[[], None]:
    """The engine as the worker uses it: gather states, predict, adapt, keep the new states."""
    engine, header = Engine(case.bundle), grown_header(case.bundle)
    batches = case.micro_batches()
    for batch in batches:
        own = header.model_copy(update={"stream": batch.stream})
        engine.admit(StreamState(header=own, tensors=engine.like), token=1, stored=False)

    def run() -> None:
        for batch in batches:  # The count of events decides when source answers a stream as well.
            engine.resident(batch.stream).header.events += 1
        passed = engine.predict(batches)
        proposals = engine.adapt(passed)
        engine.accept(proposals, proposals.proposals)

    return run


def bare_pass(case: Case) -> Callable[[], None]:
    """Forward, loss, backward and update from frames in memory; the states stay in one place."""
    frames, stream = _inputs(case)
    state: State = case.bundle.method.fresh(case.streams)

    def run() -> None:
        state.update(case.bundle.method.update(case.bundle.method.predict(frames, stream, state)).state)

    return run


def stream_loop(case: Case) -> Callable[[], None]:
    """One stream after the other, as with a model copy per stream."""
    method = case.bundle.method
    frames, _ = _inputs(case)
    parts = torch.split(frames, case.frames)
    alone = torch.zeros(case.frames, dtype=torch.long)
    states = [method.fresh(1) for _ in parts]

    def run() -> None:
        for index, part in enumerate(parts):
            states[index] = method.update(method.predict(part, alone, states[index])).state

    return run


def forward_pass(case: Case) -> Callable[[], None]:
    """Predictions only."""
    frames, _ = _inputs(case)

    def run() -> None:
        with torch.inference_mode():
            case.bundle.model(frames)

    return run


def frames_per_second(
    cases: dict[str, tuple[Case, Callable[[], None]]], repetitions: int, passes: int = 1
) -> dict[str, float]:
    """Medians over `repetitions` of `passes` passes. The cases take turns: a slow moment of the machine affects all.

    With `CYCLE` passes the work that source causes is complete: a single stream causes it in one pass of sixteen.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(WARM_UPS):
        for _, run in cases.values():
            run()
    for _ in range(repetitions):
        for name, (_, run) in cases.items():
            started = time.perf_counter()
            for _ in range(passes):
                run()
            seconds[name].append((time.perf_counter() - started) / passes)
    return {name: case.total / statistics.median(seconds[name]) for name, (case, _) in cases.items()}


def write_trace(case: Case, path: Path) -> None:
    """A trace of three engine passes in Chrome's format."""
    run = engine_pass(case)
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            run()
    profiler.export_chrome_trace(str(path))


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    pixels = [frame.pixels for batch in case.micro_batches() for frame in batch.frames]
    frames = normalise_pixels(pixels, case.bundle.manifest.preprocess)
    return frames, torch.arange(case.streams).repeat_interleave(case.frames)


def engine_memory(bundle: Bundle) -> dict[str, float]:
    """Resident memory that one more idle stream takes, beside the bytes of its tensors; 0 without /proc.

    One more: the first streams also fill the bounded memory of parsed headers.
    """
    streams, engine, known = 4_000, Engine(bundle), _known_header(bundle).model_dump()
    engine.reserve(2 * PARSED + streams)  # as the worker does
    _admit_idle(engine, known, range(2 * PARSED))
    before = _resident_bytes()
    _admit_idle(engine, known, range(2 * PARSED, 2 * PARSED + streams))
    each = (_resident_bytes() - before) / streams
    return {"resident": each, "state": float(engine.state_bytes), "ratio": each / engine.state_bytes}


def _admit_idle(engine: Engine, known: dict[str, Any], numbers: range) -> None:
    for number in numbers:
        # Parsed anew, as from the store: streams share no texts.
        header = StreamHeader.model_validate_json(
            StreamHeader(**known | {"stream": f"camera-{number}"}).model_dump_json()
        )
        engine.admit(StreamState(header=header, tensors=engine.like), token=1, stored=True)
    for turn in numbers:
        engine.pack_idle_headers(turn * LIFETIME_S)


def grown_header(bundle: Bundle) -> StreamHeader:
    """The header of a stream past its first frames, which cost more because source answers all of them."""
    header = _known_header(bundle)
    header.guard.watchful = 0
    return header.model_copy(update={"proxies": header.proxies.model_copy(update={"frames": GROWN})})


def _known_header(bundle: Bundle) -> StreamHeader:
    """The header of a stream that has run until guard, proxies and drift detection keep all that they ever do."""
    engine, guard = Engine(bundle), Guard(GuardSettings(), bundle.manifest.limits)
    (batch,) = Case(bundle, streams=1, frames=8).micro_batches()
    state = engine.begun(batch.stream)
    state.header.last_event = "0" * 64
    engine.admit(state, token=1, stored=True)
    for _ in range(20):
        passed = engine.predict([batch])
        proposals = engine.adapt(passed)
        (proposal,) = proposals.proposals
        judgement = judge(engine, guard, proposal.prediction, proposals, proposal, drift_frames=len(batch.frames))
        engine.resident(batch.stream).header = judgement.header
    return engine.resident(batch.stream).header


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0
