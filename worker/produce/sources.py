"""Where pictures come from: video files, cameras, folders, standard input. Each source is a list of items.

Pictures are sent unchanged unless a size or quality is given; video frames become JPEGs. PyAV (FFmpeg), the extra
`video`, reads videos and cameras.
"""

from __future__ import annotations

import glob
import io
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from PIL import Image, UnidentifiedImageError

from schemas.errors import SourceError

MAGIC = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"RIFF": "image/webp"}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
DEFAULT_QUALITY = 90
LIVE_TIMEOUT_S = 10.0  # of silence, after which a camera counts as gone
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Encoding:
    """How frames are encoded: JPEG quality (1 to 95), box in pixels to shrink them into, frames kept per second."""

    quality: int | None = None
    size: tuple[int, int] | None = None
    fps: float | None = None

    @property
    def keeps_pictures(self) -> bool:
        """Whether pictures are sent unchanged."""
        return self.quality is None and self.size is None


@dataclass(frozen=True, slots=True)
class Picture:
    """One encoded frame. `index` counts the item's frames, also those left out; `at` is seconds on the item's clock, if
    it has one; `time` is when the frame was taken, None for now."""

    content: bytes
    content_type: str
    index: int
    at: float | None = None
    time: datetime | None = None


class Item(Protocol):
    """A file or a camera. `name` identifies it in records. A `remembered` item has the same frames when played again; a
    `live` one does not wait for its reader."""

    name: str
    remembered: bool
    live: bool

    def pictures(self, encoding: Encoding, skip: int) -> Iterator[Picture]:
        """Its frames from number `skip` on. Raises SourceError."""
        ...


def find(source: str) -> tuple[str | None, Iterable[Item]]:
    """The name that a source suggests for its stream, and its items in order. Raises SourceError.

    A source is a path, a pattern, a URL, a device as FORMAT:NAME or /dev/videoN, or `-` for standard input.
    """
    if source == "-":
        return None, _standard_input()
    device = _device(source)
    if device is not None:
        return None, [LiveCamera(*device)]
    path = Path(source)
    if path.is_dir():
        pictures = [entry for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES]
        if not pictures:
            raise SourceError(
                f"{source} has no {', '.join(SUFFIXES)}; for videos give their paths, such as {source}/*.mp4"
            )
        return path.resolve().name, [PictureFile(p) for p in sorted(pictures, key=_natural)]
    if path.exists():
        return path.resolve().parent.name if _is_picture(path) else path.stem, [_file(path)]
    matches = sorted((Path(match) for match in glob.glob(source, recursive=True)), key=_natural)
    if not matches:
        raise SourceError(f"{source} is no file, folder, URL or device, and as a pattern it matches nothing")
    return matches[0].resolve().parent.name, [_file(match) for match in matches if match.is_file()]


def _file(path: Path) -> Item:
    return PictureFile(path) if _is_picture(path) else Video(path)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _natural(path: Path) -> list[tuple[int, str]]:
    """A sort key by which frame-9 comes before frame-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _device(source: str) -> tuple[str, str | None] | None:
    """For a URL or a device, what FFmpeg has to open and with which input format."""
    if "://" in source:
        return source, None
    if source.startswith("/dev/video"):
        return source, "v4l2"
    kind, colon, name = source.partition(":")
    if colon and kind in ("v4l2", "avfoundation", "dshow", "lavfi"):
        return name, kind
    return None


def _identity(path: Path) -> str:
    """A name from path, size and time of change, so that a new recording under an old name is a new item."""
    found = path.stat()
    content = f"{path.resolve()}\n{found.st_size}\n{found.st_mtime_ns}".encode()
    return f"{quote(path.name)}#{sha256(content).hexdigest()[:16]}"


class PictureFile:
    """One encoded picture."""

    remembered, live = True, False

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = _identity(path)

    def pictures(self, encoding: Encoding, skip: int) -> Iterator[Picture]:
        """The picture, taken when its file was last changed."""
        if skip:
            return
        try:
            content = self._path.read_bytes()
            changed = datetime.fromtimestamp(self._path.stat().st_mtime, UTC)
        except OSError as error:
            raise SourceError(f"{self._path} cannot be read: {error.strerror}") from error
        kind = next((kind for magic, kind in MAGIC.items() if content.startswith(magic)), None)
        if kind is None:
            raise SourceError(f"{self._path} is none of JPEG, PNG, WebP; rename it, or take it out")
        if not encoding.keeps_pictures:
            content, kind = _encoded_again(content, encoding, str(self._path)), "image/jpeg"
        yield Picture(content, kind, 0, time=changed)


class Video:
    """A video file. Frame times come from the file's own clock and the beginning of the recording."""

    remembered, live = True, False

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = _identity(path)

    def pictures(self, encoding: Encoding, skip: int) -> Iterator[Picture]:
        """Its frames, as JPEGs."""
        with _open(str(self._path), None) as container:
            began = _recorded(container, self._path)
            for picture in _frames(container, encoding, skip, str(self._path)):
                yield replace(picture, time=began + timedelta(seconds=picture.at or 0))


class LiveCamera:
    """A network stream or a device of this machine. Its frames are of the present moment."""

    remembered, live = False, True

    def __init__(self, address: str, format: str | None) -> None:
        self._address, self._format = address, format
        self.address = without_credentials(address)
        self.name = f"{quote(self.address, safe='/:')}#{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}"

    def pictures(self, encoding: Encoding, skip: int) -> Iterator[Picture]:
        """Its frames as they come, numbered from `skip` on after a reconnection. Raises SourceError once it is gone."""
        with _open(self._address, self._format) as container:
            for picture in _frames(container, encoding, 0, self.address):
                yield Picture(picture.content, picture.content_type, skip + picture.index)
            if "://" in self._address and not container.duration:
                raise SourceError(f"{self.address} broke off: a stream without an end ended")


class JpegPipe:
    """Concatenated JPEGs, as `ffmpeg -f mjpeg -` writes them."""

    remembered, live = False, False

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self.name = f"stdin#{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}"

    def pictures(self, encoding: Encoding, skip: int) -> Iterator[Picture]:
        """Each JPEG unchanged, unless a size or quality is given."""
        index = 0
        with _open(self._pipe, "mjpeg", probesize="32", analyzeduration="0") as container:
            for packet in container.demux(video=0):
                content = bytes(packet)
                if not content:
                    continue
                if not content.startswith(b"\xff\xd8"):
                    raise SourceError("standard input has something that is no JPEG between its JPEGs")
                if not encoding.keeps_pictures:
                    content = _encoded_again(content, encoding, "standard input")
                yield Picture(content, "image/jpeg", index)
                index += 1


class Pipe:
    """Standard input without a buffer, so that no read waits for more bytes than have come."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._first = os.read(descriptor, _CHUNK)

    @property
    def has_pictures(self) -> bool:
        """Whether it begins like a JPEG. No path does."""
        return self._first.startswith(b"\xff")

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        if self._first:
            part, self._first = self._first[:size], self._first[size:]
            return part
        return os.read(self._descriptor, size)

    def lines(self) -> Iterator[str]:
        """Its lines as text, without empty ones."""
        rest = b""
        while part := self.read(_CHUNK):
            *whole, rest = (rest + part).split(b"\n")
            yield from (os.fsdecode(line).strip() for line in whole if line.strip())
        if rest.strip():
            yield os.fsdecode(rest).strip()


def _standard_input() -> Iterator[Item]:
    pipe = Pipe(0)
    if pipe.has_pictures:
        yield JpegPipe(pipe)
        return
    for line in pipe.lines():
        path = Path(line)
        if not path.is_file():
            raise SourceError(f"standard input names {line[:200]!r}, which is no file; give one path a line, or JPEGs")
        yield _file(path)


def without_credentials(address: str) -> str:
    """A URL without user, password and query, for records and messages."""
    if "://" not in address:
        return address
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _open(what: Any, format: str | None, **options: str) -> Any:
    """An FFmpeg container. Raises SourceError."""
    try:
        import av
    except ImportError as error:
        raise SourceError("videos and cameras need PyAV: pip install 'driftkeel[video]'") from error
    name = without_credentials(what) if isinstance(what, str) else "standard input"
    if name.startswith("rtsp://"):
        options = {"rtsp_transport": "tcp", **options}
    timeout = LIVE_TIMEOUT_S if isinstance(what, str) else None
    try:
        container = av.open(what, format=format, options=options, timeout=timeout)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise SourceError(f"{name} cannot be opened: {_reason(error)}") from error
    if not container.streams.video:
        container.close()
        raise SourceError(f"{name} has no pictures in it")
    return container


def _frames(container: Any, encoding: Encoding, skip: int, name: str) -> Iterator[Picture]:
    """Decode, choose and encode. Raises SourceError."""
    import av

    stream = container.streams.video[0]
    rate = float(stream.average_rate or 0) or 25.0
    first, slot = None, -1
    try:
        for index, frame in enumerate(container.decode(stream)):
            moment = frame.time if frame.time is not None else index / rate
            first = moment if first is None else first
            at = moment - first
            if encoding.fps is not None:
                # Keep the first frame of each slot of 1 / fps seconds.
                due = int(at * encoding.fps + 1e-6)
                if due <= slot:
                    continue
                slot = due
            if index >= skip:
                yield Picture(_jpeg(frame.to_image(), encoding), "image/jpeg", index, at)
    except (av.FFmpegError, OSError) as error:
        raise SourceError(f"{name} broke off: {_reason(error)}") from error


def _encoded_again(content: bytes, encoding: Encoding, name: str) -> bytes:
    """The picture as a new JPEG. Raises SourceError."""
    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
        if encoding.size:
            image.draft(None, encoding.size)
        return _jpeg(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"), encoding)
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise SourceError(f"{name} cannot be decoded: {_reason(error)}") from error


def _jpeg(image: Image.Image, encoding: Encoding) -> bytes:
    if encoding.size:
        image.thumbnail(encoding.size)  # keeps the proportions, and never enlarges
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=encoding.quality or DEFAULT_QUALITY)
    return buffer.getvalue()


def _recorded(container: Any, path: Path) -> datetime:
    """When a recording began: as the file says, or else its last change minus its length."""
    written = container.metadata.get("creation_time", "")
    try:
        moment = datetime.fromisoformat(written)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    except ValueError:
        length = timedelta(microseconds=max(0, container.duration or 0))
        return datetime.fromtimestamp(path.stat().st_mtime, UTC) - length


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__)
