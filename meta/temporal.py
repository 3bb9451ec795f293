"""The class filter: it corrects the predictions of a stream's frames by those of their neighbours in time.

Neighbouring frames mostly show the same class. A hidden Markov model describes that with one parameter per stream: the
class of a frame is that of the previous frame with probability `stay`, and otherwise drawn from the stream's class mix.

- Answers come from its forward-backward pass over a micro-batch (Rabiner, Proc. IEEE 1989).
- `stay` is learned online, as the share of frames that the previous frame explains better than the mix does (recursive
  expectation-maximisation, Cappe and Moulines, 2009).
- The mix is the running mean of the model's unfiltered predictions. So a model that prefers a class under a shift is
  not mistaken for a stream that repeats a class: if frames are independent, `stay` falls to its lower limit.
- The filter changes answers only after a test: the log-likelihood ratio of this model to one without memory, summed
  over about MIX_FRAMES frames, must be large. For independent frames its expectation is negative.

LAME (Boudiaf et al., CVPR 2022) smooths within a batch by the similarity of features. This filter carries its belief
from batch to batch, works on single frames, and does not harm streams of independent frames.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meta.method import State, on_cpu

Numbers = np.ndarray[Any, np.dtype[Any]]

BELIEF = ("class_last", "class_mix", "class_stay", "class_proof", "class_seen")
MIX_FRAMES = 200.0  # window of the class mix and of the test
STAY_RATE = 0.03  # learning rate of `stay`, per frame
STAY_RANGE = (0.005, 0.995)
FIRST_STAY, FIRST_SEEN = 0.05, 100.0
SHARPEN = 0.7  # temperature of the predictions: repeated frames repeat their errors, so the newest must count for more
UNSURE = 0.02  # share of the uniform distribution that is mixed into every prediction
MOST_EVIDENCE = 20.0  # largest likelihood ratio of one frame
FEW = 4  # up to as many streams it is faster to filter one after the other
AT_ONCE = 64  # frames whose mixes are computed by one matrix product
TINY = 1e-30
PROOF = (4.0, 20.0)  # log-likelihood ratio from which neighbours count, and from which they count in full


def fresh_belief(streams: int, classes: int, device: torch.device | None = None) -> State:
    """The belief of new streams.

    class_last (S, K): filtered probabilities of the last frame
    class_mix (S, K): running mean of the unfiltered probabilities
    class_stay (S,): probability that a frame has the class of the previous one
    class_proof (S,): log-likelihood ratio of the test
    class_seen (S,): frames that the mix rests on
    """
    return {
        "class_last": torch.full((streams, classes), 1 / classes, device=device),
        "class_mix": torch.full((streams, classes), 1 / classes, device=device),
        "class_stay": torch.full((streams,), FIRST_STAY, device=device),
        "class_proof": torch.zeros(streams, device=device),
        "class_seen": torch.full((streams,), FIRST_SEEN, device=device),
    }


@torch.no_grad()
def filter_classes(logits: Tensor, stream: Tensor, counts: Tensor, belief: State) -> tuple[Tensor, State]:
    """Class probabilities (B, K) given all frames of the micro-batch and those before it, and the next belief.

    logits (B, K); stream (B,) int64 in [0, S), each stream's frames in order; counts (S,), frames of each stream. A
    frame whose logits are not all finite is passed over: its answer is the unfiltered softmax.
    """
    if not len(stream):
        return logits, {name: belief[name] for name in BELIEF}
    # The arrays are small, and frames depend on each other. A NumPy call takes a fifth of the time of a torch call, and
    # an operation on Python floats a tenth of that.
    known = {"logits": logits, "stream": stream, "counts": counts, **{name: belief[name] for name in BELIEF}}
    given = {name: tensor.numpy() for name, tensor in on_cpu(known).items()}
    number, place = given["logits"], given["stream"]
    sound = np.isfinite(number).all(1)
    whole = bool(sound.all())
    usable = number if whole else np.where(sound[:, None], number, 0)
    plain = _softmax(usable / SHARPEN) * (1 - UNSURE) + UNSURE / number.shape[1]
    before = {name: given[name] for name in BELIEF}
    filtered = _one_by_one if len(counts) <= FEW else _side_by_side
    answer, after = filtered(plain, place, given["counts"].astype(np.int64), sound, before)
    if not whole:
        answer[~sound] = logits.softmax(1).cpu().numpy()[~sound]
    moved = {name: torch.from_numpy(values).to(belief[name], non_blocking=True) for name, values in after.items()}
    return torch.from_numpy(answer).to(logits, non_blocking=True), moved


def _softmax(number: Numbers) -> Numbers:
    made: Numbers = np.exp(number - number.max(1, keepdims=True))
    return made / made.sum(1, keepdims=True)


# --- few streams: one after the other, with Python floats for what is scalar per stream ------------------------------


def _one_by_one(
    plain: Numbers, stream: Numbers, counts: Numbers, sound: Numbers, belief: dict[str, Numbers]
) -> tuple[Numbers, dict[str, Numbers]]:
    after = {name: values.copy() for name, values in belief.items()}
    answer = np.empty_like(plain)
    for number in range(len(counts)):
        rows = np.flatnonzero((stream == number) & sound)
        if len(rows):
            answer[rows] = _alone(plain[rows], {name: values[number : number + 1] for name, values in after.items()})
    return answer, after


def _alone(frames: Numbers, belief: dict[str, Numbers]) -> Numbers:
    """Answers (T, K) to the frames (T, K) of one stream, whose belief (1, ...) moves in place."""
    last = belief["class_last"][0]
    stay, proof, seen = (float(belief[name][0]) for name in ("class_stay", "class_proof", "class_seen"))
    stay = min(STAY_RANGE[1], max(STAY_RANGE[0], stay))  # a state from the store may hold any value
    mixes = _mixes_of_one(frames, belief["class_mix"], seen)
    likelihood = frames / mixes[:-1]
    filtered, trust = frames.copy(), [0.0] * len(frames)
    for t, row in enumerate(filtered):
        ratio = max(0.0, float(last.dot(likelihood[t])))
        if proof > PROOF[0]:
            trust[t] = trusted = stay * min(1.0, (proof - PROOF[0]) / (PROOF[1] - PROOF[0]))
            whole = 1 + trusted * (ratio - 1)
            row *= (1 - trusted) / whole
            row += last * likelihood[t] * (trusted / whole)
        last = row
        evidence = stay * min(ratio, MOST_EVIDENCE)
        either = 1 - stay + evidence
        proof = proof * (1 - 1 / MIX_FRAMES) + math.log(either)
        stay = min(STAY_RANGE[1], max(STAY_RANGE[0], stay + STAY_RATE * (evidence / either - stay)))
    belief["class_last"][0], belief["class_mix"][0] = last, mixes[-1]
    belief["class_stay"][0], belief["class_proof"][0] = stay, proof
    belief["class_seen"][0] = min(MIX_FRAMES, seen + len(frames))
    return _corrected(filtered, likelihood, mixes, trust) if any(trust) else filtered


def _mixes_of_one(frames: Numbers, mix: Numbers, seen: float) -> Numbers:
    """The class mix before each frame and after the last (T + 1, K), from the present one (1, K)."""
    mixes = np.concatenate([mix, frames])
    for start in range(0, len(frames), AT_ONCE):
        part = mixes[start : start + AT_ONCE + 1]
        part[:] = _weights(len(part) - 1, max(0.0, min(seen + start, MIX_FRAMES))) @ part
    return mixes


@lru_cache(32)
def _weights(frames: int, seen: float) -> Numbers:
    """The matrix (T + 1, 1 + T) that maps the present mix and T frames to the mixes before each frame and after all."""
    weights = np.zeros((frames + 1, frames + 1))
    weights[0, 0] = 1
    for t in range(frames):
        rate = 1 / min(seen + t + 1, MIX_FRAMES)
        weights[t + 1] = (1 - rate) * weights[t]
        weights[t + 1, t + 1] = rate
    return weights.astype(np.float32)


def _corrected(filtered: Numbers, likelihood: Numbers, mixes: Numbers, trust: list[float]) -> Numbers:
    """The backward pass for one stream: smoothed probabilities (T, K), given the later frames, too."""
    later = np.ones_like(filtered)
    for t in range(len(filtered) - 1, 0, -1):
        ahead = likelihood[t] * later[t]
        np.multiply(ahead, trust[t] / max(TINY, float(ahead.dot(mixes[t]))), out=later[t - 1])
        later[t - 1] += 1 - trust[t]
    both: Numbers = filtered * later
    return both / both.sum(1, keepdims=True)


# --- many streams: side by side, frame after frame -----------------------------------------------------------------


def _side_by_side(
    plain: Numbers, stream: Numbers, counts: Numbers, sound: Numbers, belief: dict[str, Numbers]
) -> tuple[Numbers, dict[str, Numbers]]:
    """As `_one_by_one`, for all streams at once."""
    rows, present = _rows(stream, counts)
    valid = (present & sound[rows])[..., None]
    past, after = _forward(plain[rows], valid, belief)
    smoothed = _backward(past, valid)
    answer = np.empty_like(plain)
    answer[rows[present]] = smoothed[present]
    return answer, after


def _rows(stream: Numbers, number: Numbers) -> tuple[Numbers, Numbers]:
    """The index in the pass of each stream's t-th frame (S, T), and whether it exists (S, T) bool."""
    order = np.argsort(stream, kind="stable")
    place = np.arange(number.max())
    first = number.cumsum() - number
    index = np.minimum(first[:, None] + place, len(stream) - 1)
    return order[index], place < number[:, None]


# One frame of every stream: filtered probabilities, likelihood, trusted part of stay, mix.
_Moment = tuple[Numbers, Numbers, Numbers, Numbers]


def _forward(frames: Numbers, valid: Numbers, belief: dict[str, Numbers]) -> tuple[list[_Moment], dict[str, Numbers]]:
    last, proof = belief["class_last"], belief["class_proof"][:, None]
    stay = belief["class_stay"][:, None].clip(*STAY_RANGE)  # a state from the store may hold any value
    number = np.ascontiguousarray(frames.swapaxes(0, 1))
    here = np.ascontiguousarray(valid.swapaxes(0, 1))
    mixes, mix, seen = _mixes(number, here, belief["class_mix"], belief["class_seen"][:, None])
    likelihoods = number / mixes
    ragged = not here.all()
    moments: list[_Moment] = []
    for frame, likelihood, before, present in zip(number, likelihoods, mixes, here, strict=True):
        explained = last * likelihood
        ratio = explained.sum(1, keepdims=True)
        evidence = np.minimum(ratio, MOST_EVIDENCE)
        surprise = stay * (evidence - 1)
        trusted = stay * np.minimum(np.maximum((proof - PROOF[0]) / (PROOF[1] - PROOF[0]), 0), 1)
        # (trusted * last + (1 - trusted) * mix) * likelihood, made to sum to one; frames do already.
        filtered = (frame + trusted * (explained - frame)) / (1 + trusted * (ratio - 1))
        moments.append((filtered, likelihood, trusted, before))
        pull = STAY_RATE * (stay * evidence / (1 + surprise) - stay)
        moved = [
            filtered,
            np.minimum(np.maximum(stay + pull, STAY_RANGE[0]), STAY_RANGE[1]),
            proof * (1 - 1 / MIX_FRAMES) + np.log1p(surprise),
        ]
        if ragged:
            moved = [np.where(present, new, old) for new, old in zip(moved, (last, stay, proof), strict=True)]
        last, stay, proof = moved
    numbers = {"class_stay": stay, "class_proof": proof, "class_seen": seen}
    return moments, {"class_last": last, "class_mix": mix, **{name: values[:, 0] for name, values in numbers.items()}}


def _mixes(number: Numbers, here: Numbers, mix: Numbers, seen: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """The class mix before each frame (T, S, K), that after the last (S, K), and the frames it rests on (S, 1)."""
    counted = np.minimum(seen.clip(0) + here.cumsum(0, dtype=seen.dtype), MIX_FRAMES).astype(seen.dtype)
    rates = here / counted.clip(1)
    mixes = np.empty_like(number)
    for t, (frame, rate) in enumerate(zip(number, rates, strict=True)):
        mixes[t] = mix
        mix = mix + (frame - mix) * rate
    return mixes, mix, counted[-1]


def _backward(moments: list[_Moment], valid: Numbers) -> Numbers:
    """The backward pass: smoothed probabilities (S, T, K), given the later frames, too."""
    if not any(trusted.any() for _, _, trusted, _ in moments):
        # No stream trusts its neighbours, so later frames change nothing.
        return np.stack([filtered for filtered, _, _, _ in moments], 1)
    later = np.ones_like(moments[0][0])
    smoothed = []
    for t in range(len(moments) - 1, -1, -1):
        filtered, likelihood, stay, mix = moments[t]
        both = filtered * later
        smoothed.append(both / both.sum(1, keepdims=True))
        seen_from_before = likelihood * later
        message = stay * seen_from_before + (1 - stay) * (mix * seen_from_before).sum(1, keepdims=True)
        later = np.where(valid[:, t], message / message.max(1, keepdims=True), later)
    return np.stack(smoothed[::-1], 1)
