"""What the guard is worth and what it costs: attacks on engine and guard, without broker and store.

Every attack begins on a stream that has seen ordinary frames, and is followed by a probe of ordinary frames. All go
through predict, guard and update as in a worker. Results are compared with the source model's on the same frames.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meta import data
from meta.benchmark.corruptions import TEST
from meta.benchmark.datasets import Pool
from meta.benchmark.report import Journal, commit
from meta.benchmark.run import load_frames, run_streams
from meta.benchmark.streams import Setting, Stream, make_streams
from meta.bundle import Bundle, load_bundle
from meta.data import LabelledImages, cache_folder
from meta.proxies import Observed
from schemas.config import Guard as GuardSettings
from schemas.frame import Position
from schemas.policy import Policy
from worker.batch.batcher import MicroBatch
from worker.benchmark.guard_attacks import ATTACKS, NAN_MARK, other_images
from worker.decode.image import DecodedFrame
from worker.decode.pixels import normalise_pixels
from worker.engine.engine import Engine
from worker.engine.header import next_header
from worker.engine.judge import judge
from worker.engine.passes import Part, Pass
from worker.guard.answer import answering
from worker.guard.guard import Guard

BATCH, PASS = 16, 256
SEEDS = 3
WARM, PROBE = 512, 1_000
WINDOW = 128  # frames whose mean accuracy decides on recovery
HEALING = 128  # frames between attack and probe; their loss is reported separately
RECOVERED, COLLAPSED = 0.05, 0.5  # largest difference from source's accuracy; least share of it
BARS = {"probe_drop_points": 1.0, "below_source_points": 0.5, "gain_kept": 0.95, "cost_share": 0.08}
SETTINGS: tuple[Setting, ...] = ("continual", "reset", "gradual", "recurring", "mixed", "correlated", "healthy", "long")


class NanEngine(Engine):
    """Turns marked frames into NaN before the model: the worst that preprocessing could do."""

    def _frames(self, part: Part) -> tuple[Tensor, list[tuple[list[int], float]]]:
        frames, looks = super()._frames(part)
        marked = [
            bool(f.pixels[0, 0] == NAN_MARK and (f.pixels == NAN_MARK).all())
            for batch in part.batches
            for f in batch.frames
        ]
        if any(marked):
            frames[torch.tensor(marked)] = float("nan")
        return frames, looks


@dataclass
class Served:
    """A stream's answers by frame, how many of them were source's, and the guard's decisions with their reasons."""

    answers: list[int] = field(default_factory=list)
    by_source: int = 0
    decisions: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)


class Bench:
    """Runs streams through engine and guard as `worker.step` does."""

    def __init__(self, bundle: Bundle, settings: GuardSettings | None = None) -> None:
        settings = settings or GuardSettings()
        self.bundle = bundle
        self.engine = NanEngine(bundle, source_share=settings.source_share)
        self.guard = Guard(settings, bundle.limits, bundle.source_accuracy)
        self._sent: Counter[str] = Counter()
        self._now = datetime.now(UTC)

    def admit(self, stream: str) -> None:
        self.engine.admit(self.engine.begun(stream), 1, stored=False)

    def serve(self, reels: Mapping[str, np.ndarray]) -> dict[str, Served]:
        """Serve the frames of all streams, uint8 (N, h, w), side by side; new streams are admitted."""
        served = {stream: Served() for stream in reels}
        for stream in reels:
            if stream not in self.engine:
                self.admit(stream)
        place = dict.fromkeys(reels, 0)
        while waiting := [stream for stream, reel in reels.items() if place[stream] < len(reel)]:
            for start in range(0, len(waiting), PASS // BATCH):
                batches = []
                for stream in waiting[start : start + PASS // BATCH]:
                    at = place[stream]
                    place[stream] = at + BATCH
                    batches.append(self._batch(stream, reels[stream][at : at + BATCH]))
                self._step(batches, served)
        return served

    def _batch(self, stream: str, pixels: np.ndarray) -> MicroBatch:
        first = self._sent[stream]
        self._sent[stream] += len(pixels)
        frames = [
            DecodedFrame(stream, Position("frames", 0, first + i), one, self._now, 0.0) for i, one in enumerate(pixels)
        ]
        header = self.engine.resident(stream).header
        return MicroBatch(stream, frames, True, True, answer=answering(Policy(), header))

    def _step(self, batches: list[MicroBatch], served: Mapping[str, Served]) -> None:
        passed: Pass = self.engine.predict(batches)
        proposals = self.engine.adapt(passed)
        kept = []
        for prediction, proposal in zip(passed.adapting, proposals.proposals, strict=True):
            judgement = judge(self.engine, self.guard, prediction, proposals, proposal)
            own = served[prediction.batch.stream]
            own.answers += [top[0] for top in prediction.top_index]
            own.by_source += len(prediction.batch.frames) * (prediction.batch.answer == "source")
            own.decisions[judgement.ruling.decision] += 1
            if judgement.ruling.decision not in ("applied", "partial"):
                own.reasons["".join(c for c in judgement.ruling.reason if not c.isdigit())] += 1
            if judgement.kept is not None:
                kept.append(judgement.kept)
            prediction.resident.header = judgement.header
        self.engine.accept(proposals, kept)


def run_guard(
    folder: Path, report: Path, command: str, quick: bool, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure, write the report, and return it. Finished parts are kept in a file beside it: the same command continues
    from there, while bundle and commit are the same."""
    torch.set_num_threads(2)
    bundle = load_bundle(folder)
    journal = Journal(report.with_suffix(".jsonl"))
    prefix = f"{bundle.hash} {commit()} {other_images()} {'quick' if quick else 'full'}"
    work = _work(bundle, quick)
    content: dict[str, Any] = {}
    for name, measure in work.items():
        if journal.get(f"{prefix} {name}") is None:
            journal.add(f"{prefix} {name}", result=measure())
        done = {other: entry["result"] for other in work if (entry := journal.get(f"{prefix} {other}")) is not None}
        content = {
            "command": command,
            "commit": commit(),
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "bundle": bundle.hash,
            "wrong_camera": other_images(),
            "left": [other for other in work if other not in done],
            "bars": BARS,
            **_summary(done),
        }
        report.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        say(f"{name}: {json.dumps(done[name])[:400]}")
    return content


def _work(bundle: Bundle, quick: bool) -> dict[str, Callable[[], Any]]:
    """The measurements by name, the most important first."""
    work: dict[str, Callable[[], Any]] = {}
    seeds = range(1 if quick else SEEDS)
    settings: tuple[Setting, ...] = ("continual", "correlated", "healthy") if quick else SETTINGS
    for seed in seeds:
        work[f"attacks {seed}"] = partial(_attacks, bundle, quick, seed)
    for share in (GuardSettings().source_share, 2 * GuardSettings().source_share):
        work[f"cost {share}"] = partial(cost_share, bundle, 8 if quick else 30, share)
    for seed in seeds:
        for setting in settings:
            work[f"streams {setting} {seed}"] = partial(_streams, bundle, quick, setting, seed)
    return work


def _summary(done: dict[str, Any]) -> dict[str, Any]:
    runs = [result for name, result in done.items() if name.startswith("attacks")]
    attacks = {name: _over_seeds([run[name] for run in runs]) for name in (runs[0] if runs else ())}
    rows = [row for name, result in done.items() if name.startswith("streams") for row in result]
    gain = sum(r["guarded"] - r["source"] for r in rows)
    most = sum(r["unguarded"] - r["source"] for r in rows)
    return {
        "attacks": attacks,
        "collapses": sum(run["collapsed"] for one in attacks.values() for run in one["runs"]),
        "worst_probe_drop_points": max((one["probe_drop_points"] for one in attacks.values()), default=None),
        "worst_probe_drop_points_of_a_run": max(
            (run["probe_drop_points"] for one in attacks.values() for run in one["runs"]), default=None
        ),
        "streams": rows,
        "worst_below_source_points": round(max((r["source"] - r["guarded"] for r in rows), default=0), 2),
        "gain_kept": round(gain / most, 4) if most else None,
        "cost": {f"source_share {name[5:]}": result for name, result in done.items() if name.startswith("cost")},
    }


def _over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of the drops, the longest recovery, and every run."""
    recovered = [run["recovery_frames"] for run in runs]
    return {
        "frames": runs[0]["frames"],
        "collapsed": any(run["collapsed"] for run in runs),
        **{
            name: round(float(np.mean([run[name] for run in runs])), 2)
            for name in ("probe_drop_points", "healing_drop_points")
        },
        "recovery_frames": None if None in recovered else max(recovered),
        "runs": runs,
    }


def _answers(bundle: Bundle, pixels: np.ndarray, affine: Tensor | None = None) -> np.ndarray:
    """Labels of frames (N, h, w) by the source model, or by the norm affine (P,) given; (N,)."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(pixels), 500):
            frames = normalise_pixels(pixels[start : start + 500], bundle.manifest.preprocess)
            rows = None if affine is None else affine.expand(len(frames), -1)
            parts.append(bundle.model(frames, rows).argmax(1).numpy())
    return np.concatenate(parts)


def _attacks(bundle: Bundle, quick: bool, seed: int) -> dict[str, dict[str, Any]]:
    test = data.fashion_mnist("test")
    # Images for warm-up and probe are never part of an attack.
    pool, ordinary = test.part(0, 6_000), test.part(6_000, 10_000)
    reels, probes = {}, {}
    for number, (name, (attack, frames)) in enumerate(ATTACKS.items()):
        random = np.random.default_rng([seed, number])
        order = random.permutation(len(ordinary))
        frames = frames if not quick or name == "one_class" else frames // 2
        reels[name] = np.concatenate([ordinary.images[order[:WARM]], attack(pool, frames, random)])
        chosen = order[WARM : WARM + HEALING + PROBE]
        probes[name] = LabelledImages(ordinary.images[chosen], ordinary.labels[chosen])
    bench = Bench(bundle)
    under = bench.serve(reels)
    affine_left = {name: bench.engine.tensors(name)["affine"].clone() for name in probes}
    after = bench.serve({name: probe.images for name, probe in probes.items()})
    result = {}
    for name, probe in probes.items():
        right = np.array(after[name].answers) == probe.labels
        source = _answers(bundle, probe.images) == probe.labels
        finite = all(bool(torch.isfinite(t).all()) for t in bench.engine.tensors(name).values())
        result[name] = {
            "frames": len(reels[name]) - WARM,
            "collapsed": not finite or bool(right[HEALING:].mean() < COLLAPSED * source[HEALING:].mean()),
            "probe_accuracy": round(float(right[HEALING:].mean()), 4),
            "source_accuracy": round(float(source[HEALING:].mean()), 4),
            "probe_drop_points": _points(source[HEALING:], right[HEALING:]),
            "healing_drop_points": _points(source[:HEALING], right[:HEALING]),
            "recovery_frames": recovery(right, source),
            "parameters_left_drop_points": _points(
                source, _answers(bundle, probe.images, affine_left[name]) == probe.labels
            ),
            "answered_by_source": under[name].by_source + after[name].by_source,
            "decisions": dict(under[name].decisions),
            "reasons": dict(under[name].reasons.most_common(4)),
        }
    return result


def _points(source: np.ndarray, right: np.ndarray) -> float:
    return round(100 * float(source.mean() - right.mean()), 2)


def recovery(right: np.ndarray, source: np.ndarray) -> int | None:
    """The frame from which on no window is further below source than `RECOVERED`; None: there is none."""
    gap = np.convolve(source.astype(float) - right, np.full(WINDOW, 1 / WINDOW), "valid")
    behind = np.flatnonzero(gap > RECOVERED)
    first = 0 if not len(behind) else int(behind[-1]) + 1
    return first if first < len(gap) else None


def _streams(bundle: Bundle, quick: bool, setting: Setting, seed: int) -> list[dict[str, Any]]:
    """The accuracy benchmark's streams with the guard and without it, compared with source."""
    pool = Pool(data.fashion_mnist("test").part(0, 5_000), cache_folder() / "benchmark", None)
    frames = 64 if quick else 1_000
    streams = make_streams(setting, seed, list(TEST), pool.labels, frames, 512 if quick else 15_000)
    reels = {f"{setting}-{i}": _pixels(stream, pool) for i, stream in enumerate(streams)}
    with_guard = Bench(bundle).serve(reels)
    without = _unguarded(bundle, streams, pool)
    rows = []
    for i, (name, stream) in enumerate(zip(reels, streams, strict=True)):
        labels = pool.labels[stream.image]
        own = with_guard[name]
        rows.append(
            {
                "stream": name,
                "seed": seed,
                "shift": stream.conditions[0][0] if setting == "reset" else "",
                "frames": len(stream),
                "source": round(100 * float((_answers(bundle, reels[name]) == labels).mean()), 2),
                "guarded": round(100 * float((np.array(own.answers) == labels).mean()), 2),
                "unguarded": round(100 * float(without[i].mean()), 2),
                "answered_by_source": own.by_source,
                "decisions": dict(own.decisions),
                "reasons": dict(own.reasons.most_common(3)),
            }
        )
    return rows


def _pixels(stream: Stream, pool: Pool) -> np.ndarray:
    made = np.empty((len(stream), *pool.clean.images.shape[1:]), np.uint8)
    for code, condition in enumerate(stream.conditions):
        mine = stream.condition == code
        made[mine] = pool.images(*condition)[stream.image[mine]]
    return made


def _unguarded(bundle: Bundle, streams: list[Stream], pool: Pool) -> list[np.ndarray]:
    preprocess = bundle.manifest.preprocess
    needed = sorted({condition for stream in streams for condition in stream.conditions})
    frames = load_frames(pool, needed, torch.tensor(preprocess.mean), torch.tensor(preprocess.std))
    return run_streams(bundle.method, streams, frames, BATCH).right


def _accept_all(engine: Engine, batches: list[MicroBatch]) -> None:
    """A step in which every update is accepted."""
    proposals = engine.adapt(engine.predict(batches))
    for one in proposals.proposals:  # Positions are kept without a guard too.
        one.prediction.resident.header = next_header(one.prediction.resident.header, one.prediction, applied=True)
    engine.accept(proposals, proposals.proposals)


class _NoObserver:
    """An observer that does nothing: a step without proxies."""

    def observe(self, frames: Tensor, forward: Any, chosen: Tensor) -> tuple[list[Observed], None]:
        return [Observed(count, {}, 0, {}) for count in forward.counts.long().tolist()], None


def cost_share(bundle: Bundle, rounds: int, source_share: float) -> dict[str, float]:
    """How much longer a step of four streams x 16 frames takes with guard and proxies than without, as a share.

    Medians over rounds. In a round source answers every stream once; the two kinds of steps take turns. One thread, as
    in each of a worker's passes, and streams past their first frames, as most are.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with_guard, without = (Bench(bundle, GuardSettings(source_share=share)) for share in (source_share, 0))
    without.engine._observer = _NoObserver()  # type: ignore[assignment]
    pool = data.fashion_mnist("test").images
    names = ["a", "b", "c", "d"]
    for bench in (with_guard, without):
        bench.serve({name: pool[i * 320 : i * 320 + 320] for i, name in enumerate(names)})
    times: list[tuple[float, float]] = []
    served = {name: Served() for name in names}
    steps = round(1 / source_share)
    for number in range(steps * rounds):
        pixels = pool[4_000 + 64 * (number % 90) :][:64]
        frames = {name: pixels[16 * i : 16 * i + 16] for i, name in enumerate(names)}
        begin = time.perf_counter()
        with_guard._step([with_guard._batch(*one) for one in frames.items()], served)
        middle = time.perf_counter()
        _accept_all(without.engine, [without._batch(*one) for one in frames.items()])
        times.append((middle - begin, time.perf_counter() - middle))
    torch.set_num_threads(threads)
    ours, plain = np.median(np.array(times).reshape(rounds, steps, 2).mean(1), 0)
    return {"share": round(float(ours / plain - 1), 4), "seconds": float(ours), "seconds_without": float(plain)}
