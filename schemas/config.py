"""Everything that a worker can be told, as checked sections. `schemas.config_file` reads them."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from schemas.frame import MAX_STREAM_BYTES
from schemas.policy import AskedChange, Policy

ENVIRONMENT_PREFIX = "DRIFTKEEL__"
STORE_SCHEMES = (
    *("redis", "rediss", "unix"),
    *("redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel"),
)


class Section(BaseModel):
    """A part of the configuration; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# What Kafka takes: others would be waited for, as topics that are still to come.
TopicName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,249}$")]


class Topics(Section):
    """Topic names."""

    frames: TopicName = Field("frames", description="frames in; key = stream id, value = image bytes")
    predictions: TopicName = Field("predictions", description="one prediction per frame out")
    updates: TopicName = Field("updates", description="one update event per guard decision out")
    commands: TopicName = Field("commands", description="commands in; key = stream id or *")
    dead_letters: TopicName = Field("frames.dlq", description="records that could not become frames, with the reason")

    @model_validator(mode="after")
    def _each_its_own(self) -> Topics:
        names = list(self.model_dump().values())
        if len(set(names)) < len(names):  # Dead letters among the frames would be dead letters again, without end.
            raise ValueError(f"two of these are the same: {', '.join(names)}")
        return self


class Kafka(Section):
    """The broker, and how the worker consumes from it."""

    bootstrap: str = Field("127.0.0.1:9092", description="host:port, several separated by commas")
    group: str = Field("driftkeel", min_length=1, description="consumer group; all workers of one site share it")
    topics: Topics = Topics()
    session_timeout_ms: int = Field(10_000, ge=1_000, description="a worker silent for so long loses its partitions")
    heartbeat_interval_ms: int = Field(1_000, ge=100)
    fetch_max_wait_ms: int = Field(50, ge=1, description="how long the broker may hold a fetch that has no data")
    max_poll_records: int = Field(500, ge=1, description="frames taken over from the client at a time")
    compression: Literal["none", "lz4", "zstd", "gzip", "snappy"] = Field(
        "none", description="of what the worker sends; all who read its topics must know it"
    )
    assignment: Literal["range", "cooperative-sticky"] = Field(
        "range", description="cooperative-sticky moves only the partitions that must move, once all workers have it"
    )
    static_member: str | None = Field(
        None, description="group.instance.id, one per worker: a quick restart keeps its partitions; see docs"
    )
    offset_reset: Literal["earliest", "latest"] = Field(
        "earliest", description="where a group begins that has no committed offset"
    )
    connect_timeout_s: float = Field(
        30, gt=0, description="give up starting when the broker stays away, or lacks topics, for so long"
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    sasl_username: str | None = None
    sasl_password: SecretStr | None = None
    ssl_cafile: str | None = Field(None, description="CA certificates; the system's where not set")
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None

    @field_validator("bootstrap")
    @classmethod
    def _hosts_and_ports(cls, bootstrap: str) -> str:
        for address in bootstrap.split(","):
            _, colon, port = address.rpartition(":")
            if not address.strip() or (colon and not (port.isdecimal() and int(port) < 1 << 16)):
                raise ValueError(f"{address!r} is no host:port")
        return bootstrap

    @model_validator(mode="after")
    def _heartbeats_fit(self) -> Kafka:
        if self.heartbeat_interval_ms * 3 > self.session_timeout_ms:
            raise ValueError("heartbeat_interval_ms must be at most a third of session_timeout_ms")
        return self


class Store(Section):
    """The Redis-protocol store of stream states."""

    url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="redis://, rediss:// (TLS), unix://, redis+cluster:// or redis+sentinel:// URL",
    )
    sentinel_username: str | None = Field(None, description="where Sentinels ask for one; the URL's is the servers'")
    sentinel_password: SecretStr | None = Field(None, description="likewise")
    prefix: str = Field("driftkeel", pattern=r"^[\w.:-]+$", description="first part of every key")
    ssl_cafile: str | None = Field(None, description="CA certificates for TLS; the system's where not set")
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    connect_timeout_s: float = Field(30, gt=0, description="give up starting when the store stays away for so long")
    compression: Literal["none", "deflate"] = Field(
        "deflate", description="of stored tensors, without loss; none where states are large and the network is fast"
    )
    write_interval_ms: int = Field(
        0,
        ge=0,
        le=60_000,
        description="a stream's state is written so often; what a crash costs is read and predicted again. "
        "0: after every step that was to make an update, and within a second where none was",
    )
    max_streams: int = Field(
        10_000, ge=1, description="states in the store at most; frames of further new streams become dead letters"
    )
    max_state_bytes: int = Field(64 << 20, ge=1_024, description="a stored state larger than this is refused")
    idle_ttl_s: int = Field(
        0, ge=0, description="states of streams idle for so long expire, and restart from source; 0 keeps them"
    )
    snapshot_every: int = Field(100, ge=0, description="updates between two snapshots for rollback; 0 takes none")
    snapshots: int = Field(5, ge=1, le=100, description="snapshots kept per stream")

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, url: SecretStr) -> SecretStr:
        scheme = urlsplit(url.get_secret_value()).scheme
        if scheme not in STORE_SCHEMES:
            raise ValueError(f"scheme {scheme!r} is not one of {', '.join(STORE_SCHEMES)}")
        return url

    @property
    def address(self) -> str:
        """The URL without its secrets, for messages."""
        return mask_url(self.url.get_secret_value())


class Frames(Section):
    """Limits on bytes from outside, checked before and while decoding."""

    max_bytes: int = Field(8 << 20, ge=1, description="largest record value")
    max_side: int = Field(8_192, ge=1, description="largest width or height in pixels")
    max_pixels: int = Field(24_000_000, ge=1, description="largest width x height")
    max_stream_id_bytes: int = Field(200, ge=1, le=MAX_STREAM_BYTES)
    decode_threads: int = Field(
        2, ge=1, le=64, description="small pictures that are decoded at a time, and as many large ones beside them"
    )


class Batch(Section):
    """Micro-batches: latency (`max_batch`, `max_wait_ms`) and updates (`min_adapt`) are separate knobs."""

    max_batch: int = Field(
        16,
        ge=1,
        le=1_024,
        description="frames of one stream that close its micro-batch; mgg takes 16 at most, or min_adapt",
    )
    max_wait_ms: int = Field(100, ge=0, description="longest wait of a frame for its micro-batch to fill")
    min_adapt: int = Field(4, ge=1, description="fewer frames are predicted now and adapted on with later ones")
    max_hold_ms: int = Field(
        10_000, ge=0, description="frames held for min_adapt longer than this count without an update"
    )
    max_pass: int = Field(128, ge=1, description="frames of all streams in one pass; each thread runs its own")
    max_buffered: int = Field(16_384, ge=1, description="frames in memory before partitions are paused")
    max_buffered_bytes: int = Field(
        256 << 20, ge=1 << 20, description="the same for their pixels in the model's size; two passes have room anyway"
    )
    latency_budget_ms: int = Field(
        0,
        ge=0,
        description="from a record's timestamp to its prediction; frames that have used half of it are only predicted, "
        "and teach nothing, and those midway between max_wait_ms and that make no update; 0: every frame is adapted "
        "on, however late",
    )
    drop_late: bool = Field(
        False,
        description="frames whose prediction would miss latency_budget_ms get none: for who must keep up with live "
        "cameras rather than answer every frame",
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Batch:
        if self.min_adapt > self.max_batch:
            raise ValueError("min_adapt must not be larger than max_batch")
        if self.max_batch > self.max_pass:
            raise ValueError("max_batch must not be larger than max_pass")
        if self.drop_late and not self.latency_budget_ms:
            raise ValueError("drop_late needs a latency_budget_ms, which says what is late")
        if self.drop_late and 2 * self.max_wait_ms >= self.latency_budget_ms:
            raise ValueError("drop_late needs a max_wait_ms below half of latency_budget_ms")
        return self


Method = Literal[
    "mgg", "source", "bn", "tent", "eata", "sar", "deyo", "cotta", "rotta", "roid", "lame", "neo", "sgd", "adam"
]


class Adapt(Section):
    """What the worker does with its streams."""

    enabled: bool = Field(True, description="false: predict with the parameters as they are, never update")
    method: Method = Field(
        "mgg",
        description="the bundle's generator, or a published baseline to compare it with, whose accuracy is not "
        "estimated, so that the guard goes by its disagreement with source alone; eata is ETA: its Fisher anchor needs "
        "source frames, and a bundle has none",
    )
    mode: Literal["always", "on_demand"] = Field(
        "always", description="on_demand: only while drift detection says that the stream has moved and not settled"
    )
    step_scale: float = Field(1.0, ge=0, le=10, description="multiplies the method's step size")
    max_resident_streams: int = Field(
        4_096, ge=1, description="states in memory of streams without frames in hand; others are loaded when needed"
    )
    max_resident_bytes: int = Field(
        1 << 30, ge=1, description="and the bytes of their tensors; streams with frames in hand stay, however many"
    )


class Guard(Section):
    """What the guard lets pass; factors are of what the bundle saw in calibration."""

    source_share: float = Field(
        0.0625,
        ge=0,
        le=1,
        description="micro-batches that source answers too; besides, all of new and doubtful streams",
    )
    max_gradient_factor: float = Field(
        4.0, gt=0, description="raw gradient norms above factor x bundle limit are skipped"
    )
    max_distance_factor: float = Field(
        2.0, gt=0, description="updates that lead further from source are skipped; beyond, those that lead back pass"
    )
    max_jump: float = Field(
        8.0, gt=0, description="deviations above the stream's own level at which an update is shrunk to that limit"
    )
    min_entropy: float = Field(
        0.02, ge=0, lt=1, description="of ln(classes): answers surer than this, where source disagrees, are a collapse"
    )
    min_marginal_entropy: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="of ln(classes): answers more one-sided than this, where source disagrees, are one",
    )
    max_repeats: float = Field(
        0.5, ge=0, le=1, description="share of repeated or blank frames above which none teaches"
    )
    max_alike: int = Field(256, ge=1, description="frames in a row of one class, after which more of them do not teach")
    false_alarm: float = Field(
        1e-4, gt=0, lt=1, description="most alarms per micro-batch of a stream that has not moved; see docs"
    )
    never_worse: bool = Field(True, description="let source answer where it is estimated to do better")


class Bundle(Section):
    """Which bundle the worker runs."""

    path: Path = Field(Path("bundles/fashion-mnist"), description="folder with manifest.json")
    factories: tuple[str, ...] = Field((), description="'module:function' names that a bundle may ask for")
    code: Path | None = Field(None, description="folder from which factories are imported, after what is installed")
    on_change: Literal["reset", "carry", "shadow"] = Field(
        "reset",
        description="streams of another bundle start from source (reset); keep their parameters where `previous` has "
        "the same model (carry); or do so where they can, and source answers first (shadow)",
    )
    previous: tuple[Path, ...] = Field((), description="folders of the bundles that streams may be carried over from")
    shadow_frames: int = Field(256, ge=1, description="frames of a stream that source answers after a change in shadow")

    @model_validator(mode="after")
    def _somewhere_to_carry_from(self) -> Bundle:
        if self.on_change == "carry" and not self.previous:
            raise ValueError("on_change: carry needs the folders of earlier bundles in previous")
        return self


class Metrics(Section):
    """The HTTP port for Prometheus."""

    host: str = Field("127.0.0.1", description="address to bind; 0.0.0.0 in a container")
    port: int = Field(9_464, ge=0, le=65_535, description="0 takes a free port and logs it")
    max_stream_labels: int = Field(
        50, ge=0, description="streams with series of their own; the rest count in the fleet's series only"
    )
    silent_after_s: float = Field(600, gt=0, description="a stream without a frame for so long counts as silent")


class Console(Section):
    """The local web page, `driftkeel console`."""

    host: str = Field("127.0.0.1", description="address to bind; any but loopback needs a token")
    port: int = Field(8_464, ge=0, le=65_535, description="0 takes a free port and prints it")
    token: SecretStr | None = Field(None, min_length=16, description="asked for before anything is shown or done")
    hosts: tuple[str, ...] = Field((), description="names that browsers reach it by, beside localhost and addresses")
    workers: tuple[str, ...] = Field((), description="URLs of workers' /metrics; none: that of this configuration")
    max_streams: int = Field(2_000, ge=1, le=20_000, description="streams in memory; the longest silent makes room")

    @field_validator("workers")
    @classmethod
    def _urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if urlsplit(url).scheme not in {"http", "https"}:
                raise ValueError(f"{url!r} is no http:// or https:// URL")
        return urls


class Log(Section):
    """Logging to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text"] = Field("auto", description="auto: text on a terminal, JSON elsewhere")


class Traces(Section):
    """OpenTelemetry spans of steps; needs the extra `otel`."""

    endpoint: str | None = Field(
        None, pattern=r"^https?://", description="OTLP over HTTP, such as http://collector:4318/v1/traces; null: none"
    )
    sample_ratio: float = Field(1.0, ge=0, le=1, description="share of steps that are traced")


class WorkerConfig(BaseSettings):
    """Everything that a worker can be told."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__", case_sensitive=False
    )

    worker: str = Field(
        default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}", min_length=1, description="name in records"
    )
    threads: int = Field(
        0,
        ge=0,
        le=256,
        description="passes at the same time, a thread each; 1: short ones in the loop's own; 0: two, where torch has "
        "as many",
    )
    device: str = Field(
        "cpu",
        pattern=r"^(cpu|cuda(:[0-9]{1,3})?)$",
        description="where passes are computed: cpu, cuda or cuda:N; experimental but for cpu, see docs/deploy.md",
    )
    kafka: Kafka = Kafka()
    store: Store = Store()
    frames: Frames = Frames()
    batch: Batch = Batch()
    bundle: Bundle = Bundle()
    adapt: Adapt = Adapt()
    guard: Guard = Guard()
    policy: Policy = Field(Policy(), description="of every stream, but for what `streams` and commands change")
    streams: dict[str, AskedChange] = Field(default_factory=dict, description="policies of single streams")
    metrics: Metrics = Metrics()
    console: Console = Console()
    log: Log = Log()
    traces: Traces = Traces()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment goes before the file, whose content arrives as init settings."""
        return env_settings, init_settings


def mask_url(url: str) -> str:
    """A URL with its passwords replaced by stars: before the last @, whatever is in them, and after a question mark."""
    url = re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url)
    return re.sub(r"(?i)([?&][^=&]*password=)[^&]*", r"\1***", url)
