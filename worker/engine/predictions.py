"""From the logits of a pass to the prediction of every micro-batch, calibrated, by the parameters that answer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from meta.bundle import Bundle
from meta.method import State, on_cpu
from meta.moments import NormMoments
from meta.norms import AdaptableModel
from meta.objective import entropy, per_stream_mean
from meta.proxies import Observed
from schemas.bundle import Calibration
from schemas.prediction import Parameters
from schemas.state import RunningProxies, StreamHeader
from worker.engine.passes import BatchPrediction, Fixed, Part
from worker.guard.answer import named
from worker.guard.guard import Sight

TOP = 3
Look = tuple[list[int], float]  # checksums of a micro-batch's frames, and the share of them that is blank


def batch_predictions(
    bundle: Bundle,
    part: Part,
    frames: Tensor,
    logits: Tensor,
    observed: list[Observed] | None,
    looks: list[Look],
    source: Tensor | None = None,
) -> list[BatchPrediction]:
    """The predictions of a part's micro-batches, from the logits (B, K) of their frames (B, ch, h, w) under the
    parameters that adapt; `source` (n, K): source's logits for the part's `shadow`."""
    said = on_cpu(_said(bundle, part, frames, logits, source))
    rows = {name: values.tolist() for name, values in said.items()}
    found, start = [], 0
    for row, (batch, header) in enumerate(zip(part.batches, part.headers, strict=True)):
        end, step = start + len(batch.frames), _step_of(batch.answer, header)
        shown = observed[row] if observed is not None else None
        found.append(
            BatchPrediction(
                batch=batch,
                resident=part.residents[row],
                parameters=named(batch.answer, header),
                step=step,
                top_index=rows["index"][start:end],
                top_confidence=rows["confidence"][start:end],
                mean_confidence=rows["mean_confidence"][row],
                mean_entropy=rows["mean_entropy"][row],
                signals=rows["signals"][start:end],
                observed=shown,
                sight=_sight(looks[row], rows["class"][start:end], shown),
            )
        )
        start = end
    return found


def _said(bundle: Bundle, part: Part, frames: Tensor, logits: Tensor, source: Tensor | None) -> State:
    """All that is copied from the device, together: tensors (B, ...) of frames and (S,) of streams."""
    each, calibration = entropy(logits), bundle.manifest.calibration
    source_temperature = calibration.source_temperature or calibration.temperature
    temperatures = torch.tensor([temperature(calibration, header.proxies) for header in part.headers])
    temperatures = temperatures.to(logits.device, non_blocking=True)
    logits = logits / temperatures.index_select(0, part.stream).unsqueeze(1)
    top = _likeliest(logits)
    said = {
        "class": top.indices[:, 0],
        "mean_entropy": per_stream_mean(each, part.stream, part.counts),
        "signals": torch.stack([each, top.values[:, 0]], 1),
        "mean_confidence": per_stream_mean(top.values[:, 0], part.stream, part.counts),
    }
    answers = logits
    if part.fixed is not None:
        fixed = answer_fixed(bundle.model, frames, part.fixed)
        answers = answers.index_copy(0, part.fixed.frames, fixed / source_temperature)
    if source is not None and len(part.by_source):
        own = source.index_select(0, part.by_source) / source_temperature
        answers = answers.index_copy(0, part.shadow.index_select(0, part.by_source), own)
    if answers is not logits:
        top = _likeliest(answers)
    return said | {"confidence": top.values.clamp_max(1.0), "index": top.indices}


def _sight(look: Look, classes: list[int], observed: Observed | None) -> Sight:
    dominant = max(set(classes), key=classes.count)
    rank = None if observed is None else observed.rank
    return Sight(look[0], look[1], dominant, classes.count(dominant) / len(classes), rank)


def _likeliest(logits: Tensor) -> torch.return_types.topk:
    """The likeliest classes with their confidences, from calibrated logits."""
    return logits.softmax(1).nan_to_num().topk(min(TOP, logits.shape[1]), 1)


def temperature(calibration: Calibration, proxies: RunningProxies) -> float:
    """The temperature of a stream's answers. It rises as their mean confidence exceeds their estimated accuracy."""
    if proxies.accuracy is None or not calibration.softening:
        return calibration.temperature
    excess = proxies.signals.get("answer_confidence", proxies.accuracy) - proxies.accuracy
    return calibration.temperature * math.exp(calibration.softening * min(1.0, max(-1.0, excess)))


def answer_fixed(model: AdaptableModel, frames: Tensor, fixed: Fixed) -> Tensor:
    """Logits (N, classes) of those of the frames (B, ch, h, w) that `fixed` parameters answer."""
    return answer_barely(model, frames.index_select(0, fixed.frames), fixed.stream, fixed.parameters)


@torch.inference_mode()
def answer_barely(model: AdaptableModel, frames: Tensor, stream: Tensor, parameters: State) -> Tensor:
    """Logits (B, classes) of frames (B, ch, h, w), each under its row `stream` (B,) of the parameters."""
    moments = correction = None
    if "correction" in parameters and model.correction is not None:
        correction = model.correction.under(parameters["correction"].index_select(0, stream))
    if "norm_mean" in parameters:
        none = torch.zeros(len(parameters["affine"]), device=stream.device)
        moments = NormMoments(stream, none, parameters["norm_mean"], parameters["norm_variance"])
    logits: Tensor = model(frames, parameters["affine"].index_select(0, stream), moments, correction)
    return logits


def _step_of(parameters: Parameters, header: StreamHeader) -> int:
    if parameters == "source":
        return 0
    return header.step if parameters == "adapted" else header.approved or 0
