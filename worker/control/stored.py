"""What is stored of streams, for operators: all but the tensors, so that no command waits until torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from meta.bundle_folder import MGG_NAME, read_labels, read_manifest
from monitoring.proxies import estimate
from schemas.config import WorkerConfig
from schemas.errors import StateError
from schemas.policy import Policy, PolicyChange
from schemas.state import Snapshot, StreamHeader, decode_header, read_snapshot
from schemas.update import Proxies
from worker.guard.answer import Policies
from worker.store.store import Overview, StateStore


@dataclass(frozen=True)
class ListedStream:
    """A stream as `streams list` shows it; `header` is None where it cannot be read."""

    stream: str
    owner: str
    token: int
    header: StreamHeader | None
    tensor_bytes: int
    snapshots: int
    foreign: str = ""

    @property
    def condition(self) -> str:
        """What a worker would find, in a word."""
        if self.foreign:
            return "foreign"
        if self.header is None:
            return "damaged"
        return "expired" if self.header.step and not self.tensor_bytes else "ok"


def listed(store: StateStore, streams: list[str] | None = None) -> list[ListedStream]:
    """These streams as they are stored, or all, in the order of their names. Those that are not stored are left out."""
    names = sorted(set(store.streams())) if streams is None else streams
    # A stream may have been deleted since the names were read.
    known = [one for one in zip(names, store.overview(names), strict=True) if one[1].token or one[1].foreign]
    return [_as_listed(name, overview) for name, overview in known]


def _as_listed(stream: str, found: Overview) -> ListedStream:
    try:
        header = decode_header(found.header) if found.header else StreamHeader(stream=stream, bundle="", method="")
    except StateError:
        header = None
    return ListedStream(stream, found.owner, found.token, header, found.tensor_bytes, found.snapshots, found.foreign)


def listed_one(store: StateStore, stream: str) -> ListedStream:
    """A stream as it is stored. Raises StateError where it is not."""
    found = listed(store, [stream])
    if not found:
        raise unknown(store, stream)
    return found[0]


def snapshots(store: StateStore, stream: str) -> list[Snapshot | None]:
    """A stream's snapshots, newest first; None for one that cannot be read."""
    return [_snapshot(said) for said in store.snapshots(stream)]


def _snapshot(said: bytes) -> Snapshot | None:
    try:
        return read_snapshot(said)
    except StateError:
        return None


def judged(config: WorkerConfig, found: ListedStream) -> tuple[Policy, Proxies]:
    """The policy that holds for a stream, and its estimated accuracy under the site's bundle. Raises BundleError."""
    header = found.header or StreamHeader(stream=found.stream, bundle="", method="")
    manifest = read_manifest(config.bundle.path)
    classes = len(read_labels(config.bundle.path, manifest))
    clean, estimated = manifest.model.clean_accuracy, header.method == MGG_NAME
    proxies = estimate(header.proxies, manifest.calibration, clean, classes, estimated)
    return Policies(config.policy, config.streams).of(header), proxies


def own_policies(config: WorkerConfig, store: StateStore) -> dict[str, PolicyChange]:
    """The streams whose policy is not the configuration's, with what commands have changed in it."""
    policies, found = Policies(config.policy, config.streams), {}
    for header in filter(None, (one.header for one in listed(store))):
        if header.policy and policies.of(header) != policies.of(header.model_copy(update={"policy": None})):
            found[header.stream] = header.policy
    return found


def unknown(store: StateStore, stream: str) -> StateError:
    """The error for a stream that is not stored."""
    if store.deleted(stream) is not None:
        return StateError(f"stream {stream!r} was deleted; 'driftkeel audit show --stream' says when and by whom")
    return StateError(f"stream {stream!r} has no stored state; 'driftkeel streams list' shows those that have")
