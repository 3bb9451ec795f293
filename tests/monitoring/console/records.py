"""Records as a worker writes them, with everything a test does not care for filled in."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from schemas.prediction import ClassScore, Prediction
from schemas.update import Proxies, UpdateEvent


def prediction(stream: str, **changes: Any) -> Prediction:
    label, confidence = changes.pop("label", "nut"), changes.pop("confidence", 0.9)
    return Prediction(
        **{
            "id": f"frames/0/{changes.pop('offset', 0)}",
            "stream": stream,
            "event_time": datetime.now(UTC),
            "index": 0,
            "label": label,
            "confidence": confidence,
            "top": [ClassScore(index=0, label=label, confidence=confidence)],
            "bundle": "b" * 64,
            "step": 1,
            "parameters": "adapted",
            "estimated_accuracy": 0.9,
            "worker": "w",
            "wait_seconds": 0.0,
            "pass_seconds": 0.0,
            **changes,
        }
    )


def event(stream: str, number: int, accuracy: float | None = 0.9, **changes: Any) -> UpdateEvent:
    after = None
    if accuracy is not None:
        after = Proxies(
            estimated_accuracy=accuracy,
            confidence=0.9,
            entropy=0.2,
            source_accuracy=changes.pop("source", None),
            low=changes.pop("low", None),
            high=changes.pop("high", None),
            flip_rate=changes.pop("flip_rate", None),
        )
    return UpdateEvent(
        **{
            "id": f"{stream}@{number}",
            "stream": stream,
            "time": datetime.fromtimestamp(time.time(), UTC),
            "decision": "applied",
            "reason": "within limits",
            "frames": [f"frames/0/{number}"],
            "step": number,
            "loss": 0.5,
            "raw_gradient_norm": 10.0,
            "generated_gradient_norm": 1.0,
            "source_distance": 0.1 * number,
            "after": after,
            "token": 1,
            "bundle": "b" * 64,
            "worker": "w",
            **changes,
        }
    )
