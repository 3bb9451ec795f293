"""Predictions as JSON bytes, for whole micro-batches.

They follow `schemas.prediction.Prediction`. To construct and validate a model for each frame would cost more than its
forward pass, so what a micro-batch shares is written once here. A test compares the bytes with the schema.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from json.encoder import encode_basestring as quoted

from schemas.prediction import Parameters


class PredictionWriter:
    """Writes the predictions of one worker under one bundle."""

    def __init__(self, labels: Sequence[str], bundle: str, worker: str) -> None:
        self._labels = [json.dumps(label, ensure_ascii=False) for label in labels]
        self._classes = [f'"index":{i},"label":{label},"confidence":' for i, label in enumerate(self._labels)]
        self._bundle, self._worker = quoted(bundle), quoted(worker)

    def shared(
        self, stream: str, step: int, parameters: Parameters, estimated_accuracy: float | None, pass_seconds: float
    ) -> str:
        """The fields that all frames of a micro-batch share."""
        accuracy = "null" if estimated_accuracy is None else repr(estimated_accuracy)
        return (
            f'{{"schema_version":1,"stream":{quoted(stream)},"bundle":{self._bundle},"step":{step},'
            f'"parameters":"{parameters}","estimated_accuracy":{accuracy},"worker":{self._worker},'
            f'"pass_seconds":{pass_seconds!r}'
        )

    def frame(
        self,
        shared: str,
        frame_id: str,
        event_time: str,
        index: Sequence[int],
        confidence: Sequence[float],
        wait_seconds: float,
        source: int | None = None,
    ) -> bytes:
        """One prediction. `event_time` is ISO 8601; `index` and `confidence` begin with the likeliest class; `source`
        is the class that the source model gives the frame."""
        classes, labels = self._classes, self._labels
        scores = [f"{classes[i]}{c!r}" for i, c in zip(index, confidence, strict=True)]
        top = "},{".join(scores)
        said = ("null", "null") if source is None else (source, labels[source])
        beside = f'"source_index":{said[0]},"source_label":{said[1]},'
        return (
            f'{shared},"id":{quoted(frame_id)},"event_time":"{event_time}",'
            f'{scores[0]},"top":[{{{top}}}],{beside}'
            f'"wait_seconds":{wait_seconds!r}}}'
        ).encode()
