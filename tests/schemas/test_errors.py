"""What validators found, in words for people."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from schemas.bundle import Preprocess
from schemas.command import Command
from schemas.config import Kafka
from schemas.errors import StateError, mistakes
from schemas.state import StreamHeader, decode_header, encode_header


def test_a_place_and_our_own_words() -> None:
    with pytest.raises(ValidationError) as caught:
        Kafka.model_validate({"bootstrap": "kafka:x", "topics": {"frames": 3}})
    assert mistakes(caught.value) == [
        ("bootstrap", "'kafka:x' is no host:port, such as kafka-1:9092 or [::1]:9092; commas separate several"),
        ("topics.frames", "Input should be a valid string"),
    ]
    with pytest.raises(ValidationError) as caught:
        Preprocess(mode="L", width=1, height=1, mean=[0.0], std=[0.0])
    assert mistakes(caught.value) == [("", "std must be positive")]


def test_a_stored_header_is_refused_in_these() -> None:
    header = json.loads(encode_header(StreamHeader(stream="cam", bundle="b", method="mgg")))
    header["policy"] = {"quiet_hours": ["never"]}
    with pytest.raises(StateError, match=r"is wrong at policy\.quiet_hours: 'never' is not a span such as"):
        decode_header(json.dumps(header).encode())


def test_a_stored_header_keeps_what_was_once_accepted() -> None:
    header = json.loads(encode_header(StreamHeader(stream="cam", bundle="b", method="mgg")))
    spans = ("10:00-10:00",) * 100
    header["policy"] = {"quiet_hours": spans}
    found = decode_header(json.dumps(header).encode()).policy
    assert found is not None
    assert found.quiet_hours == spans


def test_a_command_has_no_policy_that_would_fill_headers() -> None:
    change = {"quiet_hours": ["22:00-06:00"] * 25}
    with pytest.raises(ValidationError) as caught:
        Command.model_validate({"stream": "cam", "action": "policy", "policy": change})
    assert mistakes(caught.value) == [
        ("policy.quiet_hours", "Tuple should have at most 24 items after validation, not 25")
    ]
