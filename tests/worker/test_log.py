"""Log lines for machines can be found by stream and frame position."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

import pytest

from schemas.config import Log
from schemas.update import UpdateEvent
from worker.log import set_up_logging
from worker.streams.journal import _say


@pytest.fixture(autouse=True)
def as_it_was():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def event(decision: str) -> UpdateEvent:
    return UpdateEvent(
        id="cam@7",
        stream="cam",
        time=datetime.now(UTC),
        decision=decision,
        reason="collapse: of all kinds",
        frames=["frames/0/41", "frames/0/42"],
        step=3,
        token=1,
        bundle="b",
        worker="w",
    )


def lines(capsys: pytest.CaptureFixture[str], **settings: str) -> list[str]:
    set_up_logging(Log(**settings))
    for decision in ("applied", "rolled_back"):
        _say(event(decision))
    return capsys.readouterr().err.splitlines()


def test_what_took_a_stream_back_is_found_by_its_newest_frame(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = lines(capsys, format="json")
    content = json.loads(line)
    assert content["level"] == "warning"
    assert content["stream"] == "cam"
    assert content["frame"] == "frames/0/42"
    assert content["decision"] == "rolled_back"
    assert "collapse" in content["message"]


def test_every_decision_is_there_for_who_asks(capsys: pytest.CaptureFixture[str]) -> None:
    decisions = [json.loads(line)["decision"] for line in lines(capsys, format="json", level="debug")]
    assert decisions == ["applied", "rolled_back"]


def test_people_get_text_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(lines(capsys)[0])["logger"] == "driftkeel.journal"  # auto, and this is no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    (line,) = lines(capsys)
    assert line.endswith("WARNING cam@7: rolled_back (collapse: of all kinds)")


def test_what_a_message_quotes_makes_no_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(Log(format="text"))
    logging.getLogger("driftkeel.commands").error("no command: %s", "x\n12:00:00 ERROR   all is lost \x1b[31m")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "no command: x\N{REPLACEMENT CHARACTER}12:00:00 ERROR   all is lost \N{REPLACEMENT CHARACTER}[31m"
    )


@pytest.mark.parametrize(("level", "heard"), [("info", False), ("debug", True)])
def test_the_kafka_client_is_heard_where_everything_is(
    level: str, heard: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging(Log(level=level, format="text"))
    logging.getLogger("kafka.net.manager").error("Connection failed: nobody there")
    assert ("nobody there" in capsys.readouterr().err) == heard
    logging.getLogger("kafka").setLevel(logging.NOTSET)
