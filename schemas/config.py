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
KAFKA_PORT = 9092
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
    """Names of the five topics, which must differ. Workers do not create topics."""

    frames: TopicName = Field(
        "frames",
        description="Input: camera frames. The key is the stream id, the value one JPEG, PNG or WebP.",
    )
    predictions: TopicName = Field("predictions", description="Output: one prediction for each frame.")
    updates: TopicName = Field(
        "updates",
        description="Output: one update event for each decision of the guard or of a person. This is the audit trail.",
    )
    commands: TopicName = Field(
        "commands",
        description="Input: commands from people. The key is a stream id, or `*` for all streams. Without this topic "
        "workers run, but take no commands.",
    )
    dead_letters: TopicName = Field(
        "frames.dlq", description="Output: records that are not valid frames, with the reason in a header."
    )

    @model_validator(mode="after")
    def _each_its_own(self) -> Topics:
        names = list(self.model_dump().values())
        if len(set(names)) < len(names):  # Dead letters among the frames would be dead letters again, without end.
            raise ValueError(f"two of these are the same: {', '.join(names)}")
        return self


_HOST_AND_PORT = re.compile(r"(?:\w+://)?(?:\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[^\s:/\[\];]+)(?::([0-9]{1,5}))?")


def _with_port(address: str) -> str:
    """The address of a broker with its port, Kafka's usual one if it names none. Raises ValueError."""
    found = _HOST_AND_PORT.fullmatch(address)
    if found is None or not 0 < int(found[1] or KAFKA_PORT) < 1 << 16:
        raise ValueError(f"{address!r} is no host:port, such as kafka-1:9092 or [::1]:9092; commas separate several")
    return address if found[1] else f"{address}:{KAFKA_PORT}"


class Kafka(Section):
    """The broker, and how the worker reads from it."""

    bootstrap: str = Field(
        "127.0.0.1:9092",
        description="Addresses of one or more brokers, `host:port`, separated by commas; IPv6 as `[::1]:9092`. Without "
        "a port it is 9092. They are needed only for the first contact; the brokers then announce all others.",
    )
    group: str = Field(
        "driftkeel",
        min_length=1,
        description="Consumer group. Kafka divides the frames topic among its members, so give all workers of a site "
        "the same group. A second group reads all frames again; it needs a `store.prefix` of its own.",
    )
    topics: Topics = Topics()
    session_timeout_ms: int = Field(
        10_000,
        ge=1_000,
        description="Milliseconds without a heartbeat after which the broker gives a worker's partitions to others. "
        "Lower: the frames of a dead worker wait less. Too low: a worker that is only slow loses its partitions, and "
        "frames are read again. Raise it if the log says `lost the consumer group`. Brokers set bounds of their own, "
        "usually 6 s and 30 min.",
    )
    heartbeat_interval_ms: int = Field(
        1_000,
        ge=100,
        description="Milliseconds between two heartbeats to the broker. At most a third of `session_timeout_ms`, so "
        "that a single lost heartbeat costs nothing.",
    )
    fetch_max_wait_ms: int = Field(
        50,
        ge=1,
        description="Milliseconds that the broker may wait for new records before it answers a fetch. Low keeps "
        "predictions quick. Raise it to several hundred for slow cameras: an idle worker then takes less processor "
        "time, and predictions come later by up to as much.",
    )
    max_poll_records: int = Field(
        500,
        ge=1,
        description="Most records that the worker takes from its Kafka client at a time. Seldom needs a change: "
        "`batch.max_buffered` limits memory.",
    )
    compression: Literal["none", "lz4", "zstd", "gzip", "snappy"] = Field(
        "none",
        description="Compression of the records that the worker sends. The default is `none` because every reader of "
        "its topics must understand the others. `lz4` makes predictions three to five times smaller, and update events "
        "two to three times.",
    )
    assignment: Literal["range", "cooperative-sticky"] = Field(
        "range",
        description="How partitions are shared out again when a worker comes or goes. `range`: all workers give up all "
        "partitions for a moment. `cooperative-sticky`: only the partitions that have to move pause. May be changed "
        "one worker at a time.",
    )
    static_member: str | None = Field(
        None,
        description="Kafka's `group.instance.id`. A worker with such a name keeps its partitions if it returns within "
        "`session_timeout_ms`; until then nobody reads them. Each worker needs a name of its own: of two with one "
        "name, the first one ends. null: a worker that stops gives its partitions to the others at once.",
    )
    offset_reset: Literal["earliest", "latest"] = Field(
        "earliest",
        description="Where to start in a partition for which the group has no committed offset, or one that the topic "
        "no longer has. `earliest`: with the oldest frame, so that none is missed. `latest`: with new frames only; all "
        "earlier ones are skipped.",
    )
    connect_timeout_s: float = Field(
        30,
        gt=0,
        description="Seconds that a starting worker waits for the broker and for missing topics. Then it exits with "
        "code 1 and a line that says why. A worker that has started waits without limit.",
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT",
        description="`SSL` encrypts, `SASL_PLAINTEXT` logs in, `SASL_SSL` does both. Must be what the broker's "
        "listener on that port expects.",
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = Field(
        None, description="How to log in. Needed with the two `SASL` protocols, as are user name and password."
    )
    sasl_username: str | None = Field(None, description="User name for the login.")
    sasl_password: SecretStr | None = Field(
        None,
        description="Password for the login. Better set as `DRIFTKEEL__KAFKA__SASL_PASSWORD` than in a file.",
    )
    ssl_cafile: str | None = Field(
        None,
        description="File of CA certificates (PEM) to check the broker's certificate against. null: the system's.",
    )
    ssl_certfile: str | None = Field(
        None, description="File of the worker's own certificate (PEM), if brokers ask clients for one."
    )
    ssl_keyfile: str | None = Field(
        None, description="File of the private key for `ssl_certfile`. null: the key is in that file too."
    )

    @field_validator("bootstrap")
    @classmethod
    def _hosts_and_ports(cls, bootstrap: str) -> str:
        return ",".join(_with_port(address.strip()) for address in bootstrap.split(","))

    @model_validator(mode="after")
    def _heartbeats_fit(self) -> Kafka:
        if self.heartbeat_interval_ms * 3 > self.session_timeout_ms:
            raise ValueError("heartbeat_interval_ms must be at most a third of session_timeout_ms")
        return self


class Store(Section):
    """The store of stream states: Redis or Valkey."""

    url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="Address of the store, with user and password if it asks for them: "
        "`redis://user:password@host:6379/0`, `rediss://` (TLS), `unix://`, `redis+cluster://host:port,host:port` or "
        "`redis+sentinel://host:port,host:port/service/0`. If it has a password, better set as `DRIFTKEEL__STORE__URL` "
        "than in a file. Another server or database has no states: every stream then starts from source.",
    )
    sentinel_username: str | None = Field(
        None,
        description="User name, if the Sentinels themselves ask for a login. The one in `url` is for the servers "
        "behind them.",
    )
    sentinel_password: SecretStr | None = Field(
        None,
        description="Password, if the Sentinels themselves ask for one. Better set as "
        "`DRIFTKEEL__STORE__SENTINEL_PASSWORD` than in a file.",
    )
    prefix: str = Field(
        "driftkeel",
        pattern=r"^[\w.:-]+$",
        description="First part of every key. Sites that share a store need different prefixes, and so do groups that "
        "read the same cameras; otherwise they take each other's streams. With a new prefix every stream starts from "
        "source.",
    )
    ssl_cafile: str | None = Field(
        None,
        description="File of CA certificates (PEM) to check the store's certificate against. null: the system's.",
    )
    ssl_certfile: str | None = Field(
        None, description="File of the worker's own certificate (PEM), if the store asks clients for one."
    )
    ssl_keyfile: str | None = Field(
        None, description="File of the private key for `ssl_certfile`. null: the key is in that file too."
    )
    connect_timeout_s: float = Field(
        30,
        gt=0,
        description="Seconds that a starting worker waits for the store. Then it exits with code 1. A worker that has "
        "started waits without limit.",
    )
    compression: Literal["none", "deflate"] = Field(
        "deflate",
        description="Lossless compression of the tensors in the store. `deflate` saves memory and network. `none` is "
        "faster if states have megabytes and the network is fast. Workers read both.",
    )
    write_interval_ms: int = Field(
        0,
        ge=0,
        le=60_000,
        description="Milliseconds between two writes of a stream's state. 0: after every step that was to make an "
        "update (after others within a second), so that a crash costs one step. Larger: fewer writes, but a crash "
        "repeats all steps since the last write; their update events and offsets wait until then. Raise it only if "
        "states have megabytes.",
    )
    max_streams: int = Field(
        10_000,
        ge=1,
        description="Most streams that the store may have. Frames of further new streams become dead letters; known "
        "streams continue. The limit protects the store from senders that make up keys: a full store stops every "
        "stream. Raise it with the store's memory.",
    )
    max_state_bytes: int = Field(
        64 << 20,
        ge=1_024,
        description="Largest size in bytes of a state's tensors, and of each snapshot; checked before they are read. A "
        "stream with a larger state starts from source, and a larger snapshot cannot be rolled back to. Raise it only "
        "for very large models.",
    )
    idle_ttl_s: int = Field(
        0,
        ge=0,
        description="Seconds without a write after which a stream's parameters and snapshots expire, which frees "
        "memory in the store. If the stream returns, it starts from source, so set it longer than any camera is off on "
        "purpose. 0: they never expire. The stream goes on counting for `max_streams`.",
    )
    snapshot_every: int = Field(
        100,
        ge=0,
        description="Updates between two snapshots of a stream's parameters, for rollbacks by people and by the guard. "
        "Lower: a rollback loses less, but all snapshots together reach back less far. 0: none are taken, and the "
        "guard goes back to source instead.",
    )
    snapshots: int = Field(
        5,
        ge=1,
        le=100,
        description="Newest snapshots that are kept for each stream. Each takes as much memory in the store as the "
        "state itself.",
    )

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
    """Limits for frames, which come from outside and are not trusted. A frame above a limit becomes a dead letter."""

    max_bytes: int = Field(
        8 << 20,
        ge=1,
        description="Largest record value in bytes. The frames topic's `max.message.bytes` must be larger than this.",
    )
    max_side: int = Field(
        8_192,
        ge=1,
        description="Largest width or height in pixels. Read from the picture's header, before it is decoded.",
    )
    max_pixels: int = Field(
        24_000_000,
        ge=1,
        description="Largest width x height. Read from the picture's header, before it is decoded. Decoding takes "
        "memory in proportion to it.",
    )
    max_stream_id_bytes: int = Field(
        200, ge=1, le=MAX_STREAM_BYTES, description="Longest stream id (record key) in bytes of UTF-8."
    )
    decode_threads: int = Field(
        2,
        ge=1,
        le=64,
        description="Threads that decode small pictures. As many more decode large ones (above a megapixel, JPEGs "
        "above four), so that a camera with large pictures does not hold up the others. Raise it if frames wait to be "
        "decoded while processors are idle.",
    )


class Batch(Section):
    """Micro-batches: the frames of one stream that make one update. How long frames wait, and when a stream learns."""

    max_batch: int = Field(
        16,
        ge=1,
        le=1_024,
        description="Frames of one stream at which its micro-batch closes. Smaller: updates come sooner, are noisier, "
        "and cost more for each frame. Larger than 16 changes nothing with `adapt.method: mgg`, unless `min_adapt` is "
        "larger too. A full micro-batch does not wait for `max_wait_ms`.",
    )
    max_wait_ms: int = Field(
        100,
        ge=0,
        description="Longest time in milliseconds that a frame waits for others of its stream before it is predicted. "
        "Lower: quicker predictions, in smaller batches that cost more for each frame. 0: no frame waits. Raise it to "
        "save processor time.",
    )
    min_adapt: int = Field(
        4,
        ge=1,
        description="Fewest frames of a stream that make an update, because fewer give poor gradients. If there are "
        "fewer, they are predicted in time and held, and the update follows when enough have come (see `max_hold_ms`). "
        "At most `max_batch`.",
    )
    max_hold_ms: int = Field(
        10_000,
        ge=0,
        description="Longest time in milliseconds that predicted frames are held for `min_adapt`. After that they "
        "count as done, without an update. 0: they are not held. A camera that sends fewer than `min_adapt` frames in "
        "this time never adapts: raise it. Held frames are not committed, so some seconds of consumer lag are normal: "
        "up to this long.",
    )
    max_pass: int = Field(
        128,
        ge=1,
        description="Most frames, of all streams together, in one pass of the model; each thread runs its own. Larger: "
        "fewer passes under load, but each takes longer, and more memory for activations. At least `max_batch`.",
    )
    max_buffered: int = Field(
        16_384,
        ge=1,
        description="Most frames in memory. At this number the worker takes no more from Kafka until some are done, "
        "and held frames go without an update. Allow `min_adapt` frames for each camera of the worker.",
    )
    max_buffered_bytes: int = Field(
        256 << 20,
        ge=1 << 20,
        description="Most bytes of pixels in memory, decoded and at the model's input size. Lowers `max_buffered` for "
        "models with large inputs; frames for two passes of each thread always fit. Lower it if a worker runs out of "
        "memory.",
    )
    latency_budget_ms: int = Field(
        0,
        ge=0,
        description="Time in milliseconds from a record's timestamp to its prediction that should not be exceeded. "
        "Under overload the worker saves time in two stages. Frames older than halfway between `max_wait_ms` and half "
        "of the budget make no update (300 ms, if these are 100 and 1000). Frames that have used half of the budget "
        "get a prediction in the quickest way, and the stream learns nothing from them. Set it to more than twice "
        "`max_wait_ms`. 0: no budget; every frame is adapted on, however late. Senders' and workers' clocks must "
        "agree: to a clock that is ahead all frames are late.",
    )
    drop_late: bool = Field(
        False,
        description="true: frames that would miss `latency_budget_ms` are dropped, without a prediction. For sites "
        "that must keep up with live cameras and can do without some frames. A crash then loses the updates since the "
        "last write, and old frames cannot be replayed. false: every frame gets its prediction, late if need be.",
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
    """Whether and how streams adapt."""

    enabled: bool = Field(
        True,
        description="false: no updates. Each stream goes on answering with the parameters that it has now. (For the "
        "source model's answers set `policy.mode: shadow`.)",
    )
    method: Method = Field(
        "mgg",
        description="How updates are computed. `mgg`: with the bundle's generator. The others, published methods and "
        "plain optimizers, are there for comparison, not for production: their accuracy is not estimated, so the guard "
        "has less to go by. `source` leaves the source model as it is. `eata` is ETA, without EATA's Fisher anchor, "
        "which needs source frames. A stream starts from source when its method changes.",
    )
    mode: Literal["always", "on_demand"] = Field(
        "always",
        description="`always`: every micro-batch makes an update. `on_demand`: only while a stream is new or drift "
        "detection says that it moves, and now and then otherwise. In the demo that takes a fifth less processor time "
        "and keeps 98% of the gain. Choose it if processors are scarce.",
    )
    step_scale: float = Field(
        1.0,
        ge=0,
        le=10,
        description="Multiplies the size of each update. Bundles are trained and calibrated for 1. Lower: streams "
        "follow drift more slowly. 0: updates are computed, and parameters stay.",
    )
    max_resident_streams: int = Field(
        4_096,
        ge=1,
        description="Most stream states in a worker's memory. Beyond that, states of streams without frames in hand "
        "leave memory, and are loaded from the store with the next frame. Too low for the number of active cameras: "
        "the store is asked all the time.",
    )
    max_resident_bytes: int = Field(
        1 << 30,
        ge=1,
        description="The same limit in bytes of tensors; the smaller of the two counts. States of streams with frames "
        "in hand always stay, so memory may exceed it. On a GPU this much is taken at the start.",
    )


class Guard(Section):
    """Which updates the guard accepts. The defaults are tested against attacks: read docs/trust.md before a change.

    Factors multiply limits that were found when the bundle was calibrated.
    """

    source_share: float = Field(
        0.0625,
        ge=0,
        le=1,
        description="Share of a stream's micro-batches that the source model answers too, so that the guard can "
        "compare; rounded to one in N. Of new and doubtful streams it answers all. Higher: the guard sees trouble "
        "sooner, for more processor time. 0: source is asked for none, and the guard cannot tell whether adapting "
        "helps.",
    )
    max_gradient_factor: float = Field(
        4.0,
        gt=0,
        description="An update is skipped if the norm of its raw gradient exceeds the bundle's limit times this. "
        "Raising it lets in more updates from unusual frames, which is rarely right.",
    )
    max_distance_factor: float = Field(
        2.0,
        gt=0,
        description="An update is skipped if it leads further from the source model than the bundle's limit times "
        "this. A stream that is beyond the limit already may still come back. The factor also limits the size of a "
        "single update: a larger one is shrunk.",
    )
    max_jump: float = Field(
        8.0,
        gt=0,
        description="An update is shrunk if the norm of its gradient is more than this many deviations above the "
        "stream's own recent level. Lower: single strange frames do less, but a stream follows sudden changes more "
        "slowly.",
    )
    min_entropy: float = Field(
        0.02,
        ge=0,
        lt=1,
        description="The stream goes back if its answers are surer than this while the source model disagrees on half "
        "of the frames: a collapse. Measured as mean entropy, as a share of the largest possible, ln(classes). 0 turns "
        "this rule off.",
    )
    min_marginal_entropy: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="The stream goes back if its answers are more one-sided than this while the source model disagrees "
        "on half of the frames: a collapse onto few classes. Measured as the entropy of the mean prediction, as a "
        "share of ln(classes). 0 turns this rule off.",
    )
    max_repeats: float = Field(
        0.5,
        ge=0,
        le=1,
        description="A micro-batch makes no update if more than this share of its frames are blank, or repeat recent "
        "ones: the camera is probably covered or frozen. 1 turns this rule off.",
    )
    max_alike: int = Field(
        256,
        ge=1,
        description="After this many frames in a row that are nearly all of one class, more of them make no update: "
        "they teach nothing about the other classes. With another `adapt.method` than `mgg` the stream goes back "
        "instead, if the source model disagrees.",
    )
    false_alarm: float = Field(
        1e-4,
        gt=0,
        lt=1,
        description="Largest rate of false alarms of the guard's drift alarm, per micro-batch of a stream that has not "
        "moved; the default is one in 10,000. An alarm only makes the source model answer beside the stream for a "
        "while. Higher: earlier alarms, and more processor time.",
    )
    never_worse: bool = Field(
        True,
        description="true: the source model answers while it is estimated to do better. false: the adapted parameters "
        "answer even then.",
    )


class Bundle(Section):
    """The bundle that the worker runs, and what happens to streams when it changes."""

    path: Path = Field(
        Path("bundles/fashion-mnist"),
        description="Folder of the bundle: the one with `manifest.json`. Relative to the working directory.",
    )
    factories: tuple[str, ...] = Field(
        (),
        description="Functions of your own, as `module:function`, that a bundle may call to build its model. Nothing "
        "else is imported. Empty: only bundles with architectures that come with Driftkeel run.",
    )
    code: Path | None = Field(
        None,
        description="Folder that contains the modules of `factories`, if they are not installed. It is searched after "
        "installed packages.",
    )
    on_change: Literal["reset", "carry", "shadow"] = Field(
        "reset",
        description="What happens to a stream that another bundle has written. `reset`: it starts from the new source "
        "model. `carry`: it keeps its parameters if the model is the same and `previous` names the old bundle; "
        "otherwise as `reset`. `shadow`: as `carry`, and source answers its first `shadow_frames` frames.",
    )
    previous: tuple[Path, ...] = Field(
        (), description="Folders of earlier bundles whose streams may be carried over. Needed with `on_change: carry`."
    )
    shadow_frames: int = Field(
        256,
        ge=1,
        description="With `on_change: shadow`, frames of each stream that the source model answers first.",
    )

    @model_validator(mode="after")
    def _somewhere_to_carry_from(self) -> Bundle:
        if self.on_change == "carry" and not self.previous:
            raise ValueError("on_change: carry needs the folders of earlier bundles in previous")
        return self


class Metrics(Section):
    """The worker's HTTP port, with `/metrics`, `/healthz` and `/readyz`. It asks for no password."""

    host: str = Field(
        "127.0.0.1",
        description="Address to listen on. Loopback by default, because the port asks for no password. In a container "
        "0.0.0.0, or neither Prometheus nor probes reach it.",
    )
    port: int = Field(
        9_464,
        ge=0,
        le=65_535,
        description="Port to listen on; each worker of a machine needs its own. 0: a free one, which the log names.",
    )
    max_stream_labels: int = Field(
        50,
        ge=0,
        description="Most streams of a worker that have series of their own: those in trouble, drifting, new, and with "
        "the lowest estimated accuracy come first. The others count only in the fleet's series, and alerts on single "
        "streams do not see them. Higher: more series, and slower scrapes. 0: none.",
    )
    silent_after_s: float = Field(
        600,
        gt=0,
        description="Seconds without a frame after which a stream counts as silent, for the alert on silent cameras. "
        "Raise it if cameras pause for longer on purpose.",
    )


class Console(Section):
    """The local web page, `driftkeel console`."""

    host: str = Field(
        "127.0.0.1",
        description="Address to listen on. Any but loopback requires `token`, because the page can reset streams.",
    )
    port: int = Field(8_464, ge=0, le=65_535, description="Port to listen on. 0: a free one, which is printed.")
    token: SecretStr | None = Field(
        None,
        min_length=16,
        description="Password that the page asks for before it shows anything, at least 16 characters. Better set as "
        "`DRIFTKEEL__CONSOLE__TOKEN` than in a file. null: no login, on loopback only.",
    )
    hosts: tuple[str, ...] = Field(
        (),
        description="Further host names under which browsers may reach the page, such as that of a proxy. Requests "
        "under other names are refused. localhost and plain addresses always work.",
    )
    workers: tuple[str, ...] = Field(
        (),
        description="URLs of the workers' `/metrics`, such as `http://worker:9464/metrics`. Empty: the one that "
        "`metrics.host` and `metrics.port` name.",
    )
    max_streams: int = Field(
        2_000,
        ge=1,
        le=20_000,
        description="Most streams that the page keeps in memory. Above that, the one silent for longest makes room.",
    )

    @field_validator("workers")
    @classmethod
    def _urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if urlsplit(url).scheme not in {"http", "https"}:
                raise ValueError(f"{url!r} is no http:// or https:// URL")
        return urls


class Log(Section):
    """Logging to standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="Least severe lines that are written. `debug` adds every decision, and what the Kafka client says.",
    )
    format: Literal["auto", "json", "text"] = Field(
        "auto",
        description="How the worker and the console log. `json`: one object per line. `auto`: text on a terminal, JSON "
        "elsewhere. All other commands write text.",
    )


class Traces(Section):
    """OpenTelemetry spans of the worker's steps. Needs the extra `otel`."""

    endpoint: str | None = Field(
        None,
        pattern=r"^https?://",
        description="Where spans are sent: OTLP over HTTP, such as `http://collector:4318/v1/traces`. null: no traces.",
    )
    sample_ratio: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of steps that are traced. A busy worker makes several steps a second: lower it there.",
    )


class WorkerConfig(BaseSettings):
    """Everything that a worker can be told."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__", case_sensitive=False
    )

    worker: str = Field(
        default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}",
        min_length=1,
        description="Name of this worker in predictions, update events, metrics and logs. Default: host name and "
        "process id. Workers that share a configuration file must leave it out, or all have one name.",
    )
    threads: int = Field(
        0,
        ge=0,
        le=256,
        description="Passes of the model that run at the same time, each on one thread. Best is 1, with one worker for "
        "every processor: short passes then run in the worker's main loop, and threads do not wait for each other. 0: "
        "two, if torch has as many threads, otherwise one.",
    )
    device: str = Field(
        "cpu",
        pattern=r"^(cpu|cuda(:[0-9]{1,3})?)$",
        description="Where the model runs: `cpu`, or `cuda` or `cuda:N` for a GPU. A GPU needs a CUDA build of torch, "
        "and is experimental: none has run it yet (docs/deploy.md).",
    )
    kafka: Kafka = Kafka()
    store: Store = Store()
    frames: Frames = Frames()
    batch: Batch = Batch()
    bundle: Bundle = Bundle()
    adapt: Adapt = Adapt()
    guard: Guard = Guard()
    policy: Policy = Field(
        Policy(),
        description="What every stream may do: which parameters answer, and when it may update. `streams` and commands "
        "override it.",
    )
    streams: dict[str, AskedChange] = Field(
        default_factory=dict,
        description="Exceptions for single streams: stream ids, each with the keys of `policy` that differ. Commands "
        "override them.",
    )
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
