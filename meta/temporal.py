"""What the last frames of a stream say of the class of the next: a filter over its predictions.

Neighbouring frames mostly show the same thing. A hidden Markov model with one number per stream says how much:
the class of a frame is that of the frame before with probability `stay`, else drawn from the stream's own class mix.
Its forward-backward pass over a micro-batch (Rabiner, Proc. IEEE 1989) corrects single frames by their neighbours,
and `stay` is learned online as the share of frames that the frame before explains better than the mix does (the
recursive expectation-maximisation of Cappe and Moulines, 2009). The mix is the running mean of the model's own,
unfiltered predictions, so that a model that prefers a class under a shift is not taken for a stream that repeats
itself: in a stream without order, `stay` falls to its floor. What the neighbours say is used only as far as it has
proved itself: the sum of the log-likelihood ratios of this model to one without memory, over about as many frames as
the mix looks back, has to be large before the filter changes an answer. Without order its expectation is below zero.

LAME (Boudiaf et al., CVPR 2022) smooths within a batch by feature similarity; this keeps what it knows from batch to
batch, works on single frames, and does no harm to streams whose frames are independent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meta.method import State

BELIEF = ("class_last", "class_mix", "class_stay", "class_proof", "class_seen")
MIX_FRAMES = 200.0  # window of the class mix
STAY_RATE = 0.03  # how fast `stay` follows the evidence, per frame
STAY_RANGE = (0.005, 0.995)
FIRST_STAY, FIRST_SEEN = 0.05, 100.0
# Temperature of the evidence: repeated frames repeat their errors too, so that what is new must count for more.
SHARPEN = 0.7
UNSURE = 0.02  # no prediction is surer than this share of doubt allows
MOST_EVIDENCE = 20.0  # of one frame
PROOF = (4.0, 20.0)  # log-likelihood ratio at which the neighbours begin to count, and at which they count in full


def fresh_belief(streams: int, classes: int) -> State:
    """The belief of streams that have shown nothing: class_last and class_mix (S, K); class_stay, class_proof and
    class_seen (S)."""
    return {
        "class_last": torch.full((streams, classes), 1 / classes),
        "class_mix": torch.full((streams, classes), 1 / classes),
        "class_stay": torch.full((streams,), FIRST_STAY),
        "class_proof": torch.zeros(streams),
        "class_seen": torch.full((streams,), FIRST_SEEN),
    }


@torch.no_grad()
def filter_classes(logits: Tensor, stream: Tensor, counts: Tensor, belief: State) -> tuple[Tensor, State]:
    """Class probabilities (B, K) given all frames of the micro-batch and those before it, and the belief after it.

    logits (B, K); stream (B,) int64 in [0, S), each stream's frames in order; counts (S,), how many each has. A stream
    with no frame, or with a logit that is not finite, keeps its belief.
    """
    if not len(stream):
        return logits, {name: belief[name] for name in BELIEF}
    rows, present = _rows(stream, counts)
    sound = torch.isfinite(logits).all(1)
    valid = present & sound[rows]
    probability = (logits / SHARPEN).softmax(1).nan_to_num(1 / logits.shape[1])
    frames = (probability * (1 - UNSURE) + UNSURE / logits.shape[1])[rows]
    past, after = _forward(frames, valid, belief)
    smoothed = _backward(past, valid)
    answer = torch.empty_like(logits)
    answer[rows[present]] = smoothed[present]
    return torch.where(sound.unsqueeze(1), answer, logits.softmax(1)), after


def _rows(stream: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Where the t-th frame of each stream lies in the pass, (S, T), and whether it exists."""
    order = torch.argsort(stream, stable=True)
    number = counts.long()
    place = torch.arange(int(number.max()))
    first = number.cumsum(0) - number
    index = (first.unsqueeze(1) + place).clamp(max=len(stream) - 1)
    return order[index], place < number.unsqueeze(1)


# One frame of every stream: filtered probabilities, likelihood, trusted part of stay, mix.
_Moment = tuple[Tensor, Tensor, Tensor, Tensor]


def _forward(frames: Tensor, valid: Tensor, belief: State) -> tuple[list[_Moment], State]:
    last, mix = belief["class_last"], belief["class_mix"]
    stay, seen = belief["class_stay"].unsqueeze(1), belief["class_seen"].unsqueeze(1)
    proof = belief["class_proof"].unsqueeze(1)
    moments: list[_Moment] = []
    for t in range(frames.shape[1]):
        here = valid[:, t : t + 1]
        likelihood = frames[:, t] / mix
        evidence = (last * likelihood).sum(1, keepdim=True).clamp(max=MOST_EVIDENCE)
        explained = stay * evidence / (stay * evidence + 1 - stay)
        trusted = stay * ((proof - PROOF[0]) / (PROOF[1] - PROOF[0])).clamp(0, 1)
        filtered = (trusted * last + (1 - trusted) * mix) * likelihood
        filtered = filtered / filtered.sum(1, keepdim=True)
        moments.append((filtered, likelihood, trusted, mix))
        proof = torch.where(here, proof * (1 - 1 / MIX_FRAMES) + torch.log1p(stay * (evidence - 1)), proof)
        last = torch.where(here, filtered, last)
        stay = torch.where(here, torch.lerp(stay, explained, STAY_RATE).clamp(*STAY_RANGE), stay)
        seen = torch.where(here, (seen + 1).clamp(max=MIX_FRAMES), seen)
        mix = torch.where(here, mix + (frames[:, t] - mix) / seen, mix)
    numbers = {"class_stay": stay, "class_proof": proof, "class_seen": seen}
    return moments, {"class_last": last, "class_mix": mix, **{name: t.squeeze(1) for name, t in numbers.items()}}


def _backward(moments: list[_Moment], valid: Tensor) -> Tensor:
    """(S, T, K): each frame's probabilities, corrected by the frames after it."""
    if not any(bool(trusted.any()) for _, _, trusted, _ in moments):
        return torch.stack([filtered for filtered, _, _, _ in moments], 1)  # Later frames say nothing of earlier ones.
    later = torch.ones_like(moments[0][0])
    smoothed = []
    for t in range(len(moments) - 1, -1, -1):
        filtered, likelihood, stay, mix = moments[t]
        both = filtered * later
        smoothed.append(both / both.sum(1, keepdim=True))
        seen_from_before = likelihood * later
        message = stay * seen_from_before + (1 - stay) * (mix * seen_from_before).sum(1, keepdim=True)
        later = torch.where(valid[:, t : t + 1], message / message.amax(1, keepdim=True), later)
    return torch.stack(smoothed[::-1], 1)
