"""Videos made here, pictures, devices and pipes, as sources of frames."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from schemas.errors import SourceError
from tests.conftest import picture
from tests.videos import make_video
from worker.produce.sources import Encoding, Item, JpegPipe, Picture, Pipe, find, without_credentials


def pictures(source: Path | str, encoding: Encoding | None = None, skip: int = 0) -> list[Picture]:
    """Everything that a source has."""
    _, items = find(str(source))
    return [p for item in items for p in item.pictures(encoding or Encoding(), skip)]


def names(items: Iterable[Item]) -> list[str]:
    return [item.name.split("#")[0] for item in items]


def grey(content: bytes) -> float:
    return float(np.asarray(Image.open(io.BytesIO(content)).convert("L")).mean())


def test_a_video_is_its_frames_in_order_by_its_own_clock(tmp_path: Path) -> None:
    path = make_video(tmp_path / "cam-7.mp4", frames=12, fps=4)
    stream, _ = find(str(path))
    assert stream == "cam-7"
    found = pictures(path)
    assert [p.index for p in found] == list(range(12))
    assert [p.at for p in found] == pytest.approx([i / 4 for i in range(12)])
    levels = [grey(p.content) for p in found]
    assert levels == sorted(levels)
    assert levels[-1] - levels[0] > 100  # it grows lighter from frame to frame
    assert all(p.content_type == "image/jpeg" and p.content.startswith(b"\xff\xd8") for p in found)


def test_frame_times_end_where_the_file_was_written(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", frames=8, fps=4)
    written = datetime(2026, 5, 1, 12, tzinfo=UTC)
    os.utime(path, (written.timestamp(), written.timestamp()))
    times = [p.time for p in pictures(path)]
    assert times[0] is not None
    assert (written - times[0]).total_seconds() == pytest.approx(2)
    assert (times[-1] - times[0]).total_seconds() == pytest.approx(7 / 4)


@pytest.mark.parametrize(("fps", "expected"), [(1, [0, 4, 8]), (2, [0, 2, 4, 6, 8, 10]), (100, list(range(12)))])
def test_fewer_frames_a_second(tmp_path: Path, fps: float, expected: list[int]) -> None:
    path = make_video(tmp_path / "a.mp4", frames=12, fps=4)
    assert [p.index for p in pictures(path, Encoding(fps=fps))] == expected
    assert [p.index for p in pictures(path, Encoding(fps=fps), skip=5)] == [i for i in expected if i >= 5]


def test_size_and_quality(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", frames=2, fps=4, size=(64, 48))
    (first, _) = pictures(path, Encoding(size=(32, 32)))
    assert Image.open(io.BytesIO(first.content)).size == (32, 24)
    (tmp_path / "a.png").write_bytes(picture(1, (300, 200)))
    (small,) = pictures(tmp_path / "a.png", Encoding(quality=20, size=(1000, 1000)))
    (large,) = pictures(tmp_path / "a.png", Encoding(quality=95))
    assert Image.open(io.BytesIO(small.content)).size == (300, 200)
    assert len(small.content) < len(large.content)
    assert small.content_type == "image/jpeg"


def test_a_folder_is_its_pictures_as_they_are_in_natural_order(tmp_path: Path) -> None:
    folder = tmp_path / "cam 3"
    folder.mkdir()
    for number in (10, 9, 1):
        (folder / f"frame-{number}.png").write_bytes(picture(number))
    (folder / "notes.txt").write_text("not a picture")
    stream, items = find(str(folder))
    assert stream == "cam 3"
    assert names(items) == ["frame-1.png", "frame-9.png", "frame-10.png"]
    assert [p.content for p in pictures(folder)] == [picture(n) for n in (1, 9, 10)]
    assert {p.content_type for p in pictures(folder)} == {"image/png"}


def test_patterns_and_single_pictures(tmp_path: Path) -> None:
    for number in (2, 1):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number, format="JPEG"))
    make_video(tmp_path / "3.mp4", frames=3, fps=4)
    stream, items = find(str(tmp_path / "*"))
    assert stream == tmp_path.name
    assert names(items) == ["1.jpg", "2.jpg", "3.mp4"]
    assert len(pictures(tmp_path / "*")) == 5
    assert find(str(tmp_path / "1.jpg"))[0] == tmp_path.name


def test_an_item_s_name_changes_with_its_content(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture(1))
    before = [item.name for item in find(str(path))[1]]
    assert before == [item.name for item in find(str(path))[1]]
    path.write_bytes(picture(2, (30, 30)))
    assert before != [item.name for item in find(str(path))[1]]


def test_a_device_is_live_and_shows_now() -> None:
    stream, (camera,) = find("lavfi:testsrc=size=64x48:rate=5:duration=1")
    assert stream is None
    assert camera.live
    assert not camera.remembered
    found = list(camera.pictures(Encoding(), 7))
    assert [p.index for p in found] == [7, 8, 9, 10, 11]
    assert all(p.time is None for p in found)


def piped(content: bytes) -> Pipe:
    """A pipe that has been written to and closed."""
    read, write = os.pipe()
    os.write(write, content)
    os.close(write)
    return Pipe(read)


def test_jpegs_on_a_pipe_pass_unchanged_with_thumbnails_inside() -> None:
    thumbnail = picture(9, format="JPEG")
    plain = [picture(n, (40 + n, 30), format="JPEG") for n in range(3)]
    segment = b"Exif\0\0" + thumbnail
    length = (len(segment) + 2).to_bytes(2, "big")
    plain[1] = plain[1][:2] + b"\xff\xe1" + length + segment + plain[1][2:]
    pipe = piped(b"".join(plain))
    assert pipe.has_pictures
    found = list(JpegPipe(pipe).pictures(Encoding(), 0))
    assert [p.content for p in found] == plain
    assert [p.index for p in found] == [0, 1, 2]


def test_paths_on_a_pipe() -> None:
    pipe = piped(b"a b.jpg\n\n  c.jpg\nd.jpg")
    assert not pipe.has_pictures
    assert list(pipe.lines()) == ["a b.jpg", "c.jpg", "d.jpg"]


def test_what_cannot_be_a_source_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.png").write_bytes(picture(1, (100, 100))[:200])
    cases = {
        "nothing-here*": "as a pattern it matches nothing",
        "empty": r"has no .jpg.*give their paths, such as",
        "text.mp4": "text.mp4 cannot be opened: Invalid data",
        "text.jpg": "text.jpg is none of JPEG, PNG, WebP",
    }
    for name, message in cases.items():
        with pytest.raises(SourceError, match=message):
            pictures(tmp_path / name)
    with pytest.raises(SourceError, match=r"cut.png cannot be decoded"):
        pictures(tmp_path / "cut.png", Encoding(quality=50))
    with pytest.raises(SourceError, match=r"rtsp://127.0.0.1:9/live cannot be opened") as caught:
        pictures("rtsp://admin:hunter2@127.0.0.1:9/live?token=hunter2")
    assert "hunter2" not in str(caught.value)


def test_a_video_that_is_cut_off_gives_what_it_has(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.ts", frames=40, fps=20)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert 5 < len(pictures(path)) < 40


def test_addresses_without_credentials() -> None:
    assert without_credentials("rtsp://u:p@cam:554/live?x=1") == "rtsp://cam:554/live"
    assert without_credentials("/dev/video0") == "/dev/video0"
