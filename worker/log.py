"""Logging to standard error: text for people, or for machines one JSON object per line, warnings and tracebacks too.

A line about a stream has the field `stream`. A line about a frame has its position as `frame`, which is the id of its
prediction and stands in its update event and its trace too.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from datetime import UTC, datetime

from schemas.config import Log
from schemas.errors import DriftkeelError
from worker.terminal import printable

log = logging.getLogger("driftkeel")
SAY_AGAIN_S = 300.0  # between lines about trouble that goes on
LINES, LINES_S = 10, 60.0  # so many lines of one kind per so many seconds: senders must not fill a disk with them
_PLAIN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().rstrip(),
            **{key: value for key, value in vars(record).items() if key not in _PLAIN},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Text(logging.Formatter):
    """Messages quote text from outside, which must neither control a terminal nor look like a line of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


class Trouble:
    """Logs an action that is tried again until it succeeds: the first failure, every new reason, now and then while it
    goes on, and the success. Not every try."""

    def __init__(self, log: logging.Logger) -> None:
        self._log, self._kind, self._said = log, "", 0.0

    def goes_on(self, reason: str, text: str, *arguments: object) -> None:
        """Another try has failed. Reasons that differ only in numbers count as the same."""
        now, kind = time.monotonic(), re.sub(r"\d+", "", reason) or "unknown"
        if kind != self._kind or now - self._said >= SAY_AGAIN_S:
            self._kind, self._said = kind, now
            self._log.warning(text, *arguments)

    def is_over(self, text: str, *arguments: object) -> None:
        """A try has succeeded, perhaps the first."""
        if self._kind:
            self._log.info(text, *arguments)
        self._kind = ""


class LineLimit:
    """Counts lines of each kind, so that only some per minute are written, and one with the number of the others."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[float, int]] = {}  # by kind: when its minute began, and how many lines since then

    def one_more(self, kind: str) -> bool:
        """Whether this one is to be written."""
        since, before = self._of.get(kind, (time.monotonic(), 0))
        self._of[kind] = since, before + 1
        return before < LINES

    def left_out(self) -> list[tuple[str, int]]:
        """The kinds whose minute is over, with the number of lines that were not written, where there were any."""
        now = time.monotonic()
        over = [kind for kind, (since, _) in self._of.items() if now - since >= LINES_S]
        counts = [(kind, self._of.pop(kind)[1] - LINES) for kind in over]
        return [(kind, more) for kind, more in counts if more > 0]


def set_up_logging(settings: Log) -> None:
    """Configure the root logger. The Kafka client's own lines are written at level debug only."""
    as_json = settings.format == "json" or (settings.format == "auto" and not sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if as_json else _Text("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=settings.level.upper(), handlers=[handler], force=True)
    # It logs every error several times a second while the broker is away. We log that once, with what to do.
    logging.getLogger("kafka").setLevel(logging.WARNING if settings.level == "debug" else logging.CRITICAL)
    logging.getLogger("PIL").setLevel(logging.INFO)
    if as_json:
        _take_over()


def told_as_event(error: DriftkeelError) -> bool:
    """Log why a command ends where the log is JSON; False where it is text, and the caller prints a line instead."""
    as_json = any(isinstance(handler.formatter, _JsonLines) for handler in logging.getLogger().handlers)
    if as_json:
        log.error("%s", error)
    return as_json


def _take_over() -> None:
    """Log in JSON what Python itself would print as text: warnings, and tracebacks over many lines."""
    logging.captureWarnings(True)
    sys.excepthook = lambda kind, error, trace: log.critical(
        "ends by an error that was not foreseen: %s", _named(kind, error), exc_info=(kind, error, trace)
    )
    threading.excepthook = _thread_failed
    sys.unraisablehook = _unraisable


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    if failed.exc_type is SystemExit:  # A thread may end that way, as it may with Python's own hook.
        return
    name = failed.thread.name if failed.thread else "unknown"
    log.error("thread %s ends: %s", name, _named(failed.exc_type, failed.exc_value), exc_info=failed.exc_value)


def _unraisable(failed: sys.UnraisableHookArgs) -> None:
    """In a destructor or a callback of C code."""
    what = f"{failed.err_msg or 'Exception ignored in'} {failed.object!r}"
    log.error("%s: %s", what, _named(failed.exc_type, failed.exc_value), exc_info=failed.exc_value)


def _named(kind: type[BaseException], error: BaseException | None) -> str:
    return f"{kind.__name__}: {error}"
