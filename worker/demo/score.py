"""The score: predictions and update events, compared with labels that the worker never sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.prediction import Prediction
from schemas.update import UpdateEvent
from worker.demo.cameras import Reel


@dataclass
class CameraScore:
    """The score of one camera. The arrays have one element per frame, in order."""

    reel: Reel
    source_right: npt.NDArray[np.bool_]
    sent: int = 0
    adapted_right: npt.NDArray[np.bool_] = field(init=False)
    predicted: npt.NDArray[np.bool_] = field(init=False)
    estimate: npt.NDArray[np.float32] = field(init=False)
    duplicated: int = 0
    applied: int = 0
    skipped: int = 0
    gradient_norm: float = 0.0
    estimated_accuracy: float = 0.0

    def __post_init__(self) -> None:
        count = len(self.reel.frames)
        self.adapted_right = np.zeros(count, np.bool_)
        self.predicted = np.zeros(count, np.bool_)
        self.estimate = np.full(count, np.nan, np.float32)

    def take_prediction(self, index: int, prediction: Prediction) -> None:
        """The first prediction of a frame counts; another one of the same id is a duplicate."""
        if self.predicted[index]:
            self.duplicated += 1
            return
        self.predicted[index] = True
        self.adapted_right[index] = prediction.index == self.reel.labels[index]
        if prediction.estimated_accuracy is not None:
            self.estimate[index] = self.estimated_accuracy = prediction.estimated_accuracy

    def take_update(self, event: UpdateEvent) -> None:
        if event.decision == "applied":
            self.applied += 1
        elif event.decision == "skipped":
            self.skipped += 1
        if event.raw_gradient_norm is not None:
            self.gradient_norm = event.raw_gradient_norm

    @property
    def answered(self) -> int:
        """Frames that have their prediction."""
        return int(self.predicted.sum())

    def accuracies(self) -> tuple[float, float]:
        """Accuracy of source and adapted model on the frames predicted so far."""
        if not self.answered:
            return 0.0, 0.0
        return float(self.source_right[self.predicted].mean()), float(self.adapted_right[self.predicted].mean())


class Scoreboard:
    """The scores of all cameras. Predictions may come before the broker has told their frame's position."""

    def __init__(self, cameras: list[CameraScore]) -> None:
        self.cameras = {score.reel.camera.stream: score for score in cameras}
        self._index: dict[str, tuple[CameraScore, int]] = {}
        self._early: dict[str, list[Prediction]] = {}
        self._events: set[str] = set()
        self.seconds = 0.0

    def sent(self, stream: str, index: int, frame_id: str) -> None:
        """The broker has given the frame its position."""
        self._index[frame_id] = (self.cameras[stream], index)
        for prediction in self._early.pop(frame_id, []):
            self.take_prediction(prediction)

    def take_prediction(self, prediction: Prediction) -> None:
        if prediction.id not in self._index:
            self._early.setdefault(prediction.id, []).append(prediction)
            return
        score, index = self._index[prediction.id]
        score.take_prediction(index, prediction)

    def take_update(self, event: UpdateEvent) -> None:
        if event.id not in self._events and event.stream in self.cameras:
            self._events.add(event.id)
            self.cameras[event.stream].take_update(event)

    @property
    def total(self) -> int:
        return sum(len(score.reel.frames) for score in self.cameras.values())

    @property
    def answered(self) -> int:
        return sum(score.answered for score in self.cameras.values())

    def results(self) -> dict[str, Any]:
        """The report's numbers."""
        streams: dict[str, dict[str, Any]] = {}
        for name, score in self.cameras.items():
            source, adapted = score.accuracies()
            streams[name] = {
                "shift": score.reel.camera.shift,
                "accuracy_source": source,
                "accuracy_adapted": adapted,
                "updates_applied": score.applied,
                "updates_skipped": score.skipped,
            }
        sent = sum(score.sent for score in self.cameras.values())
        source = float(np.mean([s["accuracy_source"] for s in streams.values()]))
        adapted = float(np.mean([s["accuracy_adapted"] for s in streams.values()]))
        gains = {name: s["accuracy_adapted"] - s["accuracy_source"] for name, s in streams.items()}
        shifted = [gain for name, gain in gains.items() if streams[name]["shift"] is not None]
        healthy = [gain for name, gain in gains.items() if streams[name]["shift"] is None]
        return {
            "frames_sent": sent,
            "frames_predicted": self.answered,
            "predictions_missing": sent - self.answered,
            "predictions_duplicated": sum(score.duplicated for score in self.cameras.values()),
            "accuracy_source": source,
            "accuracy_adapted": adapted,
            "gain_shifted_points": 100 * float(np.mean(shifted)),
            "gain_healthy_points": 100 * float(np.mean(healthy)),
            "streams": streams,
            "frames_per_second": self.answered / self.seconds if self.seconds else 0.0,
            "seconds": self.seconds,
        }
