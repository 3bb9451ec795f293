"""The console's sources: figures from metrics, pictures from hostile bytes, frames by their position."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from prometheus_client import generate_latest

from monitoring.metrics import WorkerMetrics
from schemas.config import Frames, Kafka
from schemas.errors import FrameError
from schemas.frame import Position
from tests.conftest import Topic, picture
from tests.monitoring.console.records import prediction
from tests.servers import wait_until
from worker.console import connections, thumbnails
from worker.console.site import BAD, LAG, PREDICTIONS, every_address, read_sums
from worker.console.thumbnails import SMALL, Thumbnails, thumbnail

LIMITS = Frames()


def test_figures_are_read_from_what_a_worker_shows() -> None:
    metrics = WorkerMetrics(5)
    metrics.predictions.inc(7)
    metrics.bad_frames.labels("damaged").inc(2)
    metrics.bad_frames.labels("empty").inc()
    metrics.set_lag({("frames", 0): 3, ("frames", 1): 4})
    sums = read_sums(generate_latest(metrics.registry).decode())
    assert sums == {PREDICTIONS: 7, LAG: 7, BAD: 3}
    assert read_sums("") == {PREDICTIONS: 0, LAG: 0, BAD: 0}


def test_a_name_becomes_its_addresses() -> None:
    assert every_address("http://localhost:9464/metrics") == ["http://127.0.0.1:9464/metrics"]
    assert every_address("http://[::1]:9464/metrics") == ["http://[::1]:9464/metrics"]
    assert every_address("https://site.example/metrics") == ["https://site.example/metrics"]
    assert every_address("http://no.such.name.invalid/metrics") == ["http://no.such.name.invalid/metrics"]


@pytest.mark.parametrize(
    ("mode", "size", "format", "kind"),
    [("L", (28, 28), "PNG", "PNG"), ("RGB", (1280, 720), "JPEG", "JPEG"), ("RGB", (64, 96), "WEBP", "PNG")],
)
def test_thumbnails_are_small_and_written_anew(mode: str, size: tuple[int, int], format: str, kind: str) -> None:
    source = Image.open(io.BytesIO(picture(1, size, format, mode)))
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "a secret of the camera"
    source.save(out, format, exif=exif)
    small = thumbnail(out.getvalue(), LIMITS, SMALL)
    assert b"secret" not in small
    made = Image.open(io.BytesIO(small))
    assert made.format == kind
    assert max(made.size) <= SMALL
    assert max(made.size) == min(SMALL, max(size))


@given(st.binary(max_size=200), st.integers(0, 400))
def test_hostile_bytes_give_an_error_and_nothing_else(noise: bytes, place: int) -> None:
    good = picture(2)
    for content in (noise, good[:place], good[:place] + noise + good[place + len(noise) :]):
        try:
            Image.open(io.BytesIO(thumbnail(content, LIMITS, SMALL))).verify()
        except FrameError:
            continue


def test_too_large_a_picture_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(FrameError, match="max_pixels"):
        thumbnail(picture(0, (400, 300)), Frames(max_pixels=100_000), SMALL)


def test_frames_are_fetched_one_by_one(kafka_settings: Kafka, topic: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many streams, several partitions, one frame each from anywhere in the topic; what is not there is left out."""
    frames: list[tuple[bytes | None, bytes | None, list[Any]]] = [
        (f"s{i % 7}".encode(), picture(i), []) for i in range(140)
    ]
    sent = topic.send(kafka_settings.topics.frames, frames)
    chosen = {f"s{i % 7}": i for i in (3, 40, 75, 76, 120, 134, 138)}
    asked = [
        prediction(stream, id=f"{sent[i].topic}/{sent[i].partition}/{sent[i].offset}") for stream, i in chosen.items()
    ]
    asked += [prediction("lost", id=f"{kafka_settings.topics.frames}/0/999999")]
    asked += [prediction("nowhere", id=f"{kafka_settings.topics.frames}/77/0")]
    monkeypatch.setattr(thumbnails, "EVERY_S", 0.0)
    made = Thumbnails(kafka_settings, LIMITS)
    pictures: dict[str, bytes] = {}

    def complete() -> bool:
        """As the page asks, until it has all; a busy machine may need more than once."""
        pictures.update({p.prediction.stream: p.image for p in made.get(asked, large=False)})
        return set(pictures) >= set(chosen)

    wait_until(complete, "the pictures")
    made.close()
    assert set(pictures) == set(chosen)
    for stream, i in chosen.items():
        assert pictures[stream] == thumbnail(picture(i), LIMITS, SMALL)


def test_a_frame_that_did_not_come_in_time_is_asked_for_again_but_not_for_ever(
    kafka_settings: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its camera may send no other. What is no frame of the topic is never asked for."""
    monkeypatch.setattr(thumbnails, "EVERY_S", 0.0)
    made, asked = Thumbnails(kafka_settings, LIMITS), []
    found: dict[Position, bytes] = {}

    def read(wanted: set[Position]) -> dict[Position, bytes]:
        asked.extend(wanted)
        return found

    monkeypatch.setattr(made._reader, "read", read)
    late, gone = (prediction(s, id=f"{kafka_settings.topics.frames}/0/{i}") for i, s in enumerate(("late", "gone")))
    elsewhere = prediction("elsewhere", id="elsewhere/0/0")
    assert made.get([late, gone, elsewhere], large=False) == []
    found[Position(kafka_settings.topics.frames, 0, 0)] = picture(1)
    for _ in range(20):
        assert [p.prediction.stream for p in made.get([late, gone, elsewhere], large=False)] == ["late"]
    assert [sum(where.offset == offset for where in asked) for offset in (0, 1)] == [2, thumbnails.TRIES]
    assert {where.topic for where in asked} == {kafka_settings.topics.frames}


async def _answers(app: Any, *sent: bytes) -> list[bytes]:
    """What connections hear that send these bytes and then wait, until they are closed."""
    plain: dict[str, Any] = {"log_config": None, "lifespan": "off", "ws": "none", "timeout_keep_alive": 1}
    config = uvicorn.Config(app, port=0, http=connections.Impatient, **plain)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    port = server.servers[0].sockets[0].getsockname()[1]

    async def one(content: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(content)
        heard = await reader.read()
        writer.close()
        return heard

    try:
        return await asyncio.wait_for(asyncio.gather(*map(one, sent)), 120)
    finally:
        await server.shutdown()


def test_connections_that_ask_for_nothing_are_closed_and_slow_answers_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.05)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.5)  # ten times as long as a connection may be silent
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    request = b"GET / HTTP/1.1\r\nhost: here\r\n"
    silent, slow, asked, again = asyncio.run(
        _answers(app, b"", request, request + b"\r\n", request + b"\r\n" + request)
    )
    assert (silent, slow) == (b"", b"")
    assert asked.endswith(b"ok")
    assert again.count(b"ok") == 1
