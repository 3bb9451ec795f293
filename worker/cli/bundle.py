"""`driftkeel bundle ...`: show bundles, and make one from a trained classifier."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schemas.config import Batch, Frames
from schemas.errors import ConfigError, mistakes
from worker.cli.options import pixels

if TYPE_CHECKING:
    from meta.create.subject import CreateSettings
    from schemas.verdict import Verdict

bundle_app = typer.Typer(help="Show bundles, and make them from your own classifiers.", no_args_is_help=True)


@bundle_app.command("show")
def bundle_show(
    path: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    factory: Annotated[
        list[str] | None, typer.Option(help="module:function of your own model that the bundle may run.")
    ] = None,
    code: Annotated[Path, typer.Option(help="Folder that contains its module.")] = Path(),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the manifest as JSON, and everything else on standard error.")
    ] = False,
) -> None:
    """Check every hash of a bundle, and show what it is and its verdict, if it has one."""
    from meta.bundle import load_bundle
    from meta.bundle_folder import read_verdict
    from meta.imports import import_from
    from worker.cli.bundle_show import show
    from worker.terminal import printable_json, printable_lines, terminal

    if factory:
        import_from(code)
    bundle = load_bundle(path, factory or ())
    rest = sys.stderr if as_json else sys.stdout
    if as_json:
        print(printable_json(bundle.manifest.model_dump_json(indent=2)))
    else:
        show(terminal(), bundle)
    if (verdict := read_verdict(path)) is not None:
        print(f"\n{printable_lines(_verdict_lines(verdict))}\n", file=rest)
    print(f"sound: bundle {bundle.hash}", file=rest)


@bundle_app.command("calibrate")
def bundle_calibrate(
    path: Annotated[Path, typer.Argument(help="A bundle of Fashion-MNIST; its manifest is rewritten.")],
    seed: Annotated[int, typer.Option(help="Seed of the simulated streams.")] = 1,
    windows: Annotated[int, typer.Option(min=2, help="Windows of 128 frames per stream.")] = 12,
) -> None:
    """Repeat the calibration of estimate and limits, in minutes; model, generator and statistics stay bit for bit."""
    from meta.recipe import calibrate_bundle
    from worker.process import keep_freed_memory

    keep_freed_memory()
    calibrate_bundle(path, f"driftkeel bundle calibrate {path} --seed {seed} --windows {windows}", seed, windows)


@bundle_app.command("create")
def bundle_create(
    model: Annotated[
        str,
        typer.Option(
            help="module:function that returns the network; or timm:NAME, torchvision:NAME, or a built-in name."
        ),
    ],
    weights: Annotated[Path, typer.Option(help="State dict: .safetensors, or .pt (loaded without running code).")],
    data: Annotated[Path, typer.Option(help="Images: a folder per class, a flat folder (no labels), or an .npz file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle to write.")],
    mean: Annotated[
        str, typer.Option(help="Mean of pixels in [0, 1], as in training: one number, or one per channel.")
    ],
    std: Annotated[str, typer.Option(help="Standard deviation, in the same form.")],
    labels: Annotated[
        Path | None,
        typer.Option(
            help="File with one label per line, in the order of the outputs; default: the folders sorted by name."
        ),
    ] = None,
    model_args: Annotated[str, typer.Option(help="Arguments of that function, as a JSON object.")] = "{}",
    generator: Annotated[
        str | None,
        typer.Option(help="Reuse the generator of this bundle, or of the 'example': takes minutes, not an hour."),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="WxH, as in training; default: the size of the images, if all have the same.")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="L or RGB; default: L if no image has colours.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=0, help="Steps of meta-training; default: 300, or 0 with --generator.")
    ] = None,
    calibration_windows: Annotated[
        int, typer.Option(min=2, help="Windows of eight micro-batches per simulated camera.")
    ] = 12,
    frames: Annotated[int, typer.Option(min=32, help="Frames per camera in the measurement.")] = 320,
    repeats: Annotated[int, typer.Option(min=1, help="Cameras per setting in the measurement.")] = 2,
    max_images: Annotated[int, typer.Option(min=100, help="Most images to use; the seed chooses which.")] = 10_000,
    seed: Annotated[
        int, typer.Option(help="Random seed; the same inputs and seed make the same bundle, on one machine.")
    ] = 0,
    name: Annotated[str | None, typer.Option(help="Name of the bundle; default: its folder's name.")] = None,
    code: Annotated[Path, typer.Option(help="Folder that contains the model's module.")] = Path(),
) -> None:
    """Make a bundle from your trained classifier and images of its training domain, and say whether to adapt it.

    If it is interrupted, the same command continues with the stage that was not finished.
    """
    from meta.bundle_folder import read_verdict
    from meta.create.piecewise import frames_in_pass
    from meta.create.run import create_bundle
    from meta.imports import import_from
    from worker.decode.image import decode_image
    from worker.process import keep_freed_memory
    from worker.site.folder import EXAMPLE_BUNDLE, shipped

    keep_freed_memory()
    import_from(code)
    width, height = pixels(size) or (None, None)
    given: dict[str, Any] = {
        "architecture": model,
        "arguments": _arguments(model_args),
        "weights": weights,
        "data": data,
        "labels": labels,
        "generator": shipped(EXAMPLE_BUNDLE) if generator == "example" else generator,
        "width": width,
        "height": height,
        "mode": mode,
        "mean": _numbers("--mean", mean),
        "std": _numbers("--std", std),
        "steps": steps,
        "calibration_windows": calibration_windows,
        "frames": frames,
        "repeats": repeats,
        "max_images": max_images,
        "seed": seed,
    }
    limits = Frames()
    manifest = create_bundle(
        _settings(given),
        name or output.name,
        output,
        shlex.join(["driftkeel", *sys.argv[1:]]),
        lambda content, preprocess: decode_image(content, limits, preprocess),
        lambda text: print(text, file=sys.stderr),
    )
    verdict = read_verdict(output)
    if verdict is not None:
        print(_verdict_lines(verdict))
    print(f"\nbundle {manifest.content_hash} written to {output}. For the worker's config:\n")
    print(_config_section(output, model, code, frames_in_pass(manifest.preprocess.height, manifest.preprocess.width)))


def _settings(given: dict[str, Any]) -> CreateSettings:
    from pydantic import ValidationError

    from meta.create.subject import CreateSettings

    try:
        return CreateSettings(**given)
    except ValidationError as error:
        where, words = mistakes(error)[0]
        raise ConfigError(f"--{where.partition('.')[0].replace('_', '-')}: {words}") from error


def _arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--model-args is not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise ConfigError('--model-args must be a JSON object, such as {"classes": 10}')
    return arguments


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} {text!r} is not a list of numbers, such as 0.5 or 0.485,0.456,0.406") from error


def _verdict_lines(verdict: Verdict) -> str:
    what = "accuracy" if verdict.truth == "labels" else "agreement with the source model's undisturbed answers"
    lines = [f"{what}, %", f"{'setting':30s} {'frames':>7s} {'source':>7s} {'adapted':>8s} {'gain':>6s}"]
    for m in verdict.settings:
        numbers = f"{100 * m.source:7.1f} {100 * m.adapted:8.1f} {100 * m.gain:+6.1f} ± {100 * m.error:.1f}"
        lines.append(f"{m.setting:30s} {m.frames:7d} {numbers}")
    lines.append(f"clean images: {100 * verdict.clean_accuracy:.1f}; generator: {verdict.generator}")
    lines += [f"\nverdict: {verdict.recommendation}", *[f"  {reason}" for reason in verdict.reasons]]
    return "\n".join(lines)


def _config_section(output: Path, model: str, code: Path, frames: int) -> str:
    lines = ["bundle:", f"  path: {output}"]
    if ":" in model:
        lines.append(f'  factories: ["{model}"]  # the bundle may run this code, and no other')
        if model.partition(":")[0] not in ("timm", "torchvision"):
            lines.append(f"  code: {code.resolve()}  # the folder that contains it; not needed if it is installed")
    usual = Batch()
    if frames < usual.max_pass:
        sizes = f"{{max_batch: {min(usual.max_batch, frames)}, max_pass: {frames}}}"
        lines.append(f"batch: {sizes}  # pictures of this size need much memory in a pass")
    return "\n".join(lines)
