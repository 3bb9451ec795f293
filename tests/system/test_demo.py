"""The demo, small: its numbers, its report, and that it leaves nothing behind."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meta.bundle_folder import read_manifest
from meta.data import LabelledImages
from schemas.config import Frames
from tests.conftest import SHIPPED_BUNDLE
from tests.servers import wait_for_end
from tests.system.conftest import run_cli
from worker.decode.image import decode_image
from worker.demo.cameras import CAMERAS, film
from worker.demo.run import _standstill, _unwind_on_signals
from worker.demo.summary import summarise


@pytest.mark.long
def test_small_demo(tmp_path: Path) -> None:
    report, page, picture = tmp_path / "demo.json", tmp_path / "demo.html", tmp_path / "demo.svg"
    result = run_cli(
        *("demo", "--frames", "600", "--seed", "3", "--no-view", "--bundle", str(SHIPPED_BUNDLE)),
        *("--report", str(report), "--html", str(page), "--picture", str(picture)),
        timeout=800,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    numbers = json.loads(report.read_text())
    assert numbers["frames_sent"] == numbers["frames_predicted"] == 3_600
    assert numbers["predictions_missing"] == 0
    assert numbers["predictions_duplicated"] == 0
    assert set(numbers["streams"]) == {camera.stream for camera in CAMERAS}
    for stream in numbers["streams"].values():
        assert stream["updates_applied"] + stream["updates_skipped"] >= 600 // 16
        assert stream["updates_applied"] > 30
    assert numbers["gain_shifted_points"] > 3
    assert numbers["gain_healthy_points"] > -2.5
    assert numbers["frames_per_second"] > 0
    assert numbers["seconds"] > 0
    html = page.read_text()
    assert html.count("<svg") == 1
    assert not re.search(r"(src|href)=\"https?://", html)
    assert picture.read_text().startswith("<svg")
    assert "five drifting cameras" in summarise([numbers])


@pytest.mark.long
def test_interrupted_demo_stops_all_it_started(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "worker",
        "demo",
        "--frames",
        "9000",
        "--no-view",
        "--html",
        str(tmp_path / "r.html"),
    ]
    demo = subprocess.Popen(
        [*command, "--bundle", str(SHIPPED_BUNDLE)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert demo.stdout is not None
    for line in demo.stdout:
        if "/9" not in line and re.search(r"^\d+/\d+ frames", line):
            break
    children = [int(pid) for pid in Path(f"/proc/{demo.pid}/task/{demo.pid}/children").read_text().split()]
    assert len(children) == 4
    demo.send_signal(signal.SIGINT)
    demo.communicate(timeout=120)
    assert demo.returncode == 130
    wait_for_end(children)


def test_a_worker_that_stands_still_says_all_there_is_to_say(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    log.write_text("")
    assert _standstill(None, 240.2, log) == (
        "the worker has answered no frame for 240 s, and has written nothing; is this machine busy, or short of memory?"
    )
    log.write_text("\n".join(f"line {i}" for i in range(20)))
    first, *lines = _standstill(-9, 1.0, log).splitlines()
    assert (first, len(lines), lines[-1]) == ("the worker has ended with code -9; its last lines:", 8, "line 19")


def test_an_interrupt_that_somebody_else_catches_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: dict[int, Any] = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    again = _unwind_on_signals()
    again()
    with contextlib.suppress(BaseException):  # as kafka-python's event loop does
        handlers[signal.SIGINT](signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        again()


@pytest.mark.parametrize("camera", CAMERAS, ids=lambda c: c.stream)
def test_reels_repeat_by_seed_and_differ_between_seeds(camera) -> None:
    random = np.random.default_rng(0)
    data = LabelledImages(random.integers(0, 255, (40, 28, 28), np.uint8), np.arange(40) % 10)
    first, again, other = film(camera, data, 48, 1), film(camera, data, 48, 1), film(camera, data, 48, 2)
    assert first.frames == again.frames
    assert first.frames != other.frames
    assert first.severity[0] == 0
    assert first.severity[-1] == 0
    assert (first.severity.max() > 0.2) == (camera.shift is not None)
    preprocess = read_manifest(SHIPPED_BUNDLE).preprocess
    assert all(decode_image(frame, Frames(), preprocess).shape == (28, 28) for frame in first.frames)
    # Neighbouring frames show the same garment.
    assert np.array_equal(first.labels[::2], first.labels[1::2])
