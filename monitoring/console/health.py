"""Judges a stream in a level and a sentence, so that a page can show first what needs attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from schemas.prediction import Parameters
from schemas.update import UpdateEvent

Level = Literal["act", "watch", "good", "silent"]
ACT_DROP, WATCH_DROP = 0.08, 0.04  # of estimated accuracy below that of clean frames
EASE = 0.015  # hysteresis: a level ends only when the drop is so much smaller, so that no tile flickers
SOURCE_POINTS = 0.05  # difference of accuracies from which on the better model is named
REFUSED = 4  # proposed updates in a row that the guard refused
RECENT = 12  # events that still count as news
SILENT_S = 20.0


@dataclass(frozen=True)
class Evidence:
    """What is known about a stream. Accuracies are estimates in [0, 1], None if there is none yet.

    `clean` is the accuracy to expect without drift, `last` seconds since the epoch of the newest record, `events` the
    newest ones, oldest first.
    """

    accuracy: float | None
    source: float | None
    clean: float | None
    parameters: Parameters | None
    events: Sequence[UpdateEvent]
    last: float


@dataclass(frozen=True)
class Health:
    """`need` orders streams: higher first."""

    level: Level
    reason: str
    need: float


def judge(evidence: Evidence, now: float, before: Level = "good") -> Health:
    """The worst level that applies; `now` is seconds since the epoch, `before` the level so far."""
    drop = _drop(evidence)
    if now - evidence.last > SILENT_S:
        since = datetime.fromtimestamp(evidence.last, UTC).strftime("%H:%M:%S")
        reason = f"no frames since {since} UTC" if evidence.last else "no frames yet"
        return Health("silent", reason, 0.5)
    if worst := next(_findings(evidence, drop, before), None):
        level, reason = worst
        return Health(level, reason, (3.0 if level == "act" else 2.0) + drop)
    return Health("good", _praise(evidence), 1.0 + drop)


def _praise(evidence: Evidence) -> str:
    if evidence.accuracy is None:
        return "answering"
    gain = evidence.accuracy - evidence.source if evidence.source is not None else 0.0
    if gain >= SOURCE_POINTS:
        return f"held: {100 * gain:.0f} points above source"
    return "as on clean frames"


def _findings(evidence: Evidence, drop: float, before: Level) -> Iterator[tuple[Level, str]]:
    """All problems, the worst first."""
    recent = list(evidence.events)[-RECENT:]
    if drop >= ACT_DROP - (EASE if before == "act" else 0.0):
        yield "act", f"drifted: {100 * drop:.0f} points below clean"
    undone = [event for event in recent if event.decision in {"rolled_back", "reset"} and event.command is None]
    if undone:
        yield "act", f"{undone[-1].decision.replace('_', ' ')}: {undone[-1].reason}"
    refused = _refused_in_a_row(recent)
    if refused >= REFUSED:
        yield "act", f"{refused} updates refused: {recent[-1].reason}"
    if evidence.source is not None and evidence.accuracy is not None:
        ahead = evidence.source - evidence.accuracy
        if ahead >= SOURCE_POINTS and evidence.parameters != "source":
            yield "act", f"source would do better by {100 * ahead:.0f} points"
        elif ahead >= SOURCE_POINTS:
            yield "watch", "source answers: it does better"
    if drop >= WATCH_DROP - (EASE if before in {"act", "watch"} else 0.0):
        yield "watch", f"{100 * drop:.0f} points below clean"


def _drop(evidence: Evidence) -> float:
    if evidence.accuracy is None or evidence.clean is None:
        return 0.0
    return max(0.0, evidence.clean - evidence.accuracy)


def was_refused(event: UpdateEvent) -> bool:
    """Whether an update was proposed and the guard refused it; other skipped frames proposed none."""
    return event.decision == "skipped" and event.raw_gradient_norm is not None


def _refused_in_a_row(events: Sequence[UpdateEvent]) -> int:
    count = 0
    for event in reversed(events):
        if not was_refused(event):
            break
        count += 1
    return count
