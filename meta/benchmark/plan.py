"""The plan of a benchmark, a YAML file, and the cells that follow from it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from meta.baselines import BASELINES, Baseline
from meta.benchmark.datasets import DataConfig
from meta.benchmark.sources import ModelConfig
from meta.benchmark.streams import DRIFT, Setting
from meta.benchmark.user_code import code_digest, network_code, user_method
from meta.bundle_folder import MGG_NAME
from meta.mgg import GRADIENT_SHARE, MOST_FRAMES
from meta.yaml_file import read_yaml
from schemas.errors import ConfigError

Variant = Literal["published", "tuned"]
# Methods with a single variant: their records have no variant.
SINGLE = ("source", "oracle")
SOURCE_FILES = ("model.safetensors", "statistics.safetensors")


class GeneratorConfig(BaseModel):
    """A bundle whose generator is measured, as method `mgg` with this variant."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: str = Field(min_length=1)
    bundle: Path
    models: tuple[str, ...] = Field((), description="names of models, or data/model; empty: all")
    gradient_share: int = Field(GRADIENT_SHARE, ge=1, description="every n-th frame gives the gradient")
    memory: bool = Field(True, description="false: a control whose rule gets nothing from its gradient memory")


class RunConfig(BaseModel):
    """A block of cells: all combinations of the models, methods, batch sizes, settings and seeds named here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: tuple[str, ...] = Field((), description="names of models, or data/model; empty: all")
    methods: tuple[str, ...] = Field((), description="empty: all, and all generators")
    variants: tuple[Variant, ...] = ("published", "tuned")
    batches: tuple[PositiveInt, ...] = (16,)
    settings: tuple[Setting, ...] = DRIFT
    seeds: tuple[int, ...] = (0, 1, 2)


class BenchmarkConfig(BaseModel):
    """The plan. Equal plans give equal records, except that the setting `timed` depends on measured times."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threads: int = Field(2, ge=1)
    pool: int = Field(5_000, ge=10, description="test images that streams draw from")
    frames: int = Field(1_000, ge=1, description="frames per shift")
    long_frames: int = Field(50_000, ge=1, description="frames of the settings healthy and long")
    tuning_frames: int = Field(500, ge=1, description="frames per tuning shift for every option that is tried")
    data: dict[str, DataConfig]
    models: tuple[ModelConfig, ...]
    generators: tuple[GeneratorConfig, ...] = ()
    factories: tuple[str, ...] = Field(
        (),
        description="networks of yours that bundles may have: module:function, installed or in the current folder; a "
        "bundle can run no other code",
    )
    own_methods: dict[str, str] = Field(
        default_factory=dict,
        description="methods of yours, by name: module:Class, a subclass of meta.baselines.Baseline that is installed "
        "or lies in the current folder",
    )
    runs: tuple[RunConfig, ...]

    @model_validator(mode="after")
    def _names_fit(self) -> BenchmarkConfig:
        for model in self.models:
            if model.data not in self.data:
                raise ValueError(f"model {model.name!r} names data {model.data!r}, which is not in the data section")
        known = {model.name for model in self.models} | {f"{model.data}/{model.name}" for model in self.models}
        for entry in (*self.runs, *self.generators):
            if set(entry.models) - known:
                raise ValueError(f"unknown models {sorted(set(entry.models) - known)}; known: {sorted(known)}")
        if taken := set(self.own_methods) & {*BASELINES, MGG_NAME}:
            raise ValueError(f"own_methods: {sorted(taken)} are names of methods that are there already")
        methods = (MGG_NAME, *self.kinds)
        for run in self.runs:
            if unknown := set(run.methods) - set(methods):
                raise ValueError(f"unknown methods {sorted(unknown)}; known: {', '.join(methods)}")
        return self

    @cached_property
    def kinds(self) -> dict[str, type[Baseline]]:
        """All methods but the generators, by name. Raises ConfigError if one of the user's cannot be imported."""
        return BASELINES | {name: user_method(where) for name, where in self.own_methods.items()}

    def generator(self, cell: Cell) -> GeneratorConfig:
        """The generator that the cell measures."""
        model = next(m for m in self.models if (m.data, m.name) == (cell.data, cell.model))
        return next(g for g in self.generators if g.variant == cell.variant and _matches(g.models, model))

    def quick(self) -> BenchmarkConfig:
        """A small version of the plan to check that it runs: the first model, few frames, one seed, one batch size."""
        first = self.models[0]
        settings: tuple[Setting, ...] = ("continual", "timed", "reset", "mixed", "correlated", "healthy")
        run = RunConfig(models=(f"{first.data}/{first.name}",), settings=settings, seeds=(0,))
        most = tuple(name for name in (*self.kinds, MGG_NAME) if name != "cotta")
        slow: tuple[Variant, ...] = ("published",)
        runs = (
            run.model_copy(update={"methods": most}),
            run.model_copy(update={"methods": ("cotta",), "variants": slow}),
        )
        return self.model_copy(
            update={
                "pool": min(self.pool, 500),
                "frames": 40,
                "long_frames": 400,
                "tuning_frames": 40,
                "data": {first.data: self.data[first.data]},
                "models": (first,),
                "generators": tuple(g for g in self.generators if _matches(g.models, first)),
                "runs": runs,
            }
        )


@dataclass(frozen=True)
class Cell:
    """One method on one model with one batch size: all of its streams run side by side."""

    data: str
    model: str
    batch: int
    method: str
    variant: str
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    digest: str

    @property
    def name(self) -> str:
        """The name for people, as in progress reports and --only."""
        return f"{self.data}/{self.model}/b{self.batch}/{self.method}{'-' if self.variant else ''}{self.variant}"

    @property
    def key(self) -> str:
        """The name in the journal; it changes with everything that the cell's records depend on."""
        return f"{self.name}/{','.join(self.settings)}/{','.join(map(str, self.seeds))}/{self.digest}"


def read_benchmark(path: Path) -> BenchmarkConfig:
    """Raises ConfigError."""
    return read_yaml(path, BenchmarkConfig, "benchmark")


def cells_of(config: BenchmarkConfig, has_batch_norm: dict[tuple[str, str], bool]) -> list[Cell]:
    """The cells in the order in which they run, model by model. Keys of `has_batch_norm`: (data, model)."""
    cells: dict[Cell, None] = {}
    for model in config.models:
        for run in config.runs:
            if not _matches(run.models, model):
                continue
            for batch in run.batches:
                for method, variant, extra in _methods(config, run, model, batch, has_batch_norm):
                    digest = _digest(config, model, extra)
                    cell = Cell(model.data, model.name, batch, method, variant, run.settings, run.seeds, digest)
                    cells[cell] = None
    return list(cells)


def _methods(
    config: BenchmarkConfig,
    run: RunConfig,
    model: ModelConfig,
    batch: int,
    has_batch_norm: dict[tuple[str, str], bool],
) -> list[tuple[str, str, Any]]:
    """Tuples (method, variant, what else its results depend on)."""
    names = run.methods or (*config.kinds, MGG_NAME)
    found: list[tuple[str, str, Any]] = []
    for name in names:
        if name == MGG_NAME:
            fitting = [g for g in config.generators if _matches(g.models, model)]
            found += [(name, g.variant, _generator_digest(g, batch)) for g in fitting]
        elif name in SINGLE:
            found.append((name, "", None))
        elif name != "bn" or has_batch_norm[model.data, model.name]:
            kind = config.kinds[name]
            code = code_digest(kind) if name in config.own_methods else None
            tunable = bool(kind.grid(has_batch_norm[model.data, model.name]))
            found += [(name, variant, code) for variant in run.variants if tunable or variant != "tuned"]
    return found


def _generator_digest(generator: GeneratorConfig, batch: int) -> str:
    """A digest of what the benchmark runs with batches of this size. Calibration and limits are not part of it, so that
    a bundle can be calibrated again."""
    share, content = generator.gradient_share, _content(generator.bundle)
    if share > 1:
        content["gradient_share"] = share
    if not generator.memory:
        content["memory"] = False
    if batch > MOST_FRAMES and content["method"]["name"] == MGG_NAME:
        content["frames_an_update"] = MOST_FRAMES  # a word of the keys of committed records: it cannot change
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _source_content(bundle: Path, factories: tuple[str, ...]) -> dict[str, Any]:
    """What determines a bundle's source model: the folder may contain another one later. Raises ConfigError."""
    content = _content(bundle)
    made = {part: content[part] for part in ("model", "preprocess")}
    made["files"] = {name: content["files"].get(name) for name in SOURCE_FILES}
    if content["model"]["architecture"] in factories:
        made["code"] = network_code(content["model"]["architecture"])
    return made


def _content(bundle: Path) -> dict[str, Any]:
    """The parts of a manifest that results depend on. Raises ConfigError."""
    try:
        manifest = json.loads((bundle / "manifest.json").read_bytes())
        return {part: manifest[part] for part in ("model", "method", "preprocess", "files")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{bundle} is no bundle: {error}") from error


def _digest(config: BenchmarkConfig, model: ModelConfig, extra: Any) -> str:
    sizes = [config.pool, config.frames, config.long_frames, config.tuning_frames]
    content = [sizes, config.data[model.data].content(), model.content(), extra]
    if model.bundle is not None:
        content.append(_source_content(model.bundle, config.factories))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _matches(names: tuple[str, ...], model: ModelConfig) -> bool:
    return not names or model.name in names or f"{model.data}/{model.name}" in names
