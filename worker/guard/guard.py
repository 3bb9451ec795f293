"""The guard: may this update become the stream's state, and do the adapted parameters still answer?

It keeps what it knows of a stream in the stream's header (`GuardState`), so that its decisions survive the worker and
repeat after a crash. docs/trust.md lists the rules with their sources and numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from schemas.bundle import Limits
from schemas.config import Guard as GuardSettings
from schemas.state import GuardState, Level, RunningProxies
from schemas.update import Decision

YOUNG = 256  # frames of a new stream that source answers in full
WATCH = 256  # frames that it answers after an alarm or a doubt
RECENT = 16  # checksums kept: a loop of so many frames is a repetition
FILLS = 0.75  # share of a micro-batch at which one class fills it
LEVEL_SEEN, LEVEL_WINDOW = 16, 64  # updates before a stream has a level of its own; and those it rests on
LEAST_SPREAD = 0.25  # of a level, so that a steady stream is no trap
LEAST_SHARE = 0.1  # of an update that is shrunk
COSINE_SEEN, COSINE_WINDOW = 64, 64
TOLERATED, MOST_STAKE = 0.1, 1.2  # of the bet: mean rank from the middle; and its largest stake
DISAGREES = 0.5  # share of frames where the adapted and the source model differ that makes a collapse of a doubt
LEEWAY = 0.1  # of disagreement where nobody estimates accuracy: chance among so few frames
ASTRAY = "answers leave source, which is as sure as on clean frames"
ENOUGH = 64  # frames that both must have answered before trust may be lost
PATIENCE = 128  # frames of doubt before the stream goes back
REST, MOST_RESETS, FORGIVEN = 64, 6, 4_096  # frames after a reset, doubled with each until so many frames were sound


@dataclass(frozen=True)
class Ruling:
    """What to do with an update, and why. `share`: how much of the parameters' way is gone.

    `rolled_back` asks for the last good snapshot, and means source where there is none.
    """

    decision: Decision
    reason: str
    share: float = 1.0

    @property
    def apply(self) -> bool:
        """Whether the update becomes the state, whole or in part."""
        return self.decision in ("applied", "partial")

    @property
    def back(self) -> bool:
        """Whether the parameters go back to what they were before."""
        return self.decision in ("rolled_back", "reset")


@dataclass(frozen=True)
class Sight:
    """What pixels and answers of a micro-batch say beside its signals.

    checksums of the frames; share of them that are `blank`; the class that is answered most often, and its share; the
    mean `rank`, in [-0.5, 0.5], of the source model's entropy among those of clean frames, None where it was not asked.
    """

    checksums: Sequence[int]
    blank: float
    dominant: int
    share: float
    rank: float | None


class Guard:
    """Judges updates. A skipped update leaves every part of the stream's parameters as they were.

    `clean_accuracy`: of source, for a method whose own accuracy nobody estimates; None where somebody does.
    """

    def __init__(self, settings: GuardSettings, limits: Limits, clean_accuracy: float | None = None) -> None:
        self.settings, self._limits, self._clean_accuracy = settings, limits, clean_accuracy
        self._max_gradient = settings.max_gradient_factor * limits.raw_gradient_norm
        self.max_distance = settings.max_distance_factor * limits.source_distance

    def observe(self, before: GuardState, sight: Sight, proxies: RunningProxies) -> GuardState:
        """What is known after a micro-batch, whether it makes an update or not. `proxies` are those after it."""
        own = {"gradient": before.gradient.model_copy(), "update": before.update.model_copy()}
        state = before.model_copy(update=own)
        frames = len(sight.checksums)
        state.watchful = max(0, state.watchful - frames)
        state.rest = max(0, state.rest - frames)
        state.sound += frames
        if state.sound > FORGIVEN:
            state.resets = 0
        state.recent = [*before.recent, *sight.checksums][-RECENT:]
        self._count_alike(state, sight, frames)
        self._bet(state, sight, proxies)
        self._trust(state, frames, proxies)
        return state

    def judge(
        self,
        before: GuardState,
        state: GuardState,
        sight: Sight,
        proxies: RunningProxies,
        signals: Mapping[str, float],
        finite: bool,
    ) -> Ruling:
        """`state` is what `observe` made of `before`; its levels move here. `signals` of the stream as the method
        reports them, and the `present_distance` from source; `finite`: all numbers of the proposed state are."""
        if not finite or not all(math.isfinite(value) for value in signals.values()):
            return Ruling("skipped", "not finite")
        if reason := self.blinded(before, sight):
            return Ruling("skipped", reason)
        if reason := self._taken_over(state, proxies):
            return self._go_back(state, reason)
        if reason := self._teaches_nothing(state):
            return Ruling("skipped", reason)
        if reason := self._worse(state, proxies):
            return self._go_back(state, reason)
        gradient = signals["raw_gradient_norm"]
        distance, present = signals["source_distance"], signals["present_distance"]
        if gradient > self._max_gradient:
            return Ruling("skipped", f"gradient norm {gradient:.3g} above its limit {self._max_gradient:.3g}")
        # A state may be beyond the limit already, which was lowered since, or which it was imported past. Its way back
        # is open: no update leads further out, and an update that is shrunk ends between two points that are allowed.
        if distance > max(self.max_distance, present):
            reason = f"distance from source {distance:.3g} above its limit {self.max_distance:.3g}"
            beyond = f" and the present {present:.3g}" if present > self.max_distance else ""
            return Ruling("skipped", reason + beyond)
        return self._measured(state, signals)

    def blinded(self, before: GuardState, sight: Sight) -> str:
        """Why the camera seems to see nothing, whether there is an update or not: most frames are blank or came before.
        Empty where most are neither."""
        most, frames = self.settings.max_repeats, len(sight.checksums)
        if sight.blank > most:
            return f"{sight.blank:.0%} of the frames are blank: covered camera?"
        seen, repeats = set(before.recent), 0
        for checksum in sight.checksums:
            repeats += checksum in seen
            seen.add(checksum)
        if repeats / frames > most:
            return f"{repeats / frames:.0%} of the frames repeat earlier ones: frozen camera?"
        return ""

    def _count_alike(self, state: GuardState, sight: Sight, frames: int) -> None:
        """Up while one class fills the micro-batches, but for errors; down, and sooner, while others come."""
        if sight.share < FILLS:
            state.alike = max(0, state.alike - 4 * frames)
        elif sight.dominant == state.dominant:
            state.alike = min(state.alike, self.settings.max_alike) + frames
        else:
            state.dominant, state.alike = sight.dominant, frames

    # --- rules -----------------------------------------------------------------------------------------------------

    def _taken_over(self, state: GuardState, proxies: RunningProxies) -> str:
        """Of a method whose accuracy is not estimated: no update brings it back from one class, so it does not wait for
        one. Source disagrees on less than in other collapses where it is about to see little else itself."""
        most, moved = self.settings.max_alike, proxies.signals.get("moved", 0.0)
        known = self._clean_accuracy is not None and proxies.shadowed >= ENOUGH
        if known and state.alike > most and moved >= DISAGREES / 2:
            return f"collapse: one class for more than {most} frames while source disagrees"
        return ""

    def _teaches_nothing(self, state: GuardState) -> str:
        if state.alike > self.settings.max_alike:
            return f"one class for more than {self.settings.max_alike} frames"
        return resting(state)

    def _worse(self, state: GuardState, proxies: RunningProxies) -> str:
        signals = proxies.signals
        if not state.trusted and state.doubted > PATIENCE:
            return "source is estimated to do better" if self._clean_accuracy is None else ASTRAY
        if proxies.shadowed < ENOUGH or signals.get("moved", 0.0) < DISAGREES:
            return ""
        entropy, marginal = signals.get("entropy", 1.0), signals.get("marginal", 1.0)
        if entropy < self.settings.min_entropy:
            return f"collapse: entropy {entropy:.2g} of its largest while source disagrees"
        if marginal < self.settings.min_marginal_entropy:
            return f"collapse: marginal entropy {marginal:.2g} of its largest while source disagrees"
        return ""

    def _go_back(self, state: GuardState, reason: str) -> Ruling:
        """Back, and rest; a second time soon after, a snapshot is no help either."""
        decision: Decision = "reset" if state.resets else "rolled_back"
        state.rest = REST << min(MOST_RESETS, state.resets)
        state.resets = min(MOST_RESETS, state.resets + 1)
        state.sound = state.doubted = 0
        state.gradient, state.update, state.cosine, state.cosines = Level(), Level(), 0.0, 0
        state.watchful = WATCH
        return Ruling(decision, reason)

    def _measured(self, state: GuardState, signals: Mapping[str, float]) -> Ruling:
        """Whole, or shrunk to the stream's own limits."""
        share, reason = 1.0, "within limits"
        for name, level in (("raw_gradient_norm", state.gradient), ("generated_gradient_norm", state.update)):
            limit = level_limit(level, self.settings.max_jump)
            value = signals.get(name, 0.0)
            if value > limit and limit / value < share:
                share = max(LEAST_SHARE, limit / value)
                reason = f"{name.replace('_', ' ')} {value:.3g} above the stream's own limit {limit:.3g}: shrunk"
            move_level(level, value, self.settings.max_jump)
        most = self.settings.max_distance_factor * (self._limits.generated_gradient_norm or math.inf)
        generated = signals.get("generated_gradient_norm", 0.0)
        if generated * share > most:
            share = most / generated
            reason = f"generated gradient norm {generated:.3g} above its limit {most:.3g}: shrunk"
        self._move_cosine(state, signals.get("cosine", 0.0))
        least = self._limits.cosine
        if least is not None and state.cosines >= COSINE_SEEN and state.cosine < least:
            return Ruling("skipped", f"generated gradients turn from the raw ones: mean cosine {state.cosine:.2f}")
        return Ruling("applied" if share == 1 else "partial", reason, share)

    @staticmethod
    def _move_cosine(state: GuardState, cosine: float) -> None:
        state.cosines = min(COSINE_WINDOW, state.cosines + 1)
        state.cosine += (max(-1.0, min(1.0, cosine)) - state.cosine) / state.cosines

    def _bet(self, state: GuardState, sight: Sight, proxies: RunningProxies) -> None:
        """Bet that the source model is less sure than on clean frames (see docs/trust.md).

        The wealth is an e-detector of the CUSUM kind (Shin, Ramdas, Rinaldo, 2024): where the mean rank is within
        what is tolerated, alarms come no more often than once in 1 / false_alarm micro-batches. The stake is learned as
        in POEM (Bar et al., NeurIPS 2024).
        """
        if sight.rank is None:
            return
        if state.shifted:
            state.shifted = proxies.signals.get("source_rank", 0.0) > TOLERATED
            return
        excess = sight.rank - TOLERATED
        factor = 1 + min(MOST_STAKE, max(0.0, state.stake)) * excess  # A stored stake may be any number.
        state.wealth = max(0.0, state.wealth) + math.log(factor)
        slope = excess / factor
        state.slopes += slope * slope
        state.stake = min(MOST_STAKE, max(0.0, state.stake + slope / math.sqrt(state.slopes + 1e-9)))
        if state.wealth >= -math.log(self.settings.false_alarm):
            state.shifted, state.alarms, state.watchful = True, state.alarms + 1, max(state.watchful, WATCH)
            state.wealth = state.stake = state.slopes = 0.0

    def _trust(self, state: GuardState, frames: int, proxies: RunningProxies) -> None:
        """Trust goes where source is estimated to do better by more than the estimate errs, and comes back when it
        is not estimated to do better any more."""
        margin = self._limits.gain_error if self._clean_accuracy is None else LEEWAY
        gain = _estimated_gain(proxies) if self._clean_accuracy is None else self._most_gain(state, proxies)
        if not self.settings.never_worse or margin is None or gain is None:
            state.trusted, state.doubted = True, 0
            return
        if state.trusted:
            if gain < -margin / 2 and proxies.shadowed >= ENOUGH:  # Nearly so: look closer.
                state.watchful = max(state.watchful, frames)
            if gain < -margin and proxies.shadowed >= ENOUGH:
                state.trusted, state.doubted, state.watchful = False, 0, WATCH
        else:
            state.trusted = gain >= 0
            state.doubted = 0 if state.trusted else state.doubted + frames

    def _most_gain(self, state: GuardState, proxies: RunningProxies) -> float | None:
        """The most that the adapted parameters can be ahead of source, where source is as sure as on clean frames and
        so taken to be as right: they win at most where it is wrong, and lose wherever else they differ. Once trust is
        gone, a source that grows unsure does not bring it back. None where nothing can be said."""
        signals = proxies.signals
        if self._clean_accuracy is None or "moved" not in signals:
            return None
        if state.trusted and (state.shifted or signals.get("source_rank", 0.0) > TOLERATED):
            return None
        return 2 * (1 - self._clean_accuracy) - signals["moved"]


def _estimated_gain(proxies: RunningProxies) -> float | None:
    ours, source = proxies.accuracy, proxies.source_accuracy
    return None if ours is None or source is None else ours - source


def resting(state: GuardState, frames: int = 0) -> str:
    """Why a stream teaches nothing for now, `frames` from here; empty where it does."""
    left = state.rest - frames
    return f"resting after a reset, {left} frames to go" if left > 0 else ""


def watched(state: GuardState, proxies: RunningProxies) -> bool:
    """Whether source should answer all frames of the stream's next micro-batch."""
    return proxies.frames < YOUNG or state.watchful > 0 or not state.trusted


def level_limit(level: Level, jump: float) -> float:
    """The largest ordinary value: `jump` deviations above the level, of logarithms; infinite where it is new."""
    if level.seen < LEVEL_SEEN:
        return math.inf
    return math.exp(min(700.0, level.centre + jump * max(LEAST_SPREAD, level.spread)))


def move_level(level: Level, value: float, jump: float) -> None:
    """Follow `value`. One far off moves the level no more than one at the limit, so that it cannot be dragged."""
    if value <= 0:
        return
    apart = math.log(value) - level.centre if level.seen else 0.0
    if not level.seen:
        level.centre = math.log(value)
    elif level.seen >= LEVEL_SEEN:
        most = jump * max(LEAST_SPREAD, level.spread)
        apart = max(-most, min(most, apart))
    level.seen += 1
    rate = 1 / min(LEVEL_WINDOW, level.seen)
    level.centre += rate * apart
    level.spread += rate * (abs(apart) - level.spread)
