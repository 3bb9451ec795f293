"""Streams in memory: those that were used lately with a parsed header, the others with its bytes.

A parsed header takes about 10 KB of small objects, packed it takes 1.2 KB; packing and checking one takes some 40
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
    """A stream whose state is in memory: its slot in the engine's tensors, its header, the worker's token.

    `stored` says whether the store has these tensors; what is fresh or was reset is not there yet. A stream that
    was released and admitted again has another object, by which what was begun before is known to be void. `approved`
    are the parameters that a person approved, of those that make the model. `seen` is what the model has put out for
    frames that are held. A token of 0 is no claim: the store cannot keep the stream. `written` is the number of the
    last write under the token; 0: none yet. `lost` is when the place of a stored header was taken that could not be
    read (monotonic seconds); 0: it could. `contested`: another worker claimed the stream before this one could write,
    and nothing has been written since.
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
        """Whether nothing of the stream can be stored: source answers its frames, and nothing is made of them."""
        return self.token == 0

    @property
    def header(self) -> StreamHeader:
        return self._headers.of(self)

    @header.setter
    def header(self, header: StreamHeader) -> None:
        self._headers.put(self, header)


class Headers:
    """The parsed headers, in two generations: what is used moves to the young one, the old one is packed bit by bit.

    Belongs to the worker's loop.
    """

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
        """It is released; passes under way may still ask it for its header."""
        header = self._young.pop(resident, None) or self._old.pop(resident, None)
        resident.packed = header or resident.packed

    def pack_idle(self, now: float) -> None:
        """Pack some of what has not been used for a while; `now` is monotonic seconds."""
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
    """The header's bytes, compressed; or itself, where these would not give it back as it is."""
    content = encode_header(header)
    try:
        same = StreamHeader.model_validate_json(content) == header
    except ValidationError:
        same = False
    return zlib.compress(content, 1) if same else header


def unpack(packed: bytes | StreamHeader) -> StreamHeader:
    """What was packed."""
    return packed if isinstance(packed, StreamHeader) else StreamHeader.model_validate_json(zlib.decompress(packed))
