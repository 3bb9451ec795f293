"""From a network, its weights and images to a bundle with a verdict, in stages that can be resumed."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

import safetensors.torch
import torch

from meta.bundle import load_bundle, portable_rule, write_bundle
from meta.bundle_folder import read_manifest
from meta.calibrate import calibrate, source_statistics
from meta.correction import Correction, fit_correction
from meta.create.images import Decode
from meta.create.measure import BATCH, measure, recommend, total_gain
from meta.create.piecewise import PiecewiseMGG, frames_in_pass
from meta.create.subject import CreateSettings, Say, Subject, answers, first_logits, prepare
from meta.learned import GeneratorSettings, LearnedOptimizer
from meta.mgg import MGG
from meta.objective import SourceStatistics
from meta.train import Problem, TrainingSettings, meta_train
from schemas.bundle import Calibration, Limits, Manifest, MethodPart, ModelPart
from schemas.errors import BundleError, ConfigError
from schemas.verdict import Verdict

CODE = Path(__file__).parents[1]  # all that makes the stages
LEAST_PER_CLASS_STATISTICS = 10
CORRECTION_DRAWS, CORRECTION_PASSES = 200, 4
# Set after training: they lower the dose if frames look like source data, and make the correction of single frames
# depend on it. Cameras without a shift, which is the usual case, must not lose accuracy (docs/science.md).
HELD_BACK: dict[str, float] = {"dose_shift": -2.0, "correction_start": -0.4, "correction_slope": 3.0}


def create_bundle(
    settings: CreateSettings, name: str, output: Path, command: str, decode: Decode, say: Say = print
) -> Manifest:
    """Check the inputs, train, calibrate, measure, write the bundle, and load it once as a check.

    `decode` turns the bytes of an image file into pixels, as in a worker. Finished stages are kept in a folder beside
    the output until the bundle is written. Its name is a digest of all inputs and of this version's code, so that a run
    with the same inputs resumes from them. Raises BundleError, ConfigError or DataError.
    """
    notes: list[str] = []
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is there already; new bundles lie next to old ones: name another --output")

    def note(text: str) -> None:
        notes.append(text)
        say(text)

    subject = prepare(settings, decode, note)
    work = _work_folder(output, subject)
    source = _statistics(subject, work, note)
    correction = _correction(subject, work, say)
    learned, made = _generator(subject, source, work, say)
    frames = frames_in_pass(subject.preprocess.height, subject.preprocess.width)
    method = PiecewiseMGG(subject.model, source, learned, len(subject.labels), frames)
    calibration, limits = _calibration(subject, method, work, say)
    verdict = _verdict(subject, method, made, notes, work, say)
    manifest = Manifest(
        name=name,
        created_by=command,
        model=ModelPart(
            architecture=settings.architecture,
            arguments=settings.arguments,
            norm_order=subject.model.order,
            norm_layouts=subject.model.layouts,
            clean_accuracy=verdict.clean_accuracy,
        ),
        method=MethodPart(name="mgg", settings=learned.settings.model_dump(mode="json")),
        preprocess=subject.preprocess,
        calibration=calibration,
        limits=limits,
        files={},
    )
    tensors = {
        "model": subject.weights,
        "generator": dict(learned.state_dict()),
        "statistics": source.as_tensors(),
        "correction": correction.as_tensors(),
    }
    manifest = write_bundle(output, manifest, tensors, subject.labels, verdict)
    load_bundle(output, [settings.architecture])
    shutil.rmtree(work.parent)
    return manifest


def _work_folder(output: Path, subject: Subject) -> Path:
    """The folder of finished stages, created if needed. Raises ConfigError."""
    work = output.parent / f"{output.name}.work" / _digest(subject)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}; name another --output") from error
    return work


def _digest(subject: Subject) -> str:
    """A digest of all inputs of the stages, and of the code that makes them, which an upgrade or who adds shifts may
    change. The network's code is represented by its logits."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(CODE.rglob("*.py")):
        digest.update(path.read_bytes())
    digest.update(subject.settings.model_dump_json(exclude={"weights", "data", "labels", "generator"}).encode())
    known = [
        subject.labels,
        subject.preprocess.model_dump(),
        subject.truth,
        HELD_BACK,
        subject.model.order,
        subject.model.layouts,
    ]
    digest.update(json.dumps(known).encode())
    digest.update(safetensors.torch.save(dict(sorted(subject.weights.items()))))
    for name in subject.parts:
        for tensor in subject.part(name):
            digest.update(tensor.numpy().tobytes())
    digest.update(first_logits(subject).numpy().tobytes())
    if subject.settings.generator is not None:
        digest.update(read_manifest(subject.settings.generator).content_hash.encode())
    return digest.hexdigest()[:16]


def _statistics(subject: Subject, work: Path, say: Say) -> SourceStatistics:
    images, labels = subject.part("generator")
    fewest = int(torch.bincount(labels, minlength=len(subject.labels)).min())
    by_class = fewest >= LEAST_PER_CLASS_STATISTICS
    if not by_class:
        say(f"statistics: over all classes, not per class: these need {LEAST_PER_CLASS_STATISTICS} images of every one")
    path = work / "statistics.safetensors"
    if not path.exists():
        found = source_statistics(subject.model, images, subject.preprocessing).as_tensors()
        kept = {name: tensor for name, tensor in found.items() if by_class or not name.startswith("class_")}
        _keep(path, safetensors.torch.save(kept))
    return SourceStatistics(**safetensors.torch.load_file(path))


def _correction(subject: Subject, work: Path, say: Say) -> Correction:
    """Fit the correction of single frames, and set it on the model."""
    path = work / "correction.safetensors"
    if not path.exists():
        say("correction: what single frames tell of shifts, fitted on simulated ones")
        images, preprocessing = subject.part("generator")[0], subject.preprocessing
        at_once = frames_in_pass(*images.shape[2:])
        # Large images take longer, so there are fewer of them.
        draws = max(CORRECTION_DRAWS // 4, min(CORRECTION_DRAWS, at_once))
        found = fit_correction(
            subject.model,
            images,
            preprocessing,
            subject.settings.seed,
            draws,
            min(64, at_once),
            at_once,
            CORRECTION_PASSES,
        )
        _keep(path, safetensors.torch.save(found.as_tensors()))
    subject.model.correction = Correction(**safetensors.torch.load_file(path))
    return subject.model.correction


def _generator(subject: Subject, source: SourceStatistics, work: Path, say: Say) -> tuple[LearnedOptimizer, str]:
    """The generator, trained or taken over, and a description of its origin."""
    settings, steps = subject.settings, subject.settings.meta_steps
    torch.manual_seed(settings.seed)
    if settings.generator is None:
        if not steps:
            raise ConfigError(
                "--steps 0 leaves the generator untrained; name a bundle with --generator to take one over"
            )
        form, rule, made = GeneratorSettings(), None, f"trained in {steps} steps"
    else:
        form, rule = portable_rule(settings.generator)
        form = form.in_training() if steps else form.in_training().model_copy(update={"anchor_rank": 0})
        made = f"rule of bundle {read_manifest(settings.generator).content_hash}"
        made += f", trained on in {steps} steps" if steps else ", as it is"
    learned = LearnedOptimizer(form, subject.model)
    if rule is not None:
        wrong = learned.load_state_dict(rule, strict=False)
        if wrong.unexpected_keys or any(not name.startswith("anchor.") for name in wrong.missing_keys):
            raise BundleError(f"the generator of {settings.generator} does not fit its own settings")
    path = work / "generator.safetensors"
    if path.exists():
        say("generator: there already, from the run before")
        learned.load_state_dict(safetensors.torch.load_file(path))
    else:
        _train(subject, source, learned, say)
        _keep(path, safetensors.torch.save(dict(learned.state_dict())))
    learned.settings = learned.settings.model_copy(update=HELD_BACK)
    return learned.requires_grad_(False).eval(), made


def _train(subject: Subject, source: SourceStatistics, learned: LearnedOptimizer, say: Say) -> None:
    """Measure the model's gradient scale, and train for the steps that are configured."""
    images, labels = subject.part("generator")
    steps, seed = subject.settings.meta_steps, subject.settings.seed
    streams = min(16, max(2, frames_in_pass(*images.shape[2:]) // BATCH))
    training = TrainingSettings(meta_steps=max(1, steps), streams=streams, seed=seed)
    random = torch.Generator().manual_seed(seed)
    started = time.monotonic()
    method = MGG(subject.model, source, learned, len(subject.labels))
    problem = Problem(method, images, labels, subject.preprocessing, training, random)
    if not steps:
        say("generator: taken over without training")
        return
    # The time of eight micro-batches of eight frames. In training they have about nine, and two backward passes.
    seconds = (time.monotonic() - started) / 8 * 9 / 8 * 1.6 * training.unroll * steps
    say(f"generator: {steps} steps of training, about {max(1, round(seconds / 60))} minutes on this machine")
    meta_train([problem], training, say)


def _calibration(subject: Subject, method: MGG, work: Path, say: Say) -> tuple[Calibration, Limits]:
    path = work / "calibration.json"
    if not path.exists():
        images, labels = subject.part("calibration")
        say("calibration: simulated cameras on images of their own")
        windows, seed = subject.settings.calibration_windows, subject.settings.seed + 1
        # As many cameras as fit into a pass, and few, since large images are slow.
        streams = min(6, max(2, frames_in_pass(*images.shape[2:]) // BATCH))
        fitted = calibrate(method, images, labels, subject.preprocessing, seed, windows, streams, say)
        _keep(path, json.dumps([part.model_dump(mode="json") for part in fitted]).encode())
    calibration, limits = json.loads(path.read_text())
    return Calibration.model_validate(calibration), Limits.model_validate(limits)


def _verdict(subject: Subject, method: PiecewiseMGG, made: str, notes: list[str], work: Path, say: Say) -> Verdict:
    path = work / "verdict.json"
    if path.exists():
        return Verdict.model_validate_json(path.read_bytes())
    settings, held_out = subject.settings, subject.parts["measurement"]
    images, labels = subject.part("measurement")
    clean = float((answers(subject.model, images, subject.preprocessing) == labels).float().mean())
    measured = measure(
        method, held_out, subject.preprocessing, settings.frames, settings.repeats, settings.seed + 2, say
    )
    recommendation, reasons = recommend(measured)
    gain, error = total_gain(measured)
    verdict = Verdict(
        recommendation=recommendation,
        reasons=reasons,
        truth=subject.truth,
        clean_accuracy=clean,
        gain=gain,
        gain_error=error,
        settings=measured,
        generator=made,
        images={name: len(part) for name, part in subject.parts.items()},
        batch=BATCH,
        seed=settings.seed,
        notes=notes,
    )
    _keep(path, verdict.model_dump_json().encode())
    return verdict


def _keep(path: Path, content: bytes) -> None:
    """Write a file atomically. Raises ConfigError."""
    unfinished = path.with_suffix(".unfinished")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError as error:
        advice = "earlier stages are kept: make room, and run the same command again"
        raise ConfigError(f"{path} cannot be written: {error.strerror}; {advice}") from error
