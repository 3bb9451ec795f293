"""Small pictures of the frames on a page, fetched one by one from the positions that predictions name.

The frames topic is most of a site's traffic. A console that consumed all of it would double what the broker sends. This
one reads a frame only while somebody looks at its page.
"""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kafka import TopicPartition
from kafka.errors import KafkaError
from PIL import Image

from monitoring.console.app import Picture
from schemas.config import Frames, Kafka
from schemas.errors import ConfigError, FrameError
from schemas.frame import Position
from schemas.prediction import Prediction
from worker.decode.image import open_image
from worker.kafka.client import open_reader

SMALL, LARGE = 160, 480  # pixels of the longer side
CRISP = 96  # pixels: smaller frames are shown as PNG, without loss
EVERY_S = 0.9  # least time between two pictures of a stream
PATIENCE_S = 2.0  # longest time to wait for the frames of one request
TRIES = 5  # of fetching one frame, which may have been deleted
KEPT = 1_024  # pictures in memory


def thumbnail(content: bytes, limits: Frames, side: int) -> bytes:
    """`content` decoded, shrunk to `side` pixels and encoded again, so that none of its own bytes reach a browser.

    Raises FrameError as `worker.decode.image.open_image` does.
    """
    image = open_image(content, limits)
    try:
        if image.format == "JPEG":
            image.draft("RGB", (side, side))
        picture = image.convert("L" if image.mode in {"1", "L"} else "RGB")
        picture.thumbnail((side, side), Image.Resampling.BILINEAR)
        out = io.BytesIO()
        clean = Image.frombytes(picture.mode, picture.size, picture.tobytes())
        if max(clean.size) <= CRISP:
            clean.save(out, "PNG", compress_level=1)
        else:
            clean.save(out, "JPEG", quality=80)
        return out.getvalue()
    except Exception as error:  # A damaged image may fail anywhere between its first and last byte.
        raise FrameError("damaged", f"the image cannot be decoded: {error}") from error


@dataclass(frozen=True)
class _Kept:
    made: float
    picture: Picture
    tries: int = TRIES  # all of them used up, unless the frame could not be fetched


class Thumbnails:
    """Pictures by stream, made on request. One caller at a time reads from the broker; others wait."""

    def __init__(self, kafka: Kafka, limits: Frames) -> None:
        self._kafka, self._limits = kafka, limits
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, bool], _Kept] = OrderedDict()
        self._reader = FrameReader(kafka)

    def get(self, wanted: list[Prediction], large: bool) -> list[Picture]:
        """At most one picture per prediction, none if its frame cannot be fetched soon or cannot be decoded."""
        with self._lock:
            missing = self._missing(wanted, large)
            if missing:
                found = self._reader.read({position for position, _ in missing})
                for position, prediction in missing:
                    self._make(prediction, large, found.get(position))
            kept = [self._kept.get((prediction.stream, large)) for prediction in wanted]
        return [entry.picture for entry in kept if entry is not None and entry.picture.image]

    def close(self) -> None:
        with self._lock:
            self._reader.close()

    def _missing(self, wanted: list[Prediction], large: bool) -> list[tuple[Position, Prediction]]:
        now = time.monotonic()
        missing = []
        for prediction in wanted:
            kept = self._kept.get((prediction.stream, large))
            if kept is not None and (_is_final(kept, prediction) or now - kept.made < EVERY_S):
                continue
            position = Position.read(prediction.id)
            if position is not None and position.topic == self._kafka.topics.frames:
                missing.append((position, prediction))
        return missing

    def _make(self, prediction: Prediction, large: bool, content: bytes | None) -> None:
        key = (prediction.stream, large)
        before = self._kept.get(key)
        if content is None and before is not None and before.picture.image:
            return  # It did not arrive in time: an older picture is better than none.
        if content is None:
            tried = before.tries if before is not None and before.picture.prediction.id == prediction.id else 0
            self._keep(key, _Kept(time.monotonic(), Picture(prediction, b""), tried + 1))
            return
        image = b""
        if len(content) <= self._limits.max_bytes:
            # The worker has written a dead letter for a bad frame. Here its stream loses its picture.
            with contextlib.suppress(FrameError):
                image = thumbnail(content, self._limits, LARGE if large else SMALL)
        self._keep(key, _Kept(time.monotonic(), Picture(prediction, image)))

    def _keep(self, key: tuple[str, bool], entry: _Kept) -> None:
        self._kept[key] = entry
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)


def _is_final(kept: _Kept, prediction: Prediction) -> bool:
    """Whether the picture is of this prediction's frame, and fetching that again would not help."""
    return kept.picture.prediction.id == prediction.id and kept.tries >= TRIES


class FrameReader:
    """Fetches single records by their positions."""

    def __init__(self, kafka: Kafka) -> None:
        self._kafka = kafka
        self._consumer: Any = None

    def read(self, wanted: set[Position]) -> dict[Position, bytes]:
        """The values that arrive within `PATIENCE_S`; none if the broker does not answer."""
        try:
            if self._consumer is None:
                self._consumer = open_reader(self._kafka)
            return self._fetch(self._consumer, wanted)
        except (KafkaError, OSError, ConfigError):
            self.close()
            return {}

    def close(self) -> None:
        if self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            consumer.close(autocommit=False)

    def _fetch(self, consumer: Any, wanted: set[Position]) -> dict[Position, bytes]:
        left: dict[TopicPartition, list[int]] = {}
        for position in sorted(wanted):
            left.setdefault(TopicPartition(position.topic, position.partition), []).append(position.offset)
        existing = consumer.partitions_for_topic(self._kafka.topics.frames) or set()
        left = {partition: offsets for partition, offsets in left.items() if partition.partition in existing}
        consumer.assign(sorted(left))
        for partition, offsets in left.items():
            consumer.seek(partition, offsets[0])
        found: dict[Position, bytes] = {}
        deadline = time.monotonic() + PATIENCE_S
        while left and time.monotonic() < deadline:
            for partition, records in consumer.poll(timeout_ms=100, max_records=10_000).items():
                _pick(partition, records, left, found, consumer.seek)
                if not left.get(partition):
                    left.pop(partition, None)
                    consumer.pause(partition)
        consumer.assign([])
        return found


def _pick(
    partition: TopicPartition,
    records: list[Any],
    left: dict[TopicPartition, list[int]],
    found: dict[Position, bytes],
    seek: Callable[[TopicPartition, int], object],
) -> None:
    """Take the wanted offsets from `records`, and seek to the next one that is left."""
    offsets = left.get(partition, [])
    values = {record.offset: record.value for record in records}
    newest = max(values, default=-1)
    for offset in offsets:
        if values.get(offset) is not None:
            found[Position(partition.topic, partition.partition, offset)] = values[offset]
    # A wanted offset before the newest record did not come: it has been deleted or compacted away.
    left[partition] = [offset for offset in offsets if offset > newest]
    if left[partition] and left[partition][0] > newest + 1:
        seek(partition, left[partition][0])
