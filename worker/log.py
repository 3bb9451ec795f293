"""Logging to standard error: text for people, one JSON object a line for machines.

A line about a stream has it as `stream`, one about a frame has its position as `frame`: the id of its prediction, and
what its update event and its trace name too.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from schemas.config import Log
from worker.terminal import printable

_PLAIN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{key: value for key, value in vars(record).items() if key not in _PLAIN},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Text(logging.Formatter):
    """Messages quote what comes from outside: it may neither steer a terminal nor look like a line of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


def set_up_logging(settings: Log) -> None:
    """Configure the root logger; the Kafka client speaks only where everything is to be heard."""
    as_json = settings.format == "json" or (settings.format == "auto" and not sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if as_json else _Text("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=settings.level.upper(), handlers=[handler], force=True)
    # It says every error several times a second while the broker is away. We say that it is, with what to do.
    logging.getLogger("kafka").setLevel(logging.WARNING if settings.level == "debug" else logging.CRITICAL)
    logging.getLogger("PIL").setLevel(logging.INFO)
