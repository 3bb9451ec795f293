from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from schemas.errors import FrameError
from schemas.frame import LATEST_MS, Frame, Position, parse_frame

POSITION = Position("frames", 2, 77)


def parse(key: bytes | None = b"cam-1", value: bytes | None = b"x", headers: list | None = None, ms: int = 0) -> Frame:
    return parse_frame(POSITION, key, value, headers or [], ms, max_bytes=100, max_stream_id_bytes=20)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (str(POSITION), POSITION),
        ("a/b/2/17", Position("a/b", 2, 17)),
        ("frames/-1/17", None),
        ("frames/1/\N{SUPERSCRIPT TWO}", None),
        ("frames/1/\N{ARABIC-INDIC DIGIT TWO}", None),
        ("frames/1", None),
        ("", None),
        ("frames/1/" + 30 * "9", None),
    ],
)
def test_positions_from_records_are_checked(text: str, found: Position | None) -> None:
    assert Position.read(text) == found


def test_plain_record() -> None:
    frame = parse("kamera-größe".encode(), b"bytes", ms=1_500)
    assert (frame.stream, frame.image, str(frame.position)) == ("kamera-größe", b"bytes", "frames/2/77")
    assert frame.event_time == datetime.fromtimestamp(1.5, UTC)


def test_cloudevents_headers() -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    frame = parse(headers=[("ce_time", b"2026-05-01T10:00:00Z"), ("traceparent", trace.encode())])
    assert frame.event_time == datetime(2026, 5, 1, 10, tzinfo=UTC)
    assert frame.traceparent == trace


@pytest.mark.parametrize("time", [b"yesterday", b"\xff\xfe", b"9" * 500, b""])
def test_bad_event_time_falls_back_to_the_record(time: bytes) -> None:
    assert parse(headers=[("ce_time", time)], ms=2_000).event_time == datetime.fromtimestamp(2, UTC)


@pytest.mark.parametrize(
    "time",
    [
        b"0001-01-01T00:00:00+23:59",
        b"0001-01-01",
        b"9999-12-31T23:59:59-12:00",
        b"9999-12-31T23:59:59Z",
        b"2026-05-01T10:00:00+00:00:30.5",
    ],
)
def test_whoever_reads_a_prediction_can_read_its_time(time: bytes) -> None:
    moment = parse(headers=[("ce_time", time)], ms=LATEST_MS - 1).event_time
    assert TypeAdapter(datetime).validate_json(f'"{moment.isoformat()}"') == moment
    for hours in (-14, 14):
        moment.astimezone(timezone(timedelta(hours=hours)))


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        (None, b"x", "no_key"),
        (b"", b"x", "no_key"),
        (b"\xff\xfe", b"x", "bad_key"),
        (b"a\nb", b"x", "bad_key"),
        (b"*", b"x", "bad_key"),
        (b"c" * 21, b"x", "bad_key"),
        (b"cam", None, "empty"),
        (b"cam", b"", "empty"),
        (b"cam", b"x" * 101, "too_large"),
    ],
)
def test_bad_records(key: bytes | None, value: bytes | None, kind: str) -> None:
    with pytest.raises(FrameError) as caught:
        parse(key, value)
    assert caught.value.kind == kind


@given(
    st.none() | st.binary(max_size=40),
    st.none() | st.binary(max_size=120),
    st.lists(st.tuples(st.sampled_from(["ce_time", "traceparent", "CE_TIME"]), st.binary(max_size=80)), max_size=4),
    st.integers(-(2**63), 2**63 - 1),
)
def test_no_bytes_break_the_parser(key: bytes | None, value: bytes | None, headers: list, ms: int) -> None:
    try:
        frame = parse(key, value, headers, ms)
    except FrameError:
        return
    assert frame.stream.encode() == key
    assert frame.event_time.tzinfo is not None
