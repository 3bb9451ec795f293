"""`driftkeel doctor`: checks everything that a worker with this configuration needs, and says what to do.

Torch takes seconds and two hundred megabytes to load. Only the last check, that the parts of the bundle fit together,
needs it, and before that a GPU or `bundle.previous`.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import redis.exceptions
from kafka.errors import KafkaConnectionError, KafkaError, KafkaTimeoutError

from meta.bundle_folder import checked_file, read_labels, read_manifest
from schemas.config import WorkerConfig
from schemas.errors import ConfigError, DriftkeelError, LoginError
from worker.consume.short_logs import REMEDY, cure
from worker.kafka.client import REFUSALS, open_admin, open_reader
from worker.site.folder import LOOPBACK
from worker.site.positions import check_cluster, forgotten, short_logs
from worker.store.client import connect
from worker.store.store import StateStore, Write
from worker.terminal import counted

Level = Literal["ok", "warning", "failed"]
Check = Callable[[WorkerConfig], Iterator["Finding"]]
NEARLY_FULL = 0.9
OLDEST_REDIS = (6, 2)
PACKAGES = {"snappy": "python-snappy"}  # where the module has another name
_PROBE = "driftkeel-doctor"
_TRY_LOCAL = " ('driftkeel local' starts both for a first try)"


@dataclass(frozen=True)
class Finding:
    """One result: what was checked, whether it is well, and in words what was found and what to do."""

    subject: str
    level: Level
    text: str


def examine(config: WorkerConfig) -> Iterator[Finding]:
    """All checks, in the order in which a worker needs them; the slowest is the last.

    Store and broker are asked at the same time, as each may be away until a timeout.
    """
    failed: set[Check] = set()
    with ThreadPoolExecutor() as pool:
        asked = {check: pool.submit(_findings, subject, check, config) for subject, check in CHECKS if check in REMOTE}
        for subject, check in CHECKS:
            if check is _model and _bundle in failed:
                continue  # It would fail for the same reason.
            found, complete = asked[check].result() if check in asked else _findings(subject, check, config)
            yield from found
            if not complete:
                failed.add(check)


def _findings(subject: str, check: Check, config: WorkerConfig) -> tuple[list[Finding], bool]:
    """What a check found, and whether it ran to its end."""
    found: list[Finding] = []
    try:
        for one in check(config):
            found.append(one)  # One by one: what was found before an error counts.
    except (DriftkeelError, KafkaError, OSError, redis.exceptions.RedisError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if _away(check, error):
            reason = text.removeprefix(f"{type(error).__name__}: ")
            text = f"the broker at {config.kafka.bootstrap} cannot be reached: {reason}"
        found.append(Finding(subject, "failed", f"{text.rstrip('.')}{_remedy(check, error, config)}"))
        return found, False
    return found, True


def _away(check: Check, error: Exception) -> bool:
    """Whether the error means that the broker does not answer."""
    return check is _broker and isinstance(error, KafkaConnectionError | KafkaTimeoutError)


def _remedy(check: Check, error: Exception, config: WorkerConfig) -> str:
    """What to do about a server that does not answer or refuses the login; other errors say it themselves."""
    trial = _TRY_LOCAL if config.kafka.bootstrap.rpartition(":")[0] in LOOPBACK else ""
    if _away(check, error):
        return f"; start the broker, or correct kafka.bootstrap{trial}"
    if check is _broker and isinstance(error, REFUSALS):
        return "; correct kafka.sasl_mechanism, sasl_username and sasl_password"
    silent = isinstance(error.__cause__, redis.exceptions.ConnectionError) and not isinstance(error, LoginError)
    if check is _store and silent:
        return f"; start the store, or correct store.url{trial}"
    return ""


def _versions(config: WorkerConfig) -> Iterator[Finding]:
    names = ("torch", "kafka-python", "redis", "pydantic")
    yield Finding("versions", "ok", ", ".join(f"{name} {version(name)}" for name in names))
    missing = {
        "crc32c": "Kafka traffic is forty times slower",
        "hiredis": "large states load several times slower",
        "lz4": "a frame that its sender has compressed with it ends the worker",
        "snappy": "a frame that its sender has compressed with it ends the worker",
        "zstandard": "a frame that its sender has compressed with it ends the worker",
    }
    for package, cost in missing.items():
        if importlib.util.find_spec(package) is None:
            yield Finding(
                "versions",
                "warning",
                f"{package} is not installed: {cost}; pip install {PACKAGES.get(package, package)}",
            )


def _device(config: WorkerConfig) -> Iterator[Finding]:
    if config.device != "cpu":
        from worker.engine.device import EXPERIMENTAL, described, site_device

        device = site_device(config.device)
        yield Finding("device", "warning", f"{described(device)}: {EXPERIMENTAL}")


def _bundle(config: WorkerConfig) -> Iterator[Finding]:
    folder = config.bundle.path
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        checked_file(folder, name, entry)
    labels = read_labels(folder, manifest)
    yield Finding("bundle", "ok", f"{manifest.name} {manifest.content_hash}, {len(labels)} labels, every hash matches")


def _previous_bundles(config: WorkerConfig) -> Iterator[Finding]:
    for folder in config.bundle.previous:
        from worker.streams.upgrade import identified

        found, _ = identified(folder)
        yield Finding("bundle", "ok", f"streams of {found} may be carried over")


def _model(config: WorkerConfig) -> Iterator[Finding]:
    from worker.site.bundle import site_bundle

    bundle = site_bundle(config)
    yield Finding("bundle", "ok", f"its model and {bundle.method_name} fit together")


def _store(config: WorkerConfig) -> Iterator[Finding]:
    store = StateStore(config.store)
    store.ping()
    yield Finding("store", "ok", f"{config.store.address} answers")
    # Do once what workers do, on a stream of our own: this checks permissions as well as reachability.
    client = connect(config.store)
    try:
        (claimed,) = store.claim([_PROBE], config.worker)
        store.write([Write(_PROBE, claimed.token, 1, b"{}", b"", b"tensors", snapshot=b"{}")])
        store.overview([_PROBE])
        store.marks(config.kafka.group, [])
    except DriftkeelError:
        # A full store accepts the claim and refuses the write. The claim left behind would be listed as a stream.
        with contextlib.suppress(redis.exceptions.RedisError):
            client.delete(*store.keys(_PROBE))
        raise
    client.delete(*store.keys(_PROBE))
    yield Finding("store", "ok", "states can be claimed, written and read")
    yield _stream_limit(config, store.count())
    yield from _memory(client)
    yield _server_version(client)
    settings = {
        "appendonly": ("yes", "a restart of the store loses all states"),
        "maxmemory-policy": ("noeviction", "the store may throw states away when memory is short"),
    }
    for name, (wanted, cost) in settings.items():
        found = _server_setting(client, name)
        if found is not None and found != wanted:
            yield Finding("store", "warning", f"{name} is {found}: {cost}; set it to {wanted}")
    client.close()
    store.close()


def _stream_limit(config: WorkerConfig, streams: int) -> Finding:
    most = config.store.max_streams
    text = f"{counted(streams, 'stream')}, of at most {most:,} (store.max_streams)"
    if streams < NEARLY_FULL * most:
        return Finding("store", "ok", text)
    return Finding("store", "warning", f"{text}: delete those that are no cameras, or raise it and the store's memory")


def _memory(client: Any) -> Iterator[Finding]:
    """A store that is nearly full may accept the small state above, and refuse a worker's.

    No finding if it has no limit, or does not tell: the user may lack the permission, and a Cluster answers per node.
    What waits for a slow disk does not count, for the store does not count it either.
    """
    try:
        told = client.info("memory")
        used = int(told["used_memory"]) - int(told.get("mem_not_counted_for_evict", 0))
        most = int(told["maxmemory"])
    except (redis.exceptions.RedisError, redis.exceptions.RedisClusterException, KeyError, TypeError):
        return
    if most and used > NEARLY_FULL * most:
        text = f"{used >> 20} of {most >> 20} MiB are used (maxmemory): a full store stops all streams"
        yield Finding("store", "warning", f"{text}; raise it, or make room: docs/runbooks/store.md")


def _server_version(client: Any) -> Finding:
    try:
        found = str(client.info("server").get("redis_version", ""))
        old = bool(found) and tuple(int(part) for part in found.split(".")[:2]) < OLDEST_REDIS
    except (redis.exceptions.RedisError, redis.exceptions.RedisClusterException, ValueError, AttributeError):
        return Finding("store", "ok", "it does not tell its version; Redis 6.2 or newer is needed")
    if old:
        return Finding(
            "store", "warning", f"Redis {found} is older than 6.2, the oldest version that is tested; update it"
        )
    return Finding("store", "ok", f"speaks as Redis {found}")


def _server_setting(client: Any, name: str) -> str | None:
    """None if the server does not tell: managed ones often refuse, and a Cluster answers per node."""
    try:
        found = client.config_get(name).get(name)
    except (redis.exceptions.RedisError, redis.exceptions.RedisClusterException, AttributeError):
        return None
    return found if isinstance(found, str) else None


def _broker(config: WorkerConfig) -> Iterator[Finding]:
    kafka = config.kafka
    with contextlib.closing(open_admin(kafka)) as admin:
        known, topics = set(admin.list_topics()), kafka.topics
        details = admin.describe_topics(sorted(known & set(topics.model_dump().values())))
    yield Finding("broker", "ok", f"{kafka.bootstrap} answers, {len(known)} topics")
    for topic in (topics.frames, topics.predictions, topics.updates, topics.dead_letters):
        if topic not in known:
            yield Finding("broker", "failed", f"topic {topic} is missing; create it, or correct kafka.topics")
    if topics.commands not in known:
        text = f"topic {topics.commands} is missing: workers run, and take no commands; create it with one partition"
        yield Finding("broker", "warning", f"{text} and retention.ms=-1")
    if topics.frames in known:
        yield _partitions(kafka, topics.frames)
    yield from replication(details)


def replication(topics: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Partitions without a leader, and topics without a replica, by the broker's description of the topics."""
    nodes = {node for topic in topics for part in topic["partitions"] for node in part["replica_nodes"]}
    for topic in topics:
        name, parts = topic["name"], topic["partitions"]
        if alone := [part["partition_index"] for part in parts if part["leader_id"] < 0]:
            text = f"topic {name}: nobody leads partitions {alone}, and what is in them waits; see to their brokers"
            yield Finding("broker", "failed", text)
        if len(nodes) > 1 and any(len(part["replica_nodes"]) == 1 for part in parts):
            text = f"topic {name} is kept once: while that broker is away it stands still, and is lost with its disk"
            yield Finding("broker", "warning", f"{text}; give it a replication factor of 3")


def _positions(config: WorkerConfig) -> Iterator[Finding]:
    """Whether broker and store belong together. Silent if one of them is away: that has been said by then."""
    store = StateStore(config.store)
    with contextlib.suppress(DriftkeelError, KafkaError, OSError, redis.exceptions.RedisError):
        try:
            check_cluster(config, store)
        except ConfigError as error:
            yield Finding("positions", "failed", str(error))
        short = short_logs(config.kafka, store)
        for partition, found in sorted(short.items()):
            alone = f"; where that stream alone says so, {cure(found.stream)}" if found.stream else ""
            yield Finding("positions", "failed", f"{found.described(partition)}; {REMEDY}{alone}")
        if not short:
            yield Finding("positions", "ok", "no partition ends before what the store says was read of it")
        if unknown := forgotten(config.kafka, store):
            text = f"group {config.kafka.group} has read partitions {unknown}, and the store knows nothing of them"
            why = "its data is lost, or store.url or store.prefix lead elsewhere than they did"
            yield Finding("positions", "warning", f"{text}: {why}; their streams would begin from source")
    store.close()


def _partitions(kafka: Any, topic: str) -> Finding:
    with contextlib.closing(open_reader(kafka)) as consumer:
        count = len(consumer.partitions_for_topic(topic) or ())
    text = f"topic {topic} has {counted(count, 'partition')}: at most {counted(count, 'worker')} can share it"
    return Finding("broker", "ok" if count > 1 else "warning", text)


CHECKS: tuple[tuple[str, Check], ...] = (
    ("versions", _versions),
    ("device", _device),
    ("bundle", _bundle),
    ("bundle", _previous_bundles),
    ("store", _store),
    ("broker", _broker),
    ("positions", _positions),
    ("bundle", _model),
)
REMOTE = (_store, _broker, _positions)
