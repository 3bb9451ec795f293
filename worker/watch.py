"""`driftkeel watch`: workers' predictions as lines, JSON or a live table, or drawn into the frames."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kafka import TopicPartition
from PIL import Image, ImageDraw
from pydantic import ValidationError
from rich.table import Table
from rich.text import Text

from schemas.config import Kafka, WorkerConfig
from schemas.errors import SourceError
from schemas.frame import Position
from schemas.prediction import Prediction
from worker.decode.image import open_image
from worker.kafka.batches import PassedOver
from worker.kafka.client import open_reader, require_topics, until_reached
from worker.kafka.inside import last_answer
from worker.kafka.topic import PATIENCE_MS
from worker.terminal import printable

log = logging.getLogger("driftkeel.watch")
REMEMBERED_IDS = 100_000
SILENT_S = 5.0  # a broker without news still answers every fetch
BAR = 18  # height in pixels of the strip that a label stands in
MAX_NAME = 200  # letters of a file's name that are a stream's; file systems take 255 bytes


class Watcher:
    """Reads the predictions topic without a consumer group, so that watching changes nothing for others."""

    def __init__(self, config: WorkerConfig, streams: set[str], beginning: bool, stop: threading.Event) -> None:
        self._kafka, self._streams, self._stop = config.kafka, streams, stop
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._away, self._patience_s = False, SILENT_S + config.kafka.fetch_max_wait_ms / 1000
        topic = self._kafka.topics.predictions
        require_topics(self._kafka, stop, [topic])
        self._consumer = _consumer(self._kafka, stop)
        places = [TopicPartition(topic, number) for number in self._consumer.partitions_for_topic(topic)]
        self._consumer.assign(places)
        (self._consumer.seek_to_beginning if beginning else self._consumer.seek_to_end)(*places)
        for place in places:
            self._consumer.position(place)  # now, and not with the first poll

    def predictions(self) -> Iterator[Prediction]:
        """Predictions, each once, until the run stops. Records that are no prediction are passed over."""
        passed_over, since = PassedOver(), time.monotonic()
        while not self._stop.is_set():
            polled = self._consumer.poll(timeout_ms=200)
            for records in polled.values():
                for record in passed_over.readable(records):
                    prediction = parsed(record.value)
                    if prediction and self._wanted(prediction):
                        yield prediction
            if polled:
                since = time.monotonic()  # The caller may have taken long over these predictions.
            self._look_at_broker(since)

    def _look_at_broker(self, since: float) -> None:
        """Log once that the broker does not answer, and once that it does again. To poll it looks like one without
        records."""
        silence = time.monotonic() - max(since, last_answer(self._consumer))
        if silence > self._patience_s and not self._away:
            log.warning(
                "the broker at %s has not answered for %.0f s; trying again until Ctrl-C",
                self._kafka.bootstrap,
                silence,
            )
            self._away = True
        elif silence < self._patience_s and self._away:
            log.info("the broker at %s answers again", self._kafka.bootstrap)
            self._away = False

    def close(self) -> None:
        """Close the connections."""
        self._consumer.close(autocommit=False)

    def _wanted(self, prediction: Prediction) -> bool:
        if (self._streams and prediction.stream not in self._streams) or prediction.id in self._seen:
            return False
        self._seen[prediction.id] = None
        if len(self._seen) > REMEMBERED_IDS:
            self._seen.popitem(last=False)
        return True


def _consumer(kafka: Kafka, stop: threading.Event) -> Any:
    make = partial(open_reader, kafka, auto_offset_reset="earliest")
    return until_reached(make, f"the broker at {kafka.bootstrap}", kafka.connect_timeout_s, stop)


def parsed(content: bytes | None) -> Prediction | None:
    """The prediction in a record's content; None where it is no prediction."""
    try:
        return Prediction.model_validate_json(content or b"")
    except ValidationError:
        return None


def line(prediction: Prediction) -> str:
    """A prediction as one line."""
    return (
        f"{prediction.event_time.astimezone():%H:%M:%S}  {printable(prediction.stream):20s} "
        f"{printable(prediction.label):16s} {prediction.confidence:5.0%}  {prediction.parameters:8s} "
        f"step {prediction.step:<6d} {_accuracy(prediction)}  {printable(prediction.id)}"
    )


def _accuracy(prediction: Prediction) -> str:
    estimated = prediction.estimated_accuracy
    return "accuracy  -   " if estimated is None else f"accuracy ~{estimated:4.0%}"


@dataclass
class LatestPredictions:
    """The newest prediction of each stream, and how many there were."""

    newest: dict[str, Prediction] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def take(self, prediction: Prediction) -> None:
        """Add one."""
        self.newest[prediction.stream] = prediction
        self.counts[prediction.stream] = self.counts.get(prediction.stream, 0) + 1

    def table(self) -> Table:
        """One row per stream."""
        table = Table(box=None, header_style="bold")
        table.add_column("stream", overflow="fold")  # Two cameras may differ in their names' last letter alone.
        for name in ("frames", "label", "confidence", "answered by", "step", "estimated accuracy"):
            table.add_column(name, min_width=max(map(len, name.split())))
        for name, last in sorted(self.newest.items()):
            table.add_row(
                Text(printable(name)),
                f"{self.counts[name]:,}",
                Text(printable(last.label)),
                f"{last.confidence:.0%}",
                last.parameters,
                str(last.step),
                "-" if last.estimated_accuracy is None else f"{last.estimated_accuracy:.0%}",
            )
        return table


class FrameMarker:
    """Fetches the frame of a prediction, writes the label into it, and keeps it as a JPEG."""

    def __init__(self, config: WorkerConfig, folder: Path, stop: threading.Event) -> None:
        self._folder, self._limits, self._topic = folder, config.frames, config.kafka.topics.frames
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SourceError(f"{folder} cannot be made: {error.strerror}; name another folder with --draw") from error
        self._consumer = _consumer(config.kafka, stop)

    def draw(self, prediction: Prediction) -> Path | None:
        """The picture's path. None where the topic has dropped the frame, or it is no picture within the limits. Raises
        SourceError where the disk is full."""
        position = Position.read(prediction.id)
        content = self._frame(position) if position is not None and position.topic == self._topic else None
        picture = self._decoded(content) if content else None
        if position is None or picture is None:
            return None
        canvas = Image.new("RGB", (max(picture.width, 160), picture.height + BAR))
        canvas.paste(picture, (0, BAR))
        text = f"{printable(prediction.label)} {prediction.confidence:.0%} {prediction.parameters}"
        ImageDraw.Draw(canvas).text((3, 3), text.encode("latin-1", "replace").decode("latin-1"), fill="white")
        path = self._folder / f"{_file_name(prediction.stream)}-{position.partition}-{position.offset}.jpg"
        try:
            canvas.save(path, "JPEG", quality=90)
        except OSError as error:
            raise SourceError(f"{path} cannot be written: {error.strerror or error}") from error
        return path

    def close(self) -> None:
        """Close the connections."""
        self._consumer.close(autocommit=False)

    def _frame(self, position: Position) -> bytes | None:
        place = TopicPartition(position.topic, position.partition)
        self._consumer.assign([place])
        self._consumer.seek(place, position.offset)
        records = self._consumer.poll(timeout_ms=PATIENCE_MS, max_records=1).get(place, [])
        return records[0].value if records and records[0].offset == position.offset else None

    def _decoded(self, content: bytes) -> Image.Image | None:
        try:
            return open_image(content, self._limits).convert("RGB")
        except Exception:  # noqa: BLE001 - decoders fail on hostile bytes in ways that no list of exceptions covers
            return None


def _file_name(stream: str) -> str:
    """The stream's name for use in a file's name. A long one is cut, and has a hash of the whole behind it."""
    name = quote(stream, safe="")
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
