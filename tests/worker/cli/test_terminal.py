"""What commands print of things that come from outside, and a stored stream at a glance."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from meta.bundle_folder import read_manifest
from schemas.policy import Policy, PolicyChange
from schemas.prediction import Prediction
from schemas.state import DriftWatch, GuardState, Snapshot, StreamHeader
from schemas.update import Proxies
from tests.monitoring.console.records import event, prediction
from worker.cli.app import run
from worker.cli.command import _print_outcome
from worker.cli.streams_show import show
from worker.control.stored import ListedStream
from worker.demo.score import Scoreboard
from worker.demo.view import open_view
from worker.site import doctor
from worker.terminal import printable_json
from worker.watch import LatestPredictions, line

SEEN = Proxies(estimated_accuracy=0.912, low=0.85, high=0.95, source_accuracy=0.7, confidence=0.9, entropy=0.2)
HOSTILE = "[/red]\x1b[2J"


def header(**changes: Any) -> StreamHeader:
    fields = {"stream": "cam", "bundle": "b" * 16, "method": "mgg", "step": 1_180, "frames": 9_440, "events": 1_200}
    return StreamHeader(**{**fields, "positions": {"frames/0": 9_500}, **changes})


def shown(
    found: StreamHeader | None, policy: Policy | None = None, kept: tuple[Snapshot | None, ...] = (), **changes: Any
) -> str:
    fields = {"stream": "cam", "owner": "w-1", "token": 4, "header": found, "tensor_bytes": 7_120, "snapshots": 1}
    console = Console(width=200)
    with console.capture() as capture:
        show(console, ListedStream(**{**fields, **changes}), kept, policy or Policy(), SEEN)
    return capture.get()


def test_a_stream_at_a_glance() -> None:
    moment = datetime(2026, 3, 1, 12, tzinfo=UTC)
    kept = Snapshot(time=moment, reason="100 updates since the last", proxies=SEEN, header=header(step=1_100))
    policy = Policy(mode="canary", canary_share=1, frozen=True, max_updates_per_hour=9, quiet_hours=("22:00-06:00",))
    found = header(policy=PolicyChange(frozen=True), drift=DriftWatch(adapting=False), commands={"commands/0": 5})
    lines = [" ".join(line.split()) for line in shown(found, policy, (kept,)).splitlines()]
    assert lines == [
        "cam ok",
        "owner w-1 (token 4)",
        "answered by adapted",
        "updates 1,180 applied, 9,440 frames and 1,200 events so far",
        "estimated accuracy 91.2% (85% to 95%), of source 70.0%",
        "policy mode canary, share 1, frozen, at most 9 updates an hour, quiet 22:00-06:00 UTC (by command: frozen)",
        "drift settled",
        "folded up to frames/0/9500",
        "obeyed up to commands/0/5",
        "bundle bbbbbbbbbbbbbbbb (mgg)",
        "state 7,120 bytes, 1 snapshot",
        "roll back step taken, UTC estimated accuracy why",
        "1 1,100 2026-03-01 12:00:00 91.2% (85% to 95%), of source 70.0% 100 updates since the last",
    ]


@pytest.mark.parametrize(
    ("found", "policy", "why"),
    [
        (header(step=0), Policy(), "source: no update yet"),
        (header(), Policy(mode="shadow"), "source: the policy's mode is shadow"),
        (header(), Policy(mode="approve"), "source: nothing is approved yet"),
        (header(approved=3), Policy(mode="approve"), "answered by         approved"),
        (header(), Policy(mode="canary", canary_share=0), "source: the stream is not in the canary's share"),
        (header(guard=GuardState(trusted=False, doubted=64)), Policy(), "doubted the adapted parameters for 64 frames"),
        (header(probation=20), Policy(), "source: for another 20 frames, after a change of bundle"),
    ],
)
def test_it_says_why_source_answers(found: StreamHeader, policy: Policy, why: str) -> None:
    assert why in shown(found, policy)


def test_what_a_command_took_back_is_said() -> None:
    assert "mode auto (by command: not frozen)" in shown(header(policy=PolicyChange(frozen=False)))


def test_what_is_wrong_stands_first() -> None:
    assert "cam  damaged: the header cannot be read" in shown(None)
    text = "cam  expired: its next frame starts from the source model, unless a worker still has it in memory"
    assert text in shown(header(), tensor_bytes=0)
    assert "cam  foreign: key k in the store is a list" in shown(header(), foreign="key k in the store is a list")


def test_a_snapshot_that_cannot_be_read_has_a_row() -> None:
    assert "it is damaged or too large: roll back to another" in shown(header(), kept=(None,))


def test_nothing_from_outside_steers_the_terminal() -> None:
    latest = LatestPredictions()
    latest.take(prediction(HOSTILE, label=HOSTILE))
    console = Console(width=200)
    with console.capture() as capture:
        console.print(latest.table())
    for text in (capture.get(), shown(header(stream=HOSTILE), stream=HOSTILE, owner=HOSTILE)):
        assert "\x1b[2J" not in text
        assert text.count("[/red]") == 2


def test_two_cameras_are_told_apart_at_eighty_columns() -> None:
    latest = LatestPredictions()
    for number in (1, 2):
        latest.take(prediction(f"hall-2/line-3/inspection/camera-{number}", label="T-shirt/top"))
    console = Console(width=80)
    with console.capture() as capture:
        console.print(latest.table())
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    names = "".join(line[:20].strip() for line in lines)
    assert "camera-1" in names
    assert "camera-2" in names
    for word in ("frames", "confidence", "answered", "estimated", "accuracy", "T-shirt/top"):
        assert word in capture.get()


def test_confidence_is_not_shown_as_the_accuracy_that_nobody_estimates() -> None:
    unknown = prediction("cam", confidence=0.99, estimated_accuracy=None)
    assert "accuracy  -  " in line(unknown)
    assert line(unknown).index("frames/0/") == line(prediction("cam", confidence=0.99)).index("frames/0/")
    latest, console = LatestPredictions(), Console(width=120)
    latest.take(unknown)
    with console.capture() as capture:
        console.print(latest.table())
    assert capture.get().split()[-1] == "-"
    seen = Proxies(confidence=0.99, entropy=0.1, flip_rate=0.9)
    with console.capture() as capture:
        show(console, ListedStream("cam", "", 0, header(method="tent"), 10, 0), (), Policy(), seen)
    assert "accuracy" not in capture.get()


def test_the_demo_s_count_of_frames_is_whole_at_eighty_columns() -> None:
    console = Console(width=80, force_terminal=True)
    with console.capture() as capture, open_view(True, console) as update:
        update(Scoreboard([]), 1_234)
    assert "0 of 0 frames, 1,234 frames/s" in capture.get()


@pytest.mark.parametrize("time", ["2026-11-28T12:00:00", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
def test_no_prediction_has_a_time_that_some_zone_has_no_name_for(time: str) -> None:
    """`watch` gives times in the zone of who looks, and ended with such a one."""
    said = json.loads(prediction("cam").model_dump_json()) | {"event_time": time}
    with pytest.raises(ValidationError, match="event_time"):
        Prediction.model_validate_json(json.dumps(said))


def test_json_for_the_terminal_says_the_same() -> None:
    content = {"label": "Größe \N{GRINNING FACE} \x1b[2J\x9b2J\x7f\u202e\U000e0001"}
    text = printable_json(json.dumps(content, ensure_ascii=False, indent=2))
    assert json.loads(text) == content
    assert all(letter.isprintable() for line in text.splitlines() for letter in line)
    assert "Größe \N{GRINNING FACE}" in text


def as_run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["driftkeel", *arguments])
    with pytest.raises(SystemExit):
        run()


def test_a_bundle_from_outside_does_not_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_bundle_path: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(tiny_bundle_path)
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest.model_dump(mode="json"), HOSTILE: 1}))
    as_run(monkeypatch, "bundle", "show", str(tmp_path))
    said = capsys.readouterr().err
    assert said.startswith("driftkeel: ")
    assert "Extra inputs are not permitted" in said
    assert "\x1b" not in said


def test_what_others_say_does_not_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _print_outcome(event("cam", 3, reason=HOSTILE))
    monkeypatch.setattr(doctor, "examine", lambda config: [doctor.Finding("topics", "ok", HOSTILE)])
    as_run(monkeypatch, "doctor")
    said = capsys.readouterr().out
    assert said.count("[/red]") == 2
    assert "\x1b" not in said
