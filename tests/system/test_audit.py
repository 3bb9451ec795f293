"""The audit trail of workers that ran, were killed and were told things; read back by the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.command import Command
from schemas.policy import PolicyChange
from tests.conftest import picture
from tests.outline import rebuilt
from tests.system.conftest import Site, run_cli
from worker.audit.read import histories, read_topic
from worker.control.send import send_command


def audit(*arguments: str, code: int = 0) -> str:
    result = run_cli("audit", *arguments)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout


def test_the_topic_alone_tells_the_history(site: Site, site_file: str, tmp_path: Path) -> None:
    streams = ["cam-1", "cam-2"]
    site.expect_deaths()
    worker = site.start()
    site.send([(stream, picture(i)) for i in range(40) for stream in streams])
    site.wait_folded(worker, dict.fromkeys(streams, 40))
    for command in (
        Command(stream="cam-1", action="rollback", by="kim", reason="looked odd"),
        Command(stream="cam-1", action="policy", policy=PolicyChange(mode="shadow")),
        Command(stream="cam-2", action="freeze"),
    ):
        assert len(list(send_command(site.kafka, command, 120))) == 1
    site.send([(stream, picture(i)) for i in range(40) for stream in streams])
    worker.kill()  # In the middle: the next one publishes again what may not have reached the topic.
    second = site.start()
    site.wait_folded(second, dict.fromkeys(streams, 80))
    assert "reset, now at step 0" in run_cli("streams", "reset", "cam-2", "--config", site_file).stdout
    site.send([("cam-2", picture(i)) for i in range(8)])
    site.wait_folded(second, {"cam-2": 88})
    assert second.stop() == 0

    found = histories(read_topic(site.kafka))
    for stream in streams:
        header, outline = site.header(stream), rebuilt(found[stream])
        assert (outline.step, outline.events, outline.frames, outline.folded, outline.last_event) == (
            header.step,
            header.events,
            header.frames,
            header.folded,
            header.last_event,
        )
    moved = next(e for e in found["cam-1"] if e.decision == "applied")
    assert moved.layers
    assert any(moved.layers.values())

    assert "sound: 2 streams" in audit("verify", "--config", site_file, "--store", "--complete")
    heads = tmp_path / "heads.json"
    assert f"{heads}: 2 streams" in audit("heads", "--config", site_file, "--output", str(heads))
    assert "sound: 2 streams" in audit("verify", "--config", site_file, "--heads", str(heads))
    shown = audit("show", "--config", site_file, "--stream", "cam-1")
    for text in ("rolled_back", "looked odd; by kim", "mode=shadow", "applied", "→"):
        assert text in shown
    assert all(stream in audit("show", "--config", site_file) for stream in streams)
    page = tmp_path / "audit.html"
    audit("report", "--config", site_file, "--output", str(page))
    assert "The record is sound" in page.read_text()
    table = tmp_path / "audit.csv"
    audit("export", "--config", site_file, "--format", "csv", "--output", str(table))
    assert len(table.read_text().splitlines()) == 1 + sum(map(len, found.values()))

    # A record that somebody has tampered with does not pass.
    trail = tmp_path / "trail.jsonl"
    audit("export", "--config", site_file, "--output", str(trail))
    assert "sound: 2 streams" in audit("verify", "--file", str(trail))
    lines = trail.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if "looked odd" in line)
    number = next(e.number for e in found["cam-1"] if "looked odd" in e.reason)
    trail.write_text("\n".join([*lines[:place], lines[place].replace("looked odd", "routine"), *lines[place + 1 :]]))
    assert f"altered    cam-1@{number} " in audit("verify", "--file", str(trail), code=1)
    trail.write_text("\n".join([*lines[:place], *lines[place + 1 :]]))
    assert f"missing    cam-1@{number} " in audit("verify", "--file", str(trail), code=1)
    audit("report", "--file", str(trail), "--output", str(page))
    assert "The record is not sound" in page.read_text()


def test_what_an_operator_did_to_a_silent_camera_waits_in_the_store(site: Site, site_file: str) -> None:
    worker = site.start()
    site.send([(stream, picture(i)) for i in range(8) for stream in ("cam-1", "cam-2")])
    site.wait_folded(worker, {"cam-1": 8, "cam-2": 8})
    assert worker.stop() == 0
    event = f"cam-1@{site.header('cam-1').events + 1}"
    run_cli("streams", "reset", "cam-1", "--config", site_file)
    line, end = audit("verify", "--config", site_file, "--store", "--complete").splitlines()
    assert (
        line == f"waiting    {event} is beside the state of cam-1 in the store; the stream's next worker publishes it"
    )
    assert end.startswith("sound: 2 streams")
    worker = site.start()
    site.send([("cam-1", picture(i)) for i in range(8)])
    site.wait_folded(worker, {"cam-1": 16})
    assert worker.stop() == 0
    assert audit("verify", "--config", site_file, "--store").startswith("sound: 2 streams")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "--stream", "nobody"], "no events of stream 'nobody'"),
        (["verify", "--file", "/nowhere"], "/nowhere cannot be read"),
        (["show", "--file", __file__], "line 1 is not an update event, and there are none"),
        (["export", "--output", "/nowhere/x"], "/nowhere/x cannot be written"),
        (["export", "--output", "x", "--stream", "cam"], "jsonl exports the whole record as published"),
    ],
)
def test_mistakes_are_one_line(site_file: str, arguments: list[str], message: str) -> None:
    result = run_cli("audit", *arguments, "--config", site_file)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
