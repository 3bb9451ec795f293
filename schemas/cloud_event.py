"""The headers that make a Kafka record a CloudEvent (1.0, Kafka binding, binary mode), alike for all that is sent."""

from __future__ import annotations

from datetime import datetime

Headers = list[tuple[str, bytes]]


def cloud_event(kind: str, source: str, id: str, time: datetime, content_type: str = "application/json") -> Headers:
    """All of them."""
    return [*of_kind(kind, source, content_type), *of_one(id, time.isoformat())]


def of_kind(kind: str, source: str, content_type: str = "application/json") -> Headers:
    """What events of a kind from one source share: for those that come by the thousand."""
    return [
        ("ce_specversion", b"1.0"),
        ("ce_type", kind.encode()),
        ("ce_source", source.encode()),
        ("content-type", content_type.encode()),
    ]


def of_one(id: str, time: str) -> Headers:
    """What each has of its own; `time` is ISO 8601."""
    return [("ce_id", id.encode()), ("ce_time", time.encode())]
