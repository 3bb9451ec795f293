"""Somebody's checkpoint and folder of images, to predictions of an adapting worker, by command line alone."""

import io
from pathlib import Path
from shutil import copy

import numpy as np
import torch
import yaml
from PIL import Image

from meta.bundle_folder import read_verdict
from tests.foreign import LABELS, batchnorm_net, pictures, trained, write_folder
from tests.system.conftest import Site, run_cli


def test_from_a_checkpoint_to_adapted_predictions(site: Site, tmp_path: Path) -> None:
    home = tmp_path / "home"
    write_folder(home / "images")
    copy(Path(__file__).parents[1] / "foreign.py", home / "my_net.py")
    torch.save(trained(batchnorm_net).state_dict(), home / "net.pt")
    bundle = home / "my-bundle"
    options = {
        "model": "my_net:batchnorm_net",
        "code": home,
        "weights": home / "net.pt",
        "data": home / "images",
        "generator": "example",
        "mean": "0.3",
        "std": "0.2",
        "output": bundle,
        "frames": 64,
        "calibration-windows": 2,
    }
    created = run_cli(
        "bundle",
        "create",
        *[str(part) for option in options.items() for part in (f"--{option[0]}", option[1])],
        timeout=800,  # It computes for a quarter of a minute, and the machine may have more to do.
    )
    assert created.returncode == 0, created.stderr
    verdict = read_verdict(bundle)
    assert verdict is not None
    assert f"verdict: {verdict.recommendation}" in created.stdout
    section = yaml.safe_load(created.stdout.partition("worker's config:")[2])

    again = run_cli("bundle", "create", *[f"--{name}={part}" for name, part in options.items()])
    assert again.returncode == 1
    assert "is there already" in again.stderr

    shown = run_cli("bundle", "show", str(bundle))
    assert shown.returncode == 1
    assert "list it under bundle.factories" in shown.stderr
    assert "takes it as --factory" in shown.stderr

    worker = site.start(**section)
    images, labels = pictures(48, 5)
    ids = site.send([("cam", _png(image)) for image in images])
    site.wait_folded(worker, {"cam": len(ids)})
    predictions = site.predictions(ids)
    right = [predictions[i][0].label == LABELS[label] for i, label in zip(ids, labels, strict=True)]
    assert sum(right) > 0.8 * len(right)
    header = site.header("cam")
    assert header is not None
    assert header.step > 0
    assert worker.stop() == 0


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
