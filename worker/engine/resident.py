"""Streams in memory. Those that were used lately have a parsed header, the others a packed one.

A parsed header takes about 10 KB of small objects, a packed one 1.2 KB. Packing and checking one takes some 40
microseconds, parsing 15. Most of a site's streams are idle at any moment.
"""

from __future__ import annotations

import zlib

from pydantic import ValidationError

from meta.method import State
from schemas.state import StreamHeader, encode_header
from worker.engine.held import Seen

PARSED = 1_024  # headers in a generation, of which there are two
LIFETIME_S = 10.0  # of a generation at most
AT_ONCE = 32  # headers packed in one turn of the worker's loop


class Resident:
    """A stream whose state is in memory: its `slot` in the engine's tensors, its `header`, and the worker's `token`; a
    token of 0 is no claim, as the store cannot keep the stream. A stream that is released and admitted again gets
    another Resident, by which results of older passes are known to be void (`Engine.holds`).

    `stored`: the store has tensors of the stream; not yet where it is new or was reset.
    `approved`: the parameters that a person approved, as far as they answer.
    `seen`: outputs of the model for frames that are held.
    `written`: the number of the last write under the token; 0: none yet.
    `lost`: when this took the place of a stored header that could not be read, in monotonic seconds; 0: it could be.
    `contested`: another worker claimed the stream before this one could write, and nothing was written since.
    """

    __slots__ = ("_headers", "approved", "contested", "lost", "packed", "seen", "slot", "stored", "token", "written")

    def __init__(
        self, slot: int, header: StreamHeader, token: int, stored: bool, approved: State | None, headers: Headers
    ) -> None:
        self.slot, self.token, self.stored, self.approved = slot, token, stored, approved
        self.written, self.lost, self.contested = 0, 0.0, False
        self.seen: Seen | None = None
        self.packed: bytes | StreamHeader = header
        self._headers = headers
        self.header = header

    @property
    def homeless(self) -> bool:
        """Whether the stream cannot be stored. Source answers its frames then, and they are not folded in."""
        return self.token == 0

    @property
    def header(self) -> StreamHeader:
        return self._headers.of(self)

    @header.setter
    def header(self, header: StreamHeader) -> None:
        self._headers.put(self, header)


class Headers:
    """The parsed headers, in two generations. Headers that are used move to the young one; those of the old one are
    packed little by little. Belongs to the worker's loop."""

    def __init__(self) -> None:
        self._young: dict[Resident, StreamHeader] = {}
        self._old: dict[Resident, StreamHeader] = {}
        self._born = 0.0

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def of(self, resident: Resident) -> StreamHeader:
        """A resident's header."""
        header = self._young.get(resident)
        if header is None:
            header = self._old.get(resident)
            self.put(resident, header := unpack(resident.packed) if header is None else header)
        return header

    def put(self, resident: Resident, header: StreamHeader) -> None:
        """Give a resident another header."""
        self._old.pop(resident, None)
        self._young[resident], resident.packed = header, b""
        self._pack(2)
        if len(self._young) >= PARSED:
            self._age()

    def forget(self, resident: Resident) -> None:
        """The resident is released. Passes under way may still ask it for its header."""
        header = self._young.pop(resident, None) or self._old.pop(resident, None)
        resident.packed = header or resident.packed

    def pack_idle(self, now: float) -> None:
        """Pack some headers that have not been used for a while; `now` is monotonic seconds."""
        self._pack(AT_ONCE)
        if not self._old and now - self._born >= LIFETIME_S:
            self._age()
            self._born = now

    def _age(self) -> None:
        self._pack(len(self._old))
        self._young, self._old = {}, self._young

    def _pack(self, count: int) -> None:
        for _ in range(min(count, len(self._old))):
            resident, header = self._old.popitem()
            resident.packed = pack(header)


def pack(header: StreamHeader) -> bytes | StreamHeader:
    """The header's bytes, compressed; or the header itself where the bytes would not give the same one back."""
    content = encode_header(header)
    try:
        same = StreamHeader.model_validate_json(content) == header
    except ValidationError:
        same = False
    return zlib.compress(content, 1) if same else header


def unpack(packed: bytes | StreamHeader) -> StreamHeader:
    """The header that was packed."""
    return packed if isinstance(packed, StreamHeader) else StreamHeader.model_validate_json(zlib.decompress(packed))
