"""The guard: may an update become the stream's state, and may the adapted parameters still answer?

All that it knows of a stream is in the stream's header (`GuardState`), so that its rulings survive the worker and are
the same when a step is repeated after a crash. docs/trust.md lists the rules with their sources and numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from schemas.bundle import Limits
from schemas.config import Guard as GuardSettings
from schemas.state import GuardState, Level, RunningProxies
from schemas.update import Decision

YOUNG = 256  # frames of a new stream about which source is asked every time
WATCH = 256  # frames about which it is asked every time after an alarm or a doubt
RECENT = 16  # checksums kept, so that a loop of up to so many frames is noticed
FILLS = 0.75  # share of a micro-batch's answers from which on one class fills it
LEVEL_SEEN, LEVEL_WINDOW = 16, 64  # updates before a stream has a level of its own, and updates that the level averages
LEAST_SPREAD = 0.25  # of a level; otherwise the limits of a very steady stream would be too narrow
LEAST_SHARE = 0.1  # of an update that is shrunk
COSINE_SEEN, COSINE_WINDOW = 64, 64  # the same for the mean cosine
TOLERATED, MOST_STAKE = 0.1, 1.2  # of the bet: how far the mean rank may be from the middle, and the largest stake
DISAGREES = 0.5  # share of frames on which source disagrees from which on low entropy is a collapse
LEEWAY = 0.1  # disagreement beyond the expected that may be chance among so few frames, where nobody estimates accuracy
ASTRAY = "answers leave source, which is as sure as on clean frames"
ENOUGH = 64  # frames that both must have answered before trust may be lost
PATIENCE = 128  # frames of doubt before the stream goes back
# Frames of rest after a reset, which double with every further reset, at most so often, until so many sound frames.
REST, MOST_RESETS, FORGIVEN = 64, 6, 4_096


@dataclass(frozen=True)
class Ruling:
    """What to do with an update, and why. `share`: the part of the parameters' change that is accepted.

    `rolled_back` asks for the newest snapshot, and means source where there is none.
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
        """Whether the parameters go back to earlier ones or to source."""
        return self.decision in ("rolled_back", "reset")


@dataclass(frozen=True)
class Sight:
    """What the guard sees of a micro-batch's pixels and answers.

    `checksums` of the frames; the share of `blank` ones; the `dominant` class of the answers, and its `share`; the mean
    `rank`, in [-0.5, 0.5], of source's entropy among its entropies on clean frames, None where source was not asked.
    """

    checksums: Sequence[int]
    blank: float
    dominant: int
    share: float
    rank: float | None


class Guard:
    """Judges updates. A skipped update leaves all of the stream's parameters as they were.

    `clean_accuracy`: source's, for a method whose accuracy is not estimated; None where it is.
    """

    def __init__(self, settings: GuardSettings, limits: Limits, clean_accuracy: float | None = None) -> None:
        self.settings, self._limits, self._clean_accuracy = settings, limits, clean_accuracy
        self._max_gradient = settings.max_gradient_factor * limits.raw_gradient_norm
        self.max_distance = settings.max_distance_factor * limits.source_distance

    def observe(self, before: GuardState, sight: Sight, proxies: RunningProxies) -> GuardState:
        """The guard's state after a micro-batch, with or without an update. `proxies` are those after it."""
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
        """The ruling on an update. `state` is what `observe` made of `before`; this moves its levels.

        `signals`: those that the method reports, and the `present_distance` from source, before the update. `finite`:
        all numbers of the proposed state are.
        """
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
        # A state may be beyond the limit already, because it was imported or the limit was lowered. Then updates may
        # lead back towards source, not further out. A shrunk update ends between two points that are both allowed.
        if distance > max(self.max_distance, present):
            reason = f"distance from source {distance:.3g} above its limit {self.max_distance:.3g}"
            beyond = f" and the present {present:.3g}" if present > self.max_distance else ""
            return Ruling("skipped", reason + beyond)
        return self._measured(state, signals)

    def blinded(self, before: GuardState, sight: Sight) -> str:
        """Why the camera seems to see nothing: most frames are blank or repeat earlier ones. Empty where most are
        neither. This does not depend on whether there is an update."""
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
        """Count up the frames in a row that one class fills, allowing for some errors; count down four times as fast
        while others come."""
        if sight.share < FILLS:
            state.alike = max(0, state.alike - 4 * frames)
        elif sight.dominant == state.dominant:
            state.alike = min(state.alike, self.settings.max_alike) + frames
        else:
            state.dominant, state.alike = sight.dominant, frames

    # --- rules -----------------------------------------------------------------------------------------------------

    def _taken_over(self, state: GuardState, proxies: RunningProxies) -> str:
        """Why a method without accuracy estimate has collapsed to one class. No update brings it back, so it goes back
        at once. Half the usual disagreement is enough: source itself may be about to see little but that class."""
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
        """Go back to a snapshot, and rest. To source if that is the second time in short: the snapshot did not help."""
        decision: Decision = "reset" if state.resets else "rolled_back"
        state.rest = REST << min(MOST_RESETS, state.resets)
        state.resets = min(MOST_RESETS, state.resets + 1)
        state.sound = state.doubted = 0
        state.gradient, state.update, state.cosine, state.cosines = Level(), Level(), 0.0, 0
        state.watchful = WATCH
        return Ruling(decision, reason)

    def _measured(self, state: GuardState, signals: Mapping[str, float]) -> Ruling:
        """Apply the update as a whole, or shrunk to the stream's own limits."""
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

        The wealth is an e-detector of the CUSUM kind (Shin, Ramdas, Rinaldo, 2024): while the mean rank is within
        TOLERATED, alarms come at most once in 1 / false_alarm micro-batches. The stake is learnt as in POEM (Bar et
        al., NeurIPS 2024).
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
        """Trust is lost where source is estimated to do better by more than the estimate's error. It comes back when
        source is no longer estimated to do better."""
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
        """The most by which the adapted parameters can be more accurate than source; None where nothing can be said.

        While source is as sure as on clean frames, it is taken to be as accurate as there. Then the adapted parameters
        can win only where source is wrong, and lose wherever else they differ. While they are trusted, nothing is said
        when source is unsure. Once trust is lost, an unsure source does not bring it back.
        """
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
    """Why a stream still rests after `frames` more; empty where it does not."""
    left = state.rest - frames
    return f"resting after a reset, {left} frames to go" if left > 0 else ""


def watched(state: GuardState, proxies: RunningProxies) -> bool:
    """Whether source should be asked about all frames of the stream's next micro-batch."""
    return proxies.frames < YOUNG or state.watchful > 0 or not state.trusted


def level_limit(level: Level, jump: float) -> float:
    """The largest ordinary value: `jump` deviations above the level, in logarithms; infinite while the level is new."""
    if level.seen < LEVEL_SEEN:
        return math.inf
    return math.exp(min(700.0, level.centre + jump * max(LEAST_SPREAD, level.spread)))


def move_level(level: Level, value: float, jump: float) -> None:
    """Have the level follow `value`. An outlier moves it no more than a value at the limit, so that no stream of
    outliers can drag it away quickly."""
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
