"""`driftkeel produce`: sends pictures of files and cameras to the frames topic, at their own pace, each once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from kafka.errors import KafkaError, KafkaTimeoutError, MessageSizeTooLargeError, RecordListTooLargeError
from kafka.partitioner.default import murmur2

from schemas.cloud_event import cloud_event
from schemas.config import Kafka, WorkerConfig
from schemas.errors import DriftkeelError, SourceError
from schemas.frame import FRAME_TYPE
from worker.kafka.client import FIRST_PAUSE_S, LONGEST_PAUSE_S, close_producer, require_topics, until_reached
from worker.kafka.inside import metadata
from worker.kafka.topic import topic_id
from worker.produce.sent import Acknowledged, Sent, read_back
from worker.produce.sources import Encoding, Item, Picture
from worker.publish.publisher import open_producer

log = logging.getLogger("driftkeel.produce")
MAX_ON_THE_WAY = 32 << 20  # bytes that are not acknowledged yet, of all streams together
ACKNOWLEDGE_TIMEOUT_S = 120.0
NOTE_EVERY_S = 1.0
STOPPED_TIMEOUT_S = 10.0  # the same once the run is to stop: somebody waits, and the next run goes on from there
FLUSH_S = 0.5
STOP_PATIENCE_S = 2.0


@dataclass(frozen=True)
class PlayOptions:
    """How to play. `fast`: as fast as the broker accepts. `now`: a frame's event time is when it is sent.

    `again`: also send what was sent before. `loop`: repeat until stopped, and remember nothing. `limit`: most frames of
    each stream.
    """

    encoding: Encoding = field(default_factory=Encoding)
    fast: bool = False
    now: bool = False
    again: bool = False
    loop: bool = False
    limit: int | None = None


@dataclass
class Tally:
    """Counts of one stream's frames in this run. `before`: passed over, as an earlier run had sent them."""

    stream: str
    sent: int = 0
    bytes: int = 0
    before: int = 0
    dropped: int = 0


class Sender:
    """An idempotent producer with a bounded number of bytes on the way. Safe to use from several threads.

    `error` is about the first record that the broker refused for good; nothing after it counts as sent.
    """

    def __init__(self, config: WorkerConfig, stop: threading.Event) -> None:
        self._kafka, self._max_bytes, self._stop = config.kafka, config.frames.max_bytes, stop
        self._room, self._on_the_way = threading.Condition(), 0
        self.error: DriftkeelError | None = None
        require_topics(self._kafka, stop, [self._kafka.topics.frames])
        what = f"the broker at {self._kafka.bootstrap}"
        make = partial(open_producer, self._kafka, ACKNOWLEDGE_TIMEOUT_S)
        self._producer = until_reached(make, what, self._kafka.connect_timeout_s, stop)
        self._partitions = sorted(self._producer.partitions_for(self._kafka.topics.frames))
        self.topic_id = topic_id(metadata(self._producer), self._kafka.topics.frames)

    def partition(self, stream: str) -> int:
        """The partition of a stream's frames, chosen as Kafka's own producers do."""
        return int(self._partitions[(murmur2(stream.encode()) & 0x7FFFFFFF) % len(self._partitions)])

    def make_room(self, size: int, wait: bool) -> bool:
        """Reserve `size` bytes. False if there is no room and `wait` is False, or if the run ends."""
        with self._room:
            while self._on_the_way and self._on_the_way + size > MAX_ON_THE_WAY:
                if not wait or self._stop.is_set() or self.error:
                    return False
                self._room.wait(0.1)
            self._on_the_way += size
        return True

    def send(
        self, stream: str, item: str, number: str, picture: Picture, taken: datetime, sent: Callable[[Any], None]
    ) -> None:
        """Send a frame whose room is reserved. `sent` is called with the record's position. Raises SourceError."""
        size = len(picture.content)
        if size > self._max_bytes:
            raise SourceError(
                f"{stream}: frame {number} of {item} has {size:,} bytes, more than the frames.max_bytes = "
                f"{self._max_bytes:,} that workers accept; raise it in their configuration, or make frames smaller "
                "with --size or --quality"
            )
        source = item.encode("ascii", "replace").decode()
        try:
            future = self._producer.send(
                self._kafka.topics.frames,
                key=stream.encode(),
                value=picture.content,
                headers=cloud_event(FRAME_TYPE, source, number, taken, picture.content_type),
                partition=self.partition(stream),
            )
        except KafkaError as error:
            raise explained(error, self._kafka, stream, size) from error
        future.add_callback(self._accepted, size, sent)
        future.add_errback(self._refused, size, stream)

    def finish(self) -> None:
        """Wait for all acknowledgements. Raises SourceError if a frame was refused, or the broker does not answer."""
        since, left = time.monotonic(), self._on_the_way
        while not self._flushed():
            if self._on_the_way < left:  # A slow broker may take as long as it needs.
                since, left = time.monotonic(), self._on_the_way
            patience = STOPPED_TIMEOUT_S if self._stop.is_set() else ACKNOWLEDGE_TIMEOUT_S
            if time.monotonic() - since >= patience:
                raise explained(KafkaTimeoutError(f"no answer within {patience:.0f} s"), self._kafka, "frames", 0)
        if self.error:
            raise self.error

    def _flushed(self) -> bool:
        try:
            self._producer.flush(timeout=FLUSH_S)
        except KafkaTimeoutError:
            return False
        except KafkaError as error:
            raise explained(error, self._kafka, "frames", 0) from error
        return True

    def close(self) -> None:
        """Close the connections."""
        close_producer(self._producer, 2)

    def _accepted(self, size: int, sent: Callable[[Any], None], place: Any) -> None:
        with self._room:
            self._on_the_way -= size
            if self.error is None:
                sent(place)
            self._room.notify_all()

    def _refused(self, size: int, stream: str, error: Exception) -> None:
        with self._room:
            self._on_the_way -= size
            self.error = self.error or explained(error, self._kafka, stream, size)
            self._room.notify_all()


def explained(error: Exception, kafka: Kafka, stream: str, size: int) -> SourceError:
    """The broker's refusal as an error that says what to do."""
    topic = kafka.topics.frames
    if isinstance(error, MessageSizeTooLargeError | RecordListTooLargeError):
        wanted = -(-(size + 2_048) // 65_536) * 65_536
        return SourceError(
            f"{stream}: a frame of {size:,} bytes is more than the broker takes for topic {topic}; set the topic's "
            f"max.message.bytes (kafka-configs.sh --alter --topic {topic} --add-config max.message.bytes={wanted}) and "
            f"the workers' frames.max_bytes to at least {wanted}, or make frames smaller with --size or --quality"
        )
    reason = " ".join(str(error).split()) or type(error).__name__
    return SourceError(
        f"the broker at {kafka.bootstrap} did not take frames for topic {topic}: {reason}; correct that and run the "
        "same command again, it continues where this one stopped"
    )


@dataclass
class Player:
    """Plays the items of one stream, one after another."""

    stream: str
    items: Iterable[Item]
    sender: Sender
    kafka: Kafka
    options: PlayOptions
    stop: threading.Event
    memory: Sent | None = None
    tally: Tally = field(init=False)

    def __post_init__(self) -> None:
        self.tally = Tally(self.stream)
        self._acknowledged, self._lock = Acknowledged(), threading.Lock()
        self._noted = self._began = time.monotonic()
        self._clock: float | None = None  # when the current item would have begun, played at its own speed

    def play(self) -> None:
        """Play until the items end, the limit is reached or the run stops. Raises SourceError and UnreachableError."""
        if self.memory:
            start = self.memory.reached(self.stream)
            partition = self.sender.partition(self.stream)
            self.memory.note(self.stream, read_back(self.kafka, partition, self.stream, start))
        self._began = time.monotonic()
        for number, item in self._rounds():
            if self.stop.is_set() or self._enough():
                break
            # Frames of a loop get other numbers, so that they are not taken for the item's own when read back later.
            self._play(item, f"{number}." if self.options.loop else "")

    def remember(self) -> None:
        """Write what has been acknowledged."""
        with self._lock:
            acknowledged, self._acknowledged = (
                self._acknowledged,
                Acknowledged(next_offset=self._acknowledged.next_offset),
            )
        self._noted = time.monotonic()
        if self.memory and (acknowledged.frames or acknowledged.done):
            self.memory.note(self.stream, acknowledged)

    def _rounds(self) -> Iterator[tuple[int, Item]]:
        items = list(self.items) if self.options.loop else self.items
        rounds = 0
        while True:
            sent = self.tally.sent
            for item in items:
                yield rounds, item
            if not self.options.loop or self.tally.sent == sent:  # Nothing was sent: a pipe gives its frames once.
                return
            rounds += 1

    def _play(self, item: Item, round_name: str) -> None:
        skip = self._sent_before(item) if item.remembered else 0
        if skip is None:
            return
        self._clock = None
        encoding = self.options.encoding
        pictures = _reconnecting(item, encoding, self.stop) if item.live else item.pictures(encoding, skip)
        nothing = True
        # A live source is not asked for the next frame before this one is sent.
        marked = _with_last(pictures) if item.remembered else ((picture, False) for picture in pictures)
        for picture, last in marked:
            nothing = False
            if not self._send(item, picture, round_name, last):
                return
        if nothing and skip:
            self._acknowledged.done.add(item.name)

    def _sent_before(self, item: Item) -> int | None:
        """How many frames of an item to pass over; None: all of them."""
        if self.memory is None:
            return 0
        if self.options.again:
            self.memory.forget(self.stream, item.name)
            return 0
        frames, done = self.memory.frames(self.stream, item.name)
        self.tally.before += frames
        return None if done else frames

    def _send(self, item: Item, picture: Picture, round_name: str, last: bool) -> bool:
        """Send one picture; False if the run ends here."""
        if not item.live:
            self._pace(picture)
        if self.sender.error or self.stop.is_set() or self._enough():
            return False
        if not self.sender.make_room(len(picture.content), wait=not item.live):
            self.tally.dropped += item.live
            return item.live
        taken = picture.time if picture.time and not self.options.now else datetime.now(UTC)

        def sent(place: Any) -> None:
            with self._lock:
                self._acknowledged.take(item.name, picture.index, int(place.offset), last)

        self.sender.send(self.stream, item.name, f"{round_name}{picture.index}", picture, taken, sent)
        self.tally.sent += 1
        self.tally.bytes += len(picture.content)
        if time.monotonic() - self._noted > NOTE_EVERY_S:
            self.remember()
        return not self._enough()

    def _pace(self, picture: Picture) -> None:
        """Wait until the picture is due: by the clock of its video, or by `fps` if it has none."""
        fps = self.options.encoding.fps
        if self.options.fast or (picture.at is None and fps is None):
            return
        now = time.monotonic()
        if picture.at is None:
            due = self._began + self.tally.sent / (fps or 1)
        else:
            self._clock = now - picture.at if self._clock is None else self._clock
            due = self._clock + picture.at
        self.stop.wait(max(0.0, due - now))

    def _enough(self) -> bool:
        return self.options.limit is not None and self.tally.sent >= self.options.limit


def _with_last(pictures: Iterator[Picture]) -> Iterator[tuple[Picture, bool]]:
    """Each picture, and whether it is the last."""
    held = next(pictures, None)
    while held is not None:
        following = next(pictures, None)
        yield held, following is None
        held = following


def _reconnecting(item: Item, encoding: Encoding, stop: threading.Event) -> Iterator[Picture]:
    """A camera's pictures. Once it has given one, the camera is waited for when it goes away."""
    index, pause = 0, FIRST_PAUSE_S
    while not stop.is_set():
        try:
            for picture in item.pictures(encoding, index):
                index, pause = picture.index + 1, FIRST_PAUSE_S
                yield picture
            return
        except SourceError as error:
            if index == 0:
                raise
            log.warning("%s; trying again", error)
        stop.wait(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def produce(
    config: WorkerConfig, streams: dict[str, Iterable[Item]], options: PlayOptions, state: Path, stop: threading.Event
) -> list[Tally]:
    """Play all streams at the same time, a thread each. Raises the first error of any, after all have stopped."""
    sender = Sender(config, stop)
    try:
        memory = None if options.loop else Sent(state, config.kafka, sender.topic_id)
    except SourceError:
        sender.close()
        raise
    players = [Player(name, items, sender, config.kafka, options, stop, memory) for name, items in streams.items()]
    failures: list[Exception] = []

    def attempt(action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - raised again below, in the main thread
            failures.append(error)
            stop.set()

    # Daemons, as a thread that waits for standard input must not keep the process alive.
    threads = [threading.Thread(target=attempt, args=(player.play,), daemon=True) for player in players]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not stop.is_set():
            thread.join(0.1)
    for thread in threads:
        thread.join(STOP_PATIENCE_S)
    attempt(sender.finish)
    for player in players:
        attempt(player.remember)
    sender.close()
    if memory:
        memory.close()
    if failures:
        raise failures[0]
    return [player.tally for player in players]
