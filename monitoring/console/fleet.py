"""What the console knows about every stream, in bounded memory. Threads add records, pages read."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from monitoring.console.health import RECENT, Evidence, Health, judge, was_refused
from monitoring.console.series import Series
from schemas.prediction import Prediction
from schemas.update import Proxies, UpdateEvent

EVENTS = 200  # in a stream's timeline; kept as text, as objects take ten times the memory
SPARK = 60  # points of a tile's line
UNSEEN = Health("silent", "no frames yet", 0.5)
STEADY = 12  # newest estimates whose mean is judged
RESULTS = 500  # commands whose outcome is remembered


@dataclass
class Stream:
    """One stream. `changed` is the fleet's version at its last change, `index` identifies it as long as it is kept."""

    index: int
    name: str
    changed: int = 0
    prediction: Prediction | None = None
    compared: Prediction | None = None  # the newest that has the source model's label too
    frames: int = 0
    last: float = 0.0
    points: Series = field(default_factory=Series)
    recent: deque[UpdateEvent] = field(default_factory=lambda: deque(maxlen=RECENT))
    timeline: deque[bytes] = field(default_factory=lambda: deque(maxlen=EVENTS))
    known: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=EVENTS))  # events: number, time
    event_count: int = 0
    proxies: Proxies | None = None  # the newest that an event had
    health: Health = UNSEEN

    @property
    def accuracy(self) -> float | None:
        """The newest estimate: of the last event, or of the last prediction if no event has one."""
        if self.proxies is not None:
            return self.proxies.estimated_accuracy
        return self.prediction.estimated_accuracy if self.prediction else None

    @property
    def newest(self) -> UpdateEvent | None:
        """The newest event."""
        return self.recent[-1] if self.recent else None

    @property
    def steady_accuracy(self) -> float | None:
        """The mean of the newest estimates: a single one is too uncertain to raise an alarm."""
        values = self.points.known("accuracy", STEADY)
        return float(values.mean()) if len(values) else self.accuracy


class Fleet:
    """All streams, at most `max_streams`: a new one replaces the one that has been silent for longest.

    `clean` is the bundle's accuracy on clean frames, None if no bundle could be read.
    """

    def __init__(self, max_streams: int, clean: float | None = None) -> None:
        self.clean = clean
        self._max = max_streams
        self._lock = threading.Lock()
        self._streams: dict[str, Stream] = {}
        self._by_index: dict[int, Stream] = {}
        self._gone: deque[tuple[int, int]] = deque(maxlen=max_streams)
        self._results: deque[tuple[int, UpdateEvent]] = deque(maxlen=RESULTS)
        self._version = self._next_index = 0

    def take_prediction(self, prediction: Prediction, frames: int = 1) -> None:
        """Take the newest of `frames` predictions of a stream."""
        with self._lock:
            stream = self._stream(prediction.stream)
            stream.prediction = prediction
            if prediction.source_label is not None:
                stream.compared = prediction
            stream.frames += frames
            stream.last = time.time()
            self._touch(stream)

    def take_update(self, event: UpdateEvent) -> None:
        """Take an update event; a repeated one changes nothing. A deleted stream is no longer shown."""
        with self._lock:
            if event.decision == "deleted":
                if event.stream in self._streams:
                    self._forget(self._streams[event.stream])
                return
            stream = self._stream(event.stream)
            if (mark := (event.number, event.time.timestamp())) in stream.known:
                return
            stream.known.append(mark)
            stream.recent.append(event)
            stream.timeline.append(json.dumps(_line(event)).encode())
            stream.event_count += 1
            stream.proxies = event.after or stream.proxies
            stream.points.add(event, was_refused(event))
            # The worker's clock may be ahead, and would make the stream seem alive after its last frame.
            stream.last = max(stream.last, min(event.time.timestamp(), time.time()))
            self._touch(stream)
            if event.command is not None:
                self._results.append((self._version, event))

    def note_stored(self, names: list[str]) -> None:
        """Show streams of the store even before a record of them comes."""
        with self._lock:
            for name in names[: self._max]:
                if name not in self._streams and len(self._streams) < self._max:
                    self._touch(self._stream(name))

    def find(self, index: int) -> Stream | None:
        """The stream with this index."""
        return self._by_index.get(index)

    def named(self, name: str) -> Stream | None:
        """The stream with this name."""
        return self._streams.get(name)

    def changes(self, since: int) -> dict[str, Any]:
        """What has changed since version `since`, for the fleet page; everything if that is 0."""
        with self._lock:
            self._judge_all()
            tiles = [self._tile(s) for s in self._streams.values() if s.changed > since]
            gone = [index for version, index in self._gone if version > since]
            results = [_line(event) for version, event in self._results if version > since > 0]
            return {"version": self._version, "all": since == 0, "tiles": tiles, "gone": gone, "results": results}

    def detail(self, index: int, point: int, event: int) -> dict[str, Any] | None:
        """A stream's points from number `point` and events from number `event` on; None for an unknown stream."""
        with self._lock:
            stream = self._by_index.get(index)
            if stream is None:
                return None
            lines, wanted = list(stream.timeline), max(0, stream.event_count - event)
            fresh = lines[max(0, len(lines) - wanted) :] if wanted else []
            return {
                "index": index,
                "clean": self.clean,
                "points": stream.points.since(point),
                "next_point": stream.points.count,
                "events": [json.loads(line) for line in fresh],
                "next_event": stream.event_count,
                "prediction": stream.prediction.model_dump(mode="json") if stream.prediction else None,
                "compared": stream.compared.model_dump(mode="json") if stream.compared else None,
                "proxies": stream.proxies.model_dump(mode="json") if stream.proxies else None,
            }

    def _stream(self, name: str) -> Stream:
        found = self._streams.get(name)
        if found is None:
            if len(self._streams) >= self._max:
                self._forget(min(self._streams.values(), key=lambda s: s.last))
            found = Stream(self._next_index, name)
            self._next_index += 1
            self._streams[name] = self._by_index[found.index] = found
        return found

    def _forget(self, stream: Stream) -> None:
        self._version += 1
        del self._streams[stream.name], self._by_index[stream.index]
        self._gone.append((self._version, stream.index))

    def _touch(self, stream: Stream) -> None:
        self._version += 1
        stream.changed = self._version

    def _judge_all(self) -> None:
        now = time.time()
        for stream in self._streams.values():
            health = self._judge(stream, now)
            if (health.level, health.reason) != (stream.health.level, stream.health.reason):
                self._touch(stream)
            stream.health = health

    def _judge(self, stream: Stream, now: float) -> Health:
        prediction, event = stream.prediction, stream.newest
        evidence = Evidence(
            accuracy=stream.steady_accuracy,
            source=event.after.source_accuracy if event and event.after else None,
            clean=self.clean,
            parameters=prediction.parameters if prediction else None,
            events=stream.recent,
            last=stream.last,
        )
        return judge(evidence, now, stream.health.level)

    def _tile(self, stream: Stream) -> dict[str, Any]:
        prediction, event = stream.prediction, stream.newest
        proxies = event.after if event and event.after else None
        return {
            "i": stream.index,
            "name": stream.name,
            "level": stream.health.level,
            "reason": stream.health.reason,
            "need": round(stream.health.need, 4),
            "accuracy": stream.steady_accuracy,
            "source": proxies.source_accuracy if proxies else None,
            "label": prediction.label if prediction else None,
            "confidence": prediction.confidence if prediction else None,
            "parameters": prediction.parameters if prediction else None,
            "step": event.step if event else prediction.step if prediction else None,
            "decision": _word(event) if event else None,
            "frames": stream.frames,
            "spark": (1000 * stream.points.outline("accuracy", SPARK)).round().astype(int).tolist(),
        }


def _word(event: UpdateEvent) -> str:
    return "refused" if was_refused(event) else event.decision


def _line(event: UpdateEvent) -> dict[str, Any]:
    """An event as the timeline shows it."""
    layers = sorted(event.layers.items(), key=lambda item: -item[1])[:8]
    return {
        "id": event.id,
        "stream": event.stream,
        "time": event.time.timestamp(),
        "decision": _word(event),
        "reason": event.reason,
        "frames": len(event.frames),
        "first": event.frames[0] if event.frames else None,
        "last": event.frames[-1] if event.frames else None,
        "step": event.step,
        "loss": event.loss,
        "flipped": event.flipped,
        "layers": layers,
        "parameters": event.parameters,
        "command": event.command,
        "worker": event.worker,
    }
