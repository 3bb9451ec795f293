"""Stream states in Redis: claimed by token, written together with their position, in one atomic script.

A stream has four keys, which share a hash tag and so lie on one node of a Cluster:

    {prefix}:{stream}            hash: token, owner, header, event
    {prefix}:{stream}:tensors    the tensors, which may expire when the stream is idle
    {prefix}:{stream}:snapshots  list of earlier states, newest first
    {prefix}:{stream}:approved   parameters that a person approved, where one did

A deleted stream leaves {prefix}:{stream}:deleted, with its last token and its last event. If it begins again, its
tokens and its chain of events go on from there.

A partition has one key, {prefix}:mark:{group}/{topic}/{partition}: all of its frames before this offset are in the
states. Where Kafka's committed offset is further on, the store may have lost writes. A frames topic has
{prefix}:cluster:{topic}, the id of the Kafka cluster that these offsets are of, and {prefix}:topic:{topic}, the topic's
id there.

What the scripts guarantee:

- A claim raises the token, and only the newest token may write. So a worker that was paused while another took over its
  streams (a zombie) is refused.
- Writes under one token are numbered. One that comes twice, because its answer was lost, counts once. One that comes
  late, because a broken connection held it, cannot undo a newer one.
- The last update events lie beside the state, so that a crash between writing the state and publishing them cannot
  lose them.
- No header says more than the tensors beside it. A write without tensors is not taken where the stored ones have
  expired, or where the store has lost the write that left them; then the worker writes all of them. The same holds for
  approved parameters. The header stays when tensors expire, so that a stream that restarts from source can say why.
- A stream is left alone where one of its keys has another type: somebody else put that there.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal, TypeVar
from urllib.parse import quote, unquote

import redis.exceptions

from schemas.config import Store as StoreSettings
from schemas.errors import StateError, UnreachableError
from schemas.frame import MAX_STREAM_BYTES, OFFSET_DIGITS
from schemas.state import MAX_HEADER_BYTES
from worker.consume.offsets import Partition
from worker.store import scripts
from worker.store.client import connect
from worker.store.compress import unpack
from worker.store.refusals import as_unreachable

log = logging.getLogger("driftkeel.store")
Result = TypeVar("Result")
Which = Literal["any", "known", "last"]
KEYS_AT_ONCE = 2_000  # that one request looks at; a stream has up to four
MOST_SNAPSHOTS = 100  # of a stream, in any configuration
NOTE_BYTES = 1_000
NOTHING: Mapping[Partition, int] = {}


@dataclass(frozen=True)
class Claimed:
    """A claim, and what was stored. `header` is None for a stream that was never written; `packed`, its tensors, also
    where they have expired. Header, event and tensors are empty where they have more bytes than are read.

    `foreign`: what lies under one of the stream's keys that no worker wrote. Then nothing is claimed, and the token is
    0. It also is for a new stream where only known ones were to be claimed. `before`: who claimed the stream last.

    Tensors are unpacked whenever they are asked for, and not kept. A small value may become `max_bytes`, and those of
    many streams that are claimed at once would fill the memory.
    """

    token: int
    header: bytes | None
    packed: bytes | None
    event: bytes | None
    packed_approved: bytes | None = None
    foreign: str = ""
    max_bytes: int = 0
    before: str = ""

    @property
    def tensors(self) -> bytes | None:
        """The stream's tensors as a safetensors file, unpacked."""
        return self.packed and unpack(self.packed, self.max_bytes)

    @property
    def approved(self) -> bytes | None:
        """The same of parameters that a person approved."""
        return self.packed_approved and unpack(self.packed_approved, self.max_bytes)


@dataclass(frozen=True)
class Overview:
    """A stream in short: who claimed it last, its header, the bytes of its tensors, how many snapshots it has, and
    `foreign` as in `Claimed`."""

    token: int
    owner: str
    header: bytes | None
    tensor_bytes: int
    snapshots: int
    foreign: str = ""


@dataclass(frozen=True)
class Write:
    """A state to write. `number` grows with every write of the stream. Tensors are as `pack` returns them.

    `tensors` and `approved`: None leaves the stored ones as they are. `keeps_approved`: the header says that there are
    approved parameters, so they must be there. `after`: the number of the write that left the stored ones there, 0
    where the claim found them; None where that does not matter. `snapshot`: keep the tensors for rollback, under this
    description.
    """

    stream: str
    token: int
    number: int
    header: bytes
    event: bytes
    tensors: bytes | None
    snapshot: bytes | None = None
    approved: bytes | None = None
    keeps_approved: bool = False
    after: int | None = None


class StateStore:
    """The store's client. Its methods raise UnreachableError where the store does not answer; LoginError, a subclass,
    where it refuses the login."""

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings
        # Tensors that cannot be compressed become a little longer when they are packed.
        self._most = settings.max_state_bytes + settings.max_state_bytes // 1_000 + 1_000
        self._client: Any = None
        self._opened = self._noticed = 0

    def keys(self, stream: str) -> list[str]:
        """The stream's keys. The braces make the stream's name their hash tag."""
        base = f"{self._settings.prefix}:{{{quote(stream, safe='')}}}"
        return [base, f"{base}:tensors", f"{base}:snapshots", f"{base}:approved"]

    def _all_keys(self, stream: str) -> list[str]:
        keys = self.keys(stream)
        return [*keys, f"{keys[0]}:deleted"]

    def reconnected(self) -> bool:
        """Whether connections were opened since the last call, except for the very first one.

        Behind a new connection may be a store that has crashed and lost its last writes, or another one.
        """
        noticed, self._noticed = self._noticed, self._opened
        return 0 < noticed < self._opened

    def ping(self) -> None:
        self._reach(lambda client: client.ping())

    def claim(self, streams: list[str], owner: str, which: Which = "any") -> list[Claimed]:
        """Claim streams. Returns them in order. `known`: new streams are not begun; their token is 0. `last`: the same,
        for streams that are about to be deleted, which also works where the store has no memory left."""
        return self._claimed(
            scripts.CLAIM, [(self._all_keys(stream), [owner, which, self._most]) for stream in streams]
        )

    def write(self, writes: list[Write]) -> list[bool | None]:
        """Write states. Returns for each, in order: True where it is written; False where another worker has claimed
        the stream; None where nothing was written, because tensors or approved parameters that were to stay are gone,
        or older than `Write.after`: the store has lost writes."""
        calls = [(self.keys(w.stream), self._arguments(w)) for w in writes]
        return [None if outcome == 2 else bool(outcome) for outcome in self._scripts(scripts.WRITE, calls)]

    def delete(self, stream: str, token: int, event: bytes) -> bool:
        """Remove a stream's keys and keep its last event. False where it was claimed after `token`. The worker that had
        the stream finds its next write refused."""
        return bool(self._scripts(scripts.DELETE, [(self._all_keys(stream), [token, event])])[0])

    def deleted(self, stream: str) -> bytes | None:
        """The last event of a deleted stream; None where it was not deleted, or has begun again."""
        (content,) = self._scripts(scripts.LAST, [(self._all_keys(stream)[-1:], [])])
        return None if content is None else content.partition(b"\n")[2]

    def deleted_streams(self) -> Iterator[str]:
        """All streams that were deleted and have not begun again, in no order."""
        return chain.from_iterable(self._named("}:deleted"))

    def read(self, stream: str) -> Claimed:
        """What is stored, without claiming it. The token is 0 for an unknown stream."""
        (found,) = self._claimed(scripts.READ, [(self.keys(stream), [self._most])])
        return found

    def overview(self, streams: list[str]) -> list[Overview]:
        """What is stored of these streams, in order, without the tensors themselves."""
        rows = self._scripts(scripts.OVERVIEW, [(self.keys(stream), []) for stream in streams])
        return [
            Overview(0, "", None, 0, 0, said)
            if (said := self._foreign(row))
            else Overview(row[0], _text(row[1]), *row[2:])
            for row in rows
        ]

    def snapshots(self, stream: str) -> list[bytes]:
        """The descriptions of a stream's snapshots, newest first; empty for a damaged one. Raises StateError where the
        key is something else."""
        key = self.keys(stream)[2]
        (said,) = self._scripts(scripts.SAID, [([key], [MOST_SNAPSHOTS])])
        if said is None:
            raise _no_snapshots(key)
        return list(said)

    def snapshot(self, stream: str, back: int) -> tuple[int, bytes, bytes]:
        """How many snapshots there are; and the description and the packed tensors of the `back`th newest. Both are
        empty where there is no such one, it is damaged, or has more bytes than are read. Raises StateError as
        `snapshots`."""
        key = self.keys(stream)[2]
        (found,) = self._scripts(scripts.SNAPSHOT, [([key], [back - 1, self._most + MAX_HEADER_BYTES])])
        if not found:
            raise _no_snapshots(key)
        return found[0], *_split(found[1])

    def count(self) -> int:
        """How many streams have a state."""
        return sum(map(len, self.pieces()))

    def streams(self) -> Iterator[str]:
        """All streams that have a state, in no order."""
        return chain.from_iterable(self.pieces())

    def pieces(self) -> Iterator[list[str]]:
        """The same in pieces of some hundred streams, each read by one short request.

        A stream that exists all the while comes once or, rarely, twice. After UnreachableError there are no more.
        """
        return self._named("}")

    def ends(self) -> Iterator[tuple[str, bytes | None, bytes]]:
        """All streams that have a state: name, header, and the last events, one per line."""
        for streams in self.pieces():
            rows = self._scripts(scripts.END, [(self.keys(stream)[:1], []) for stream in streams])
            for stream, (header, event) in zip(streams, rows, strict=True):
                yield stream, header, event or b""

    def _named(self, suffix: str) -> Iterator[list[str]]:
        prefix = f"{self._settings.prefix}:{{"
        for node in self._reach(lambda client: getattr(client, "get_primaries", lambda: [None])()):
            where = {} if node is None else {"target_nodes": node}
            cursor = -1
            while cursor:
                pattern = f"{prefix}*{suffix}"
                most = len(pattern) + 3 * MAX_STREAM_BYTES  # as `keys` writes a name
                asked = max(0, cursor), pattern, KEYS_AT_ONCE, most
                cursor, names = self._reach(partial(_scan, asked, where))
                found = [name.decode(errors="replace")[len(prefix) : -len(suffix)] for name in names]
                yield [stream for part in found if _is_name(stream := unquote(part), part)]

    def mark(self, group: str, offsets: dict[Partition, int], seen: Mapping[Partition, int] = NOTHING) -> None:
        """Note that all frames before these offsets are in the states, or need not be.

        A mark that is further on stays, unless it is the one that was `seen` last: another worker has moved it, and a
        zombie that moved it back would have all of that read again.

        Raises UnreachableError over a new connection that `reconnected` has not reported yet: the store may have lost
        these states, and only its older mark would show that.
        """
        self.ping()
        if 0 < self._noticed < self._opened:
            raise UnreachableError(f"the store at {self._settings.address} may have lost its last writes")
        noted = [(p, [offset, seen.get(p, ""), OFFSET_DIGITS]) for p, offset in offsets.items()]
        self._scripts(scripts.NOTE, [([self._mark_key(group, p)], arguments) for p, arguments in noted])

    def marks(self, group: str, partitions: list[Partition]) -> dict[Partition, int]:
        """The marks of partitions. Those without one are left out, and those whose mark is no number: it will be
        replaced."""
        keys = [self._mark_key(group, p) for p in partitions]
        marks = {}
        for partition, key, found in zip(
            partitions, keys, self._scripts(scripts.MARK, [([k], [OFFSET_DIGITS]) for k in keys]), strict=True
        ):
            if found is not None and found.isdigit():
                marks[partition] = int(found)
            elif found is not None:
                log.warning("key %s in the store is no mark and is written anew", key)
        return marks

    def cluster(self, topic: str, cluster: str = "") -> str:
        """The id of the Kafka cluster that the positions in this topic are of. If none is noted yet, `cluster` is.
        Empty where it is not known."""
        return self._note_once(self.cluster_key(topic), cluster)

    def cluster_key(self, topic: str) -> str:
        """The key of what `cluster` returns."""
        return f"{self._settings.prefix}:cluster:{topic}"

    def topic_id(self, topic: str, found: str = "") -> str:
        """The id of the topic that the positions are of. If none is noted yet, `found` is. Empty if not known."""
        return self._note_once(f"{self._settings.prefix}:topic:{topic}", found)

    def close(self) -> None:
        """Close all connections. The next call opens new ones."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _claimed(self, script: str, calls: list[tuple[list[str], list[Any]]]) -> list[Claimed]:
        return [
            Claimed(0, None, None, None, foreign=said)
            if (said := self._foreign(row))
            else Claimed(row[0], row[1], row[2], row[3], row[4], "", self._settings.max_state_bytes, _text(row[5]))
            for row in self._scripts(script, calls)
        ]

    def _foreign(self, row: list[Any]) -> str:
        """What a script found in place of a stream; empty where it found a stream."""
        if isinstance(row[0], int):
            return ""
        key, kind = (part.decode(errors="replace") for part in row)
        return f"key {key} in the store is a {kind}, which no worker wrote; rename or delete it"

    def _arguments(self, write: Write) -> list[Any]:
        settings = self._settings
        snapshot = _join(write.snapshot, write.tensors) if write.snapshot and write.tensors else b""
        return [
            *(write.token, write.header, write.event, write.tensors or b"", settings.idle_ttl_s),
            *(snapshot, settings.snapshots, write.number, write.approved or b"", int(write.keeps_approved)),
            "" if write.after is None else write.after,
        ]

    def _note_once(self, key: str, note: str) -> str:
        (found,) = self._scripts(scripts.NOTE_ONCE, [([key], [note, NOTE_BYTES])])
        return str(found.decode("utf-8", "replace"))

    def _mark_key(self, group: str, partition: Partition) -> str:
        topic, number = partition
        return f"{self._settings.prefix}:mark:{quote(group, safe='')}/{topic}/{number}"

    def _scripts(self, script: str, calls: list[tuple[list[str], list[Any]]]) -> list[Any]:
        def run(client: Any) -> list[Any]:
            pipeline = client.pipeline(transaction=False)
            for keys, arguments in calls:
                # EVAL rather than EVALSHA: a Cluster's pipeline takes only EVAL, and the scripts are short.
                pipeline.execute_command("EVAL", script, len(keys), *keys, *arguments)
            return list(pipeline.execute())

        return self._reach(run)

    def _count_connection(self) -> None:
        self._opened += 1

    def _reach(self, action: Callable[[Any], Result]) -> Result:
        try:
            if self._client is None:
                self._client = connect(self._settings, self._count_connection)
            return action(self._client)
        except (redis.exceptions.RedisError, redis.exceptions.RedisClusterException) as error:
            if isinstance(error, redis.exceptions.ReadOnlyError):
                # A planned failover makes the primary a replica and leaves its connections open. Where one address
                # always leads to the primary, it takes a new connection to reach the new one.
                self.close()
            raise as_unreachable(self._settings.address, error) from error


def _is_name(stream: str, written: str) -> bool:
    """Whether a stream may have this name, and `keys` would write it so. Otherwise somebody else wrote the key."""
    return quote(stream, safe="") == written and len(stream.encode()) <= MAX_STREAM_BYTES


def _scan(asked: tuple[Any, ...], where: dict[str, Any], client: Any) -> tuple[int, list[bytes]]:
    after, names = client.execute_command("EVAL", scripts.NAMES, 0, *asked, **where)
    return int(after), names


def _join(said: bytes, tensors: bytes) -> bytes:
    return struct.pack("<I", len(said)) + said + tensors


def _split(content: bytes) -> tuple[bytes, bytes]:
    if len(content) < 4:
        return b"", b""
    (length,) = struct.unpack_from("<I", content)
    return content[4 : 4 + length], content[4 + length :]


def _text(owner: bytes | None) -> str:
    return (owner or b"").decode(errors="replace")


def _no_snapshots(key: str) -> StateError:
    return StateError(f"key {key} in the store is no list of snapshots: no worker wrote it; rename or delete it")
