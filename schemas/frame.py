"""A frame as it arrives: one Kafka record of one stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from schemas.command import EVERY_STREAM
from schemas.errors import FrameError

FRAME_TYPE = "io.driftkeel.frame.v1"
MAX_STREAM_BYTES = 1_000  # of a stream id, whatever frames.max_stream_id_bytes says
OFFSET_DIGITS = 18  # of any that a broker will ever give
YEARS = 2, 9_998  # every zone has a name for their moments
LATEST_MS = 253_370_764_800_000  # the beginning of year 9999


@dataclass(frozen=True, order=True, slots=True)
class Position:
    """Where a frame lies in Kafka."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}/{self.offset}"

    @staticmethod
    def of(record: Any) -> Position:
        """Of what Kafka's clients call a record, or say of one that was sent."""
        return Position(record.topic, record.partition, record.offset)

    @staticmethod
    def read(text: str) -> Position | None:
        """What `str` made of one; None where the text, which may come from anywhere, is no place in Kafka."""
        topic, partition, offset = ["", "", *text.rsplit("/", 2)][-3:]
        plain = all(part.isascii() and part.isdecimal() and len(part) <= OFFSET_DIGITS for part in (partition, offset))
        return Position(topic, int(partition), int(offset)) if plain else None

    @property
    def log(self) -> str:
        """The partition's name in stored states: topic/partition."""
        return f"{self.topic}/{self.partition}"


@dataclass(frozen=True, slots=True)
class Frame:
    """One encoded image of one stream, validated but for its pixels."""

    stream: str
    position: Position
    image: bytes
    event_time: datetime
    traceparent: str | None = None
    sent: float = 0.0  # the record's timestamp, seconds since the epoch


def parse_frame(
    position: Position,
    key: bytes | None,
    value: bytes | None,
    headers: Sequence[tuple[str, bytes]],
    timestamp_ms: int,
    max_bytes: int,
    max_stream_id_bytes: int,
) -> Frame:
    """Check everything of a record but the image itself.

    Event time is the CloudEvents header `ce_time` where it can be read, else the record's timestamp.
    Raises FrameError with kind no_key, bad_key, empty or too_large.
    """
    stream = _stream_id(key, max_stream_id_bytes)
    if not value:
        raise FrameError("empty", "the record has no value; send the image bytes as the value")
    if len(value) > max_bytes:
        raise FrameError("too_large", f"{len(value)} bytes are more than frames.max_bytes = {max_bytes}")
    known = {name.lower(): content for name, content in headers}
    return Frame(
        stream=stream,
        position=position,
        image=value,
        event_time=_event_time(known.get("ce_time"), timestamp_ms),
        traceparent=_text(known.get("traceparent"), 55),
        sent=timestamp_ms / 1000,
    )


def _stream_id(key: bytes | None, limit: int) -> str:
    if not key:
        raise FrameError("no_key", "the record has no key; send the stream id as the key")
    if len(key) > limit:
        raise FrameError(
            "bad_key", f"a stream id of {len(key)} bytes is longer than frames.max_stream_id_bytes = {limit}"
        )
    try:
        stream = key.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FrameError("bad_key", "the key is not UTF-8 text") from error
    if stream == EVERY_STREAM:
        raise FrameError("bad_key", f"{EVERY_STREAM} stands for all streams in commands; it cannot be one")
    if not stream.isprintable():
        raise FrameError("bad_key", "the stream id has control characters")
    return stream


def _event_time(header: bytes | None, timestamp_ms: int) -> datetime:
    text = _text(header, 64)
    if text:
        try:
            moment = datetime.fromisoformat(text)
            # Offsets may have seconds here, which JSON's readers do not know; and zones end where the calendar does.
            moment = moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
            if YEARS[0] <= moment.year <= YEARS[1]:
                return moment
        except (ValueError, OverflowError):
            pass  # A sender's bad clock text is no reason to lose its frame.
    return datetime.fromtimestamp(max(0, timestamp_ms) / 1000 if timestamp_ms < LATEST_MS else 0, UTC)


def _text(header: bytes | None, limit: int) -> str | None:
    if not header or len(header) > limit or not header.isascii():
        return None
    text = header.decode("ascii")
    return text if text.isprintable() else None
