"""The accuracy benchmark: runs the cells of a plan, resumably, and writes the report."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meta.baselines import BASELINES, configured
from meta.baselines.base import Options
from meta.baselines.own import Oracle
from meta.benchmark.controls import without_memory
from meta.benchmark.corruptions import TEST, TUNING
from meta.benchmark.datasets import Pool, open_dataset
from meta.benchmark.plan import MGG_NAME, BenchmarkConfig, Cell, cells_of
from meta.benchmark.report import Journal, Record, commit, records_of, write_report
from meta.benchmark.run import Frames, load_frames, relative_cost, run_streams, source_hits
from meta.benchmark.sources import SourceModel, open_source
from meta.benchmark.streams import Setting, Stream, make_streams
from meta.benchmark.user_code import check_streams_apart
from meta.bundle import load_bundle
from meta.data import cache_folder
from meta.imports import import_from
from meta.method import Method
from meta.mgg import MGG
from meta.models import build_network
from meta.stream_norm import BATCH_NORM
from schemas.errors import ConfigError

TUNING_SETTINGS: tuple[Setting, ...] = ("continual", "correlated", "reset")


@dataclass
class Progress:
    """Callbacks for progress: a line of text; a cell that begins, with its planned frames; finished frames."""

    say: Callable[[str], None] = print
    begin: Callable[[str, int, int, int], object] = lambda name, done, cells, frames: None
    advance: Callable[[int], object] = lambda frames: None


def run_accuracy(
    config: BenchmarkConfig,
    report: Path,
    command: str,
    progress: Progress,
    only: str = "",
    stop_after_s: float = math.inf,
) -> int:
    """Run the cells that are in neither the report nor its journal, then write the report with all finished cells.

    only: run the cells whose name contains this. stop_after_s: begin no cell later, except the first. Returns the
    number of cells that remain. Raises ConfigError.
    """
    started = time.monotonic()
    torch.set_num_threads(config.threads)
    if config.factories:
        import_from(Path.cwd())
    journal = Journal.beside(report)
    planned = cells_of(config, batch_norms(config))
    if not planned:
        raise ConfigError("the plan has no cells: none of its methods can be run on its models in these variants")
    cells = [cell for cell in planned if only in cell.name]
    if not cells:
        raise ConfigError(
            f"--only {only}: none of the plan's {len(planned)} cells, such as {planned[0].name}, has that in its name"
        )
    ran = 0
    for model in config.models:
        own = [cell for cell in cells if (cell.data, cell.model) == (model.data, model.name)]
        missing = [cell for cell in own if journal.get(cell.key) is None]
        if not missing or (ran > 0 and time.monotonic() - started > stop_after_s):
            continue
        bench = _Bench.open(config, model.name, model.data, own, progress)
        journal.add(_model_key(own[0]), data=model.data, model=model.name, clean_accuracy=bench.source.clean_accuracy)
        for cell in missing:
            if ran == 0 or time.monotonic() - started < stop_after_s:
                bench.run(cell, journal, sum(journal.get(c.key) is not None for c in cells), len(cells))
                ran += 1
    models = [journal.get(key) for key in dict.fromkeys(map(_model_key, planned))]
    keys = [cell.key for cell in planned]
    write_report(report, journal, keys, command, config.model_dump(mode="json"), [m for m in models if m])
    return sum(journal.get(cell.key) is None for cell in cells)


def _model_key(cell: Cell) -> str:
    return f"model/{cell.data}/{cell.model}/{cell.digest}"


def batch_norms(config: BenchmarkConfig) -> dict[tuple[str, str], bool]:
    """Whether each model, by (data, model), has BatchNorm layers; models without a bundle are only built."""
    found = {}
    for model in config.models:
        if model.bundle is not None:
            network: torch.nn.Module = load_bundle(model.bundle, config.factories).model.network
            found[model.data, model.name] = any(
                isinstance(getattr(m, "norm", None), BATCH_NORM) for m in network.modules()
            )
        else:
            network = build_network(model.architecture, model.arguments)
            found[model.data, model.name] = any(isinstance(m, BATCH_NORM) for m in network.modules())
    return found


@dataclass
class _Bench:
    """A source model with its data, which runs cells."""

    config: BenchmarkConfig
    source: SourceModel
    pool: Pool
    tuning_pool: Pool
    frames: Frames
    hits: np.ndarray
    progress: Progress
    tuning: tuple[list[Stream], Frames] | None = None

    @classmethod
    def open(cls, config: BenchmarkConfig, name: str, data: str, cells: list[Cell], progress: Progress) -> _Bench:
        model = next(m for m in config.models if (m.data, m.name) == (data, name))
        dataset = open_dataset(data, config.data[data])
        cache = cache_folder() / "benchmark"
        source = open_source(model, dataset, cache, progress.say, config.factories)
        progress.say(
            f"{data}/{name}: {source.clean_accuracy:.3f} on clean test images, "
            f"{source.setup.model.coordinates} coordinates"
        )
        pool = Pool(dataset.test().part(0, config.pool), cache, dataset.ready)
        tuning_pool = Pool(source.tuning.part(0, 4 * config.tuning_frames), cache, None)
        settings = {setting for cell in cells for setting in cell.settings}
        seeds = {seed for cell in cells for seed in cell.seeds}
        streams = [s for setting in settings for seed in seeds for s in _streams(config, setting, seed, pool)]
        setup = source.setup
        needed = sorted({condition for stream in streams for condition in stream.conditions})
        frames = load_frames(pool, needed, setup.mean, setup.std)
        return cls(config, source, pool, tuning_pool, frames, source_hits(setup.model, frames, streams), progress)

    def run(self, cell: Cell, journal: Journal, done: int, cells: int) -> None:
        """Run a cell and add it to the journal."""
        self._check(cell)
        chosen, tried = self._options(cell, journal)
        streams = [
            stream
            for setting in cell.settings
            for seed in cell.seeds
            for stream in _streams(self.config, setting, seed, self.pool)
        ]
        frames = sum(map(len, streams))
        self.progress.begin(cell.name, done, cells, frames * len(chosen))
        begin = time.perf_counter()
        attempts = [self._attempt(cell, options, streams) for options in chosen]
        best, records = _best_by_setting(attempts, cell.settings)
        seconds, refused = time.perf_counter() - begin, sum(attempt.refused for attempt in attempts)
        journal.add(
            cell.key,
            name=cell.name,
            commit=commit(),
            options=best,
            tried=tried,
            relative_cost=round(attempts[0].cost, 2),
            adapt_every=attempts[0].adapt_every,
            refused_updates=refused,
            frames=frames,
            seconds=round(seconds, 1),
            records=records,
        )
        ours, theirs = (float(np.mean([r[k] for r in records])) for k in ("accuracy", "source_accuracy"))
        cost, lost = attempts[0].cost, f", {refused} updates refused as not finite" if refused else ""
        self.progress.say(f"{cell.name}: {ours:.3f} (source {theirs:.3f}), cost {cost:.1f}, {seconds:.0f} s{lost}")

    def _check(self, cell: Cell) -> None:
        """Check that a user's method keeps streams apart. Raises ConfigError if it does not."""
        frames = self.source.setup.source_frames
        if cell.method not in self.config.own_methods or frames is None:
            return
        if not check_streams_apart(cell.method, configured(self.config.kinds[cell.method], self.source.setup), frames):
            self.progress.say(
                f"{cell.name}: the same frames give something else each time, so nothing shows whether its streams "
                "stay apart; draw with meta.baselines.base.uniforms, and keep what it remembers in the state"
            )

    def _attempt(self, cell: Cell, options: Options, streams: list[Stream]) -> _Attempt:
        """Run a cell with one set of options: `timed` streams with skipped updates, the others without."""
        method = self._method(cell, options)
        cost = relative_cost(method, self.source.setup.model, *self._example(cell.batch))
        # 0.1 is for noise: a method as fast as the source model must not miss batches.
        adapt_every = max(1, math.ceil(cost - 0.1))
        ordered, right, refused = [], [], 0
        for every in dict.fromkeys((1, adapt_every)):
            group = [s for s in streams if (adapt_every if s.setting == "timed" else 1) == every]
            if group:
                outcome = run_streams(method, group, self.frames, cell.batch, every, self.progress.advance)
                ordered, right, refused = ordered + group, right + outcome.right, refused + outcome.refused
        source = [self.hits[self.frames.codes(stream), stream.image] for stream in ordered]
        records = records_of(cell, ordered, right, source)
        return _Attempt(options, records, cost, adapt_every, refused)

    def _example(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = np.arange(batch) % len(self.pool)
        frames = self.frames.batch(np.zeros(batch, int), images)
        return frames, torch.from_numpy(self.pool.labels[images])

    def _method(self, cell: Cell, options: Options) -> Method:
        if cell.method == MGG_NAME:
            generator = self.config.generator(cell)
            method = self.source.generator(load_bundle(generator.bundle, self.config.factories))
            if not generator.memory:
                method = without_memory(method)
            # PaperMGG takes its gradient from all frames.
            return method.with_gradient_share(generator.gradient_share) if isinstance(method, MGG) else method
        return configured(self.config.kinds[cell.method], self.source.setup, **options)

    def _options(self, cell: Cell, journal: Journal) -> tuple[list[Options], list[dict[str, Any]]]:
        """The sets of options to run a cell with, and the results of tuning.

        Published: no options. Tuned: those with the best accuracy on the tuning shifts. The oracle runs with all of its
        options, and the best count in each setting, since it is an upper bound and not a competitor.
        """
        batch_norm = self.source.setup.model.batch_channels > 0
        if cell.method == Oracle.name:
            return Oracle.grid(batch_norm), []
        if cell.variant != "tuned" or cell.method == MGG_NAME:
            return [{}], []
        grid = self.config.kinds[cell.method].grid(batch_norm)
        tries = zlib.crc32(repr(grid).encode())
        key = f"tuning/{cell.data}/{cell.model}/b{cell.batch}/{cell.method}/{cell.digest}/{tries:08x}"
        entry = journal.get(key)
        if entry is None:
            # A user's method may not read its step size from the state, so streams cannot differ in it.
            groups = _differing_in_step(grid) if cell.method in BASELINES else [[options] for options in grid]
            tried = [one for group in groups for one in self._tried(cell, group)]
            best = max(tried, key=lambda one: one["accuracy"])
            entry = journal.add(key, options=best["options"], tried=tried)
        return [entry["options"]], entry["tried"]

    def _tried(self, cell: Cell, group: list[Options]) -> list[dict[str, Any]]:
        """The mean accuracy of each set of options on the tuning streams, whose images and shifts are not in the test.

        Sets in a group differ only in the step size, and run in the same passes.
        """
        streams, frames = self._tuning()
        method = configured(self.config.kinds[cell.method], self.source.setup, **group[0])
        sizes = [options["step_size"] for options in group for _ in streams] if len(group) > 1 else None
        many = [stream for _ in group for stream in streams]
        self.progress.begin(f"tuning {cell.name}", 0, 0, sum(map(len, many)))
        right = run_streams(method, many, frames, cell.batch, 1, self.progress.advance, sizes).right
        scores = [np.concatenate(right[i : i + len(streams)]).mean() for i in range(0, len(many), len(streams))]
        return [
            {"options": options, "accuracy": round(float(score), 5)}
            for options, score in zip(group, scores, strict=True)
        ]

    def _tuning(self) -> tuple[list[Stream], Frames]:
        if self.tuning is None:
            size, labels = self.config.tuning_frames, self.tuning_pool.labels
            streams = [
                stream
                for setting in TUNING_SETTINGS
                for stream in make_streams(setting, 0, list(TUNING), labels, size, size)
            ]
            conditions = sorted({condition for stream in streams for condition in stream.conditions})
            setup = self.source.setup
            self.tuning = streams, load_frames(self.tuning_pool, conditions, setup.mean, setup.std)
        return self.tuning


def _differing_in_step(grid: list[Options]) -> list[list[Options]]:
    """The grid in groups of options that differ only in the step size."""
    groups: dict[str, list[Options]] = {}
    for options in grid:
        others = {name: value for name, value in options.items() if name != "step_size"}
        groups.setdefault(repr(sorted(others.items())), []).append(options)
    return list(groups.values())


@dataclass(frozen=True)
class _Attempt:
    """A cell's results with one set of options; `refused`: updates that were not finite."""

    options: Options
    records: list[Record]
    cost: float
    adapt_every: int
    refused: int


def _best_by_setting(
    attempts: list[_Attempt], settings: tuple[Setting, ...]
) -> tuple[Options | dict[str, Options], list[Record]]:
    """The options and the records of the best attempt in each setting; options are by setting if there are several."""
    if len(attempts) == 1:
        return attempts[0].options, attempts[0].records
    best: dict[str, Options] = {}
    records: list[Record] = []
    for setting in settings:
        of_setting = [[r for r in attempt.records if r["setting"] == setting] for attempt in attempts]
        means = [float(np.mean([r["accuracy"] for r in rows])) for rows in of_setting]
        winner = int(np.argmax(means))
        best[setting] = attempts[winner].options
        records += of_setting[winner]
    return best, records


def _streams(config: BenchmarkConfig, setting: Setting, seed: int, pool: Pool) -> list[Stream]:
    return make_streams(setting, seed, list(TEST), pool.labels, config.frames, config.long_frames)
