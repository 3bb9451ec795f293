"""Frames of files and cameras in the topic: each once, in order, whatever breaks."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient
from kafka.admin import NewTopic
from kafka.errors import KafkaTimeoutError, MessageSizeTooLargeError, TopicAuthorizationFailedError

from schemas.config import Frames, Kafka, WorkerConfig
from schemas.errors import ConfigError, SourceError, UnreachableError
from schemas.frame import Position, parse_frame
from tests.chaos.proxy import flaky_broker
from tests.conftest import Topic, picture
from tests.videos import make_video
from worker.embedded import free_port
from worker.kafka.client import create_topics
from worker.produce.produce import MAX_ON_THE_WAY, Player, PlayOptions, Sender, Tally, explained, produce
from worker.produce.sent import Acknowledged, Sent
from worker.produce.sources import Encoding, Item, Picture, find

FAST = PlayOptions(fast=True)


class Site:
    """A frames topic, and a file that remembers."""

    def __init__(self, kafka: Kafka, topic: Topic, folder: Path) -> None:
        self.kafka, self._topic, self.state = kafka, topic, folder / "state" / "produce.sqlite"

    def run(self, streams: dict[str, Iterable[Item]], options: PlayOptions = FAST, **frames: Any) -> list[Tally]:
        config = WorkerConfig(kafka=self.kafka, frames=Frames(**frames))
        return produce(config, streams, options, self.state, threading.Event())

    def play(self, path: Path, stream: str = "cam", options: PlayOptions = FAST) -> Tally:
        (tally,) = self.run({stream: find(str(path))[1]}, options)
        return tally

    def records(self, count: int) -> list[Any]:
        """All records, once there are so many; no more come."""
        found = self._topic.read(self.kafka.topics.frames, lambda rs: len(rs) >= count)
        assert len(found) == count
        return found

    def ids(self, count: int, stream: str = "cam") -> list[str]:
        return [dict(r.headers)["ce_id"].decode() for r in self.records(count) if r.key == stream.encode()]


@pytest.fixture
def site(kafka_settings: Kafka, topic: Topic, tmp_path: Path) -> Site:
    return Site(kafka_settings, topic, tmp_path)


def test_a_worker_understands_what_is_sent(site: Site, topic: Topic, tmp_path: Path) -> None:
    path = make_video(tmp_path / "cam.mp4", frames=6, fps=3)
    assert site.play(path).sent == 6
    records = site.records(6)
    frames = [
        parse_frame(Position(r.topic, r.partition, r.offset), r.key, r.value, r.headers, r.timestamp, 1 << 20, 200)
        for r in records
    ]
    assert {f.stream for f in frames} == {"cam"}
    seconds = [(f.event_time - frames[0].event_time).total_seconds() for f in frames]
    assert seconds == pytest.approx([i / 3 for i in range(6)], abs=1e-3)
    headers = dict(records[0].headers)
    assert headers["ce_type"] == b"io.driftkeel.frame.v1"
    assert headers["content-type"] == b"image/jpeg"
    assert headers["ce_source"].startswith(b"cam.mp4#")
    # Another producer, with Kafka's own partitioner, adds to the same partition.
    (other,) = topic.send(site.kafka.topics.frames, [(b"cam", picture(1), [])])
    assert {r.partition for r in records} == {other.partition}


def test_a_rerun_sends_nothing_twice(site: Site, tmp_path: Path) -> None:
    path = make_video(tmp_path / "cam.mp4", frames=6, fps=30)
    site.play(path)
    assert (site.play(path).sent, site.play(path).before) == (0, 6)
    site.ids(6)
    make_video(path, frames=4, fps=30)  # a new recording under the old name
    assert site.play(path).sent == 4
    assert site.play(path, options=PlayOptions(fast=True, again=True)).sent == 4
    assert site.ids(14) == [str(i) for i in (*range(6), *range(4), *range(4))]


def test_a_rerun_goes_on_where_the_last_one_stopped(site: Site, tmp_path: Path) -> None:
    path = make_video(tmp_path / "cam.mp4", frames=9, fps=30)
    for expected in (4, 4, 1, 0):
        assert site.play(path, options=PlayOptions(fast=True, limit=4)).sent == expected
    assert site.ids(9) == [str(i) for i in range(9)]


def test_pictures_that_are_added_later_are_sent_alone(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "cam"
    folder.mkdir()
    for number in (2, 3):
        (folder / f"{number}.png").write_bytes(picture(number))
    assert site.play(folder).sent == 2
    (folder / "1.png").write_bytes(picture(1))
    assert site.play(folder).sent == 1
    assert [r.value for r in site.records(3)] == [picture(2), picture(3), picture(1)]


def test_a_state_file_that_fell_behind_is_made_good_from_the_topic(site: Site, tmp_path: Path) -> None:
    path = make_video(tmp_path / "cam.mp4", frames=9, fps=30)
    site.play(path, options=PlayOptions(fast=True, limit=2))
    behind = tmp_path / "behind.sqlite"
    shutil.copy(site.state, behind)
    site.play(path, options=PlayOptions(fast=True, limit=5))
    shutil.copy(behind, site.state)  # as after a crash, before the file was written
    tally = site.play(path)
    assert (tally.sent, tally.before) == (2, 7)
    assert site.ids(9) == [str(i) for i in range(9)]


def test_streams_play_at_the_same_time_and_sources_of_one_in_turn(site: Site, tmp_path: Path) -> None:
    a, b = (make_video(tmp_path / f"{name}.mp4", frames=5, fps=30) for name in "ab")
    one = [*find(str(a))[1], *find(str(b))[1]]
    tallies = site.run({"both": one, "b": find(str(b))[1]})
    assert [(t.stream, t.sent) for t in tallies] == [("both", 10), ("b", 5)]
    assert site.ids(15, "both") == [str(i) for i in (*range(5), *range(5))]
    assert site.ids(15, "b") == [str(i) for i in range(5)]


def test_a_loop_numbers_its_rounds_and_remembers_nothing(site: Site, tmp_path: Path) -> None:
    path = make_video(tmp_path / "cam.mp4", frames=3, fps=30)
    assert site.play(path, options=PlayOptions(fast=True, loop=True, limit=7)).sent == 7
    assert site.ids(7) == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2", "2.0"]
    assert site.play(path).sent == 3


def test_a_loop_is_not_read_back_as_what_an_ordinary_run_has_sent(site: Site, tmp_path: Path) -> None:
    first, second = (make_video(tmp_path / f"{name}.mp4", frames=3, fps=30) for name in "ab")
    site.play(first)  # from here on the topic is read back
    site.play(second, options=PlayOptions(fast=True, loop=True, limit=4))
    assert site.play(second).sent == 3


def test_a_loop_ends_where_nothing_can_be_played_again(site: Site, tmp_path: Path) -> None:
    path = make_video(tmp_path / "cam.mp4", frames=3, fps=30)

    class Once:
        """As a pipe."""

        remembered, live, name = False, False, "once"

        def __init__(self) -> None:
            self._pictures = find(str(path))[1][0].pictures(Encoding(), 0)

        def pictures(self, encoding: Encoding, skip: int) -> Iterator[Picture]:
            yield from self._pictures

    options = PlayOptions(fast=True, loop=True)
    assert [tally.sent for tally in site.run({"cam": [Once()], "none": []}, options)] == [3, 0]


def test_event_time_can_be_now(site: Site, tmp_path: Path) -> None:
    path = make_video(tmp_path / "cam.mp4", frames=1, fps=30)
    before = datetime.now(UTC)
    site.play(path, options=PlayOptions(fast=True, now=True))
    (record,) = site.records(1)
    assert before <= datetime.fromisoformat(dict(record.headers)["ce_time"].decode()) <= datetime.now(UTC)


def test_a_frame_too_large_for_workers_is_refused_with_the_setting(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(picture(1, (400, 400)))
    with pytest.raises(SourceError, match=r"large.png#\w+ has .* frames.max_bytes = 1,000.*--size or --quality"):
        site.run({"cam": find(str(path))[1]}, max_bytes=1_000)


def test_a_frame_too_large_for_the_broker_names_both_settings() -> None:
    text = str(explained(MessageSizeTooLargeError(), Kafka(), "cam", 3_000_000))
    assert "max.message.bytes=3014656" in text
    assert "frames.max_bytes" in text
    assert "run the same command again" in str(explained(KafkaTimeoutError("away"), Kafka(), "cam", 1))


def test_one_stream_s_error_ends_all_and_loses_nothing(site: Site, tmp_path: Path) -> None:
    path = make_video(tmp_path / "cam.mp4", frames=50, fps=2)
    (tmp_path / "bad.mp4").write_text("no video")
    with pytest.raises(SourceError, match=r"bad.mp4 cannot be opened"):
        site.run({"cam": find(str(path))[1], "bad": find(str(tmp_path / "bad.mp4"))[1]}, PlayOptions())
    rest = site.play(path)
    assert rest.sent + rest.before == 50
    assert site.ids(50) == [str(i) for i in range(50)]


def test_a_broker_that_lets_nobody_read_is_an_error(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is sent without a look at what is there; that this failed must show."""

    def refused(*_: object) -> None:
        raise TopicAuthorizationFailedError

    monkeypatch.setattr("kafka.KafkaConsumer.end_offsets", refused)
    (tmp_path / "a.png").write_bytes(picture())
    with pytest.raises(UnreachableError, match="does not tell what it has of stream cam"):
        site.play(tmp_path / "a.png")


def test_a_state_file_that_cannot_be_written_any_more_is_an_error(site: Site, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    site.play(tmp_path / "a.png")
    other = sqlite3.connect(site.state)
    other.execute("CREATE TRIGGER full BEFORE INSERT ON items BEGIN SELECT RAISE(FAIL, 'disk full'); END")
    other.close()
    (tmp_path / "b.png").write_bytes(picture(1))
    with pytest.raises(SourceError, match=r"produce.sqlite cannot be used to remember what was sent: disk full"):
        site.play(tmp_path / "b.png")


def test_a_topic_that_was_created_again_has_nothing_yet(site: Site, tmp_path: Path) -> None:
    """As after a restart of an embedded broker."""
    path = make_video(tmp_path / "cam.mp4", frames=6, fps=30)
    site.play(path)
    admin = KafkaAdminClient(bootstrap_servers=site.kafka.bootstrap)
    admin.delete_topics([site.kafka.topics.frames])
    admin.create_topics([NewTopic(site.kafka.topics.frames, 3, 1)])
    admin.close()
    assert (site.play(path).sent, site.play(path).before) == (6, 6)
    site.ids(6)


def test_a_file_of_an_older_release_goes_on(tmp_path: Path) -> None:
    """It knew topics by their address alone."""
    older = Sent(tmp_path / "produce.sqlite", Kafka(), "")
    older.note("cam", Acknowledged({"a.mp4": 6}, {"a.mp4"}, 6))
    older.close()
    newer = Sent(tmp_path / "produce.sqlite", Kafka(), "AaIumoEycwKYoE0NxCHxKQ")
    assert newer.frames("cam", "a.mp4") == (6, True)
    assert newer.reached("cam") == 6
    newer.close()
    other = Sent(tmp_path / "produce.sqlite", Kafka(), "AaIumoFEcSKyNJwjtdKpBQ")
    assert (other.frames("cam", "a.mp4"), other.reached("cam")) == ((0, False), None)
    other.close()


def test_runs_that_share_a_state_file_have_a_minute_to_wait_for_each_other(tmp_path: Path) -> None:
    """Where writing is slow, that of several runs takes longer than the five seconds that SQLite waits by itself."""
    sent = Sent(tmp_path / "produce.sqlite", Kafka(), "")
    assert sent._file.execute("PRAGMA busy_timeout").fetchone() == (60_000,)
    sent.close()


def test_whatever_ends_a_stream_shows(site: Site) -> None:
    def broken() -> Iterator[Item]:
        raise RuntimeError("a mistake of ours")
        yield

    with pytest.raises(RuntimeError, match="a mistake of ours"):
        site.run({"cam": broken()})


def test_a_topic_that_is_missing_is_named(site: Site, tmp_path: Path) -> None:
    topics = site.kafka.topics.model_copy(update={"frames": "no-such-topic"})
    site.kafka = site.kafka.model_copy(update={"topics": topics, "connect_timeout_s": 0.5})
    with pytest.raises(ConfigError, match="has no topic no-such-topic"):
        site.play(make_video(tmp_path / "cam.mp4", frames=1, fps=30))


def test_what_waits_for_the_broker_is_bounded(kafka_settings: Kafka) -> None:
    stop = threading.Event()
    sender = Sender(WorkerConfig(kafka=kafka_settings), stop)
    answered = threading.Event()
    try:
        assert sender.make_room(1_000, wait=False)
        assert not sender.make_room(MAX_ON_THE_WAY, wait=False)
        sender.send(
            "cam", "item", "0", Picture(b"x" * 1_000, "image/jpeg", 0), datetime.now(UTC), lambda _: answered.set()
        )
        assert sender.make_room(MAX_ON_THE_WAY, wait=True)  # returns once the broker has answered
        assert answered.is_set()
        stop.set()
        assert not sender.make_room(1, wait=True)
    finally:
        sender.close()


def test_who_stops_a_run_does_not_wait_for_a_broker_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """It took two minutes from Ctrl-C on. The next run reads back what the broker has."""
    monkeypatch.setattr("worker.produce.produce.STOPPED_TIMEOUT_S", 0.1)
    monkeypatch.setattr("worker.produce.produce.ACKNOWLEDGE_TIMEOUT_S", 10_000.0)
    stop, failures = threading.Event(), []
    with flaky_broker() as broker:
        kafka = Kafka(bootstrap=f"127.0.0.1:{broker.port}")
        create_topics(kafka, 1)
        sender = Sender(WorkerConfig(kafka=kafka), stop)
        broker.down(True)
        sender.make_room(1, wait=True)
        sender.send("cam", "item", "0", Picture(b"x", "image/jpeg", 0), datetime.now(UTC), lambda _: None)

        def finish() -> None:
            try:
                sender.finish()
            except SourceError as error:
                failures.append(str(error))

        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        stop.set()
        thread.join(240)
        sender.close()
    (failure,) = failures
    assert "no answer within" in failure


def test_a_camera_waits_for_nobody(kafka_settings: Kafka) -> None:
    _, items = find("lavfi:testsrc=size=64x48:rate=5:duration=1")
    sender = Sender(WorkerConfig(kafka=kafka_settings), threading.Event())
    try:
        sender.make_room(MAX_ON_THE_WAY, wait=False)  # as if the broker had answered nothing for long
        player = Player("cam", items, sender, kafka_settings, PlayOptions(), threading.Event())
        player.play()
        assert (player.tally.sent, player.tally.dropped) == (0, 5)
    finally:
        sender.close()


class BreakingCamera(ThreadingHTTPServer):
    """A network camera that sends three JPEGs and hangs up; from the fourth connection on it refuses."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.connections = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.server.connections += 1  # type: ignore[attr-defined]
            if self.server.connections > 3:  # type: ignore[attr-defined]
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace;boundary=frame")
            self.end_headers()
            for number in range(3):
                content = picture(number, (64, 48), format="JPEG")
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(content)}\r\n\r\n"
                self.wfile.write(head.encode() + content + b"\r\n")

        def log_message(self, *_: object) -> None:
            pass


def test_a_camera_that_is_gone_is_opened_again(site: Site) -> None:
    camera = BreakingCamera()
    _, items = find(f"http://user:secret@127.0.0.1:{camera.server_port}/live")
    try:
        (tally,) = site.run({"cam": items}, PlayOptions(limit=8))
    finally:
        camera.shutdown()
        camera.server_close()
    assert tally.sent == 8
    assert site.ids(8) == [str(i) for i in range(8)]
    assert all(b"secret" not in dict(r.headers)["ce_source"] for r in site.records(8))


def test_a_camera_that_was_never_there_is_an_error(site: Site) -> None:
    _, items = find(f"http://127.0.0.1:{free_port()}/live")
    with pytest.raises(SourceError, match=r"/live cannot be opened: Connection refused"):
        site.run({"cam": items}, PlayOptions(limit=8))


class Waits(threading.Event):
    """Notes how long it would have waited."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout or 0)
        return False


@pytest.mark.parametrize(
    ("options", "clock", "expected"),
    [
        (PlayOptions(), [0, 100, 200], [0, 100, 200]),
        (PlayOptions(), [500, 600], [0, 100]),  # gone on in the middle
        (PlayOptions(fast=True), [0, 100], []),
        (PlayOptions(), [None, None], []),
        (PlayOptions(encoding=Encoding(fps=0.01)), [None, None, None], [0, 100, 200]),
    ],
)
def test_frames_come_at_their_own_pace(
    kafka_settings: Kafka, options: PlayOptions, clock: list[float | None], expected: list[float]
) -> None:
    waits = Waits()
    player = Player("cam", [], None, kafka_settings, options, waits)  # type: ignore[arg-type]
    for at in clock:
        player._pace(Picture(b"", "image/jpeg", 0, at))
        player.tally.sent += 1
    assert waits.seconds == pytest.approx(expected, abs=20)
