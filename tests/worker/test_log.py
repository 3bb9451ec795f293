"""Log lines for machines can be found by stream and frame position."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from datetime import UTC, datetime

import pytest

from schemas.config import Log
from schemas.update import UpdateEvent
from worker.log import Trouble, set_up_logging
from worker.streams.pending import _say


@pytest.fixture(autouse=True)
def as_it_was():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    yield
    root.handlers[:], root.level = handlers, level
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    logging.captureWarnings(False)


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


def test_trouble_is_said_when_it_is_news(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    trouble = Trouble(logging.getLogger("driftkeel.test"))
    caplog.set_level(logging.INFO, "driftkeel.test")

    def said(*reasons: str) -> list[str]:
        caplog.clear()
        for reason in reasons:
            trouble.goes_on(reason, "away: %s", reason)
        return [record.getMessage() for record in caplog.records]

    def over() -> list[str]:
        caplog.clear()
        trouble.is_over("back")
        return [record.getMessage() for record in caplog.records]

    assert over() == []
    assert said("refused", "refused", "refused") == ["away: refused"]
    assert said("3 of 4 expired", "1 of 7 expired", "refused") == ["away: 3 of 4 expired", "away: refused"]
    assert over() == ["back"]
    assert over() == []
    assert said("", "", "refused") == ["away: ", "away: refused"]
    assert over() == ["back"]
    assert said("refused") == ["away: refused"]
    monkeypatch.setattr("worker.log.SAY_AGAIN_S", 0.0)
    assert said("refused") == ["away: refused"]


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


ALL_THERE_IS = """
import gc, logging, sys, threading, warnings
from schemas.config import Log
from worker.log import set_up_logging

class Fails:
    def __del__(self):
        raise ValueError("in a destructor")

def fail():
    raise ValueError("in a thread")

set_up_logging(Log(format=sys.argv[1], level="debug"))
warnings.warn("take care")
thread = threading.Thread(target=fail, name="reach")
thread.start()
thread.join()
threading.Thread(target=sys.exit).start()
Fails()
logging.getLogger("kafka.net.manager").warning("Connection failed:\\n%s", "nobody")
raise ValueError("at the end")
"""


def all_there_is(format: str) -> list[str]:
    result = subprocess.run([sys.executable, "-c", ALL_THERE_IS, format], capture_output=True, text=True, timeout=240)
    assert (result.returncode, result.stdout) == (1, "")
    return result.stderr.splitlines()


def test_for_machines_everything_is_an_event() -> None:
    warned, thread, destructor, kafka, last = map(json.loads, all_there_is("json"))
    assert "UserWarning: take care" in warned["message"]
    assert (warned["level"], warned["logger"]) == ("warning", "py.warnings")
    assert thread["message"] == "thread reach ends: ValueError: in a thread"
    assert "__del__" in destructor["message"]
    assert kafka["message"] == "Connection failed:\nnobody"
    assert last["level"] == "critical"
    assert "ValueError: at the end" in last["message"]
    for event, where in ((thread, "in fail"), (destructor, "in __del__"), (last, "in <module>")):
        assert event["exception"].startswith("Traceback")
        assert where in event["exception"]


def test_for_people_python_speaks_as_ever() -> None:
    lines = all_there_is("text")
    assert lines.count("Traceback (most recent call last):") == 3
    assert lines[-1] == "ValueError: at the end"
