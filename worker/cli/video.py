"""`driftkeel produce` and `driftkeel watch`: pictures in, predictions out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from schemas.command import EVERY_STREAM
from schemas.config import Kafka, WorkerConfig
from schemas.config_file import load_config
from schemas.errors import ConfigError, mistakes
from worker.cli.options import ConfigOption, pixels, until_stopped
from worker.terminal import counted

if TYPE_CHECKING:
    from schemas.prediction import Prediction
    from worker.produce.sources import Item
    from worker.watch import Watcher

STATE = Path(typer.get_app_dir("driftkeel")) / "produce.sqlite"
BootstrapOption = Annotated[
    str | None, typer.Option(help="host:port of the broker, instead of the configuration's.", show_default=False)
]


def produce(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Videos, pictures, folders of pictures, quoted patterns, rtsp:// or other URLs, devices (/dev/videoN, "
            "FORMAT:NAME), or - for JPEGs or paths on standard input.",
            show_default=False,
        ),
    ],
    stream: Annotated[
        list[str] | None,
        typer.Option(
            "--stream",
            "-s",
            help="Stream name: once for all sources, or once for each. Default: the name of the file or folder.",
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(min=0.001, help="Frames to send per second; a video's other frames are skipped."),
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Send as fast as the broker accepts, not in real time.")] = False,
    quality: Annotated[int | None, typer.Option(min=1, max=95, help="JPEG quality; pictures are re-encoded.")] = None,
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT to shrink frames to fit into; pictures are re-encoded.")
    ] = None,
    now: Annotated[
        bool, typer.Option("--now", help="Use the time of sending as event time, not the time a frame was taken.")
    ] = False,
    loop: Annotated[
        bool, typer.Option("--loop", help="Repeat from the beginning until Ctrl-C; nothing is remembered.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after this many frames of each stream.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Also send what an earlier run has sent.")] = False,
    state: Annotated[
        Path, typer.Option(help="File that records what was sent.", show_default="in the user's folder")
    ] = STATE,
    bootstrap: BootstrapOption = None,
    config: ConfigOption = None,
) -> None:
    """Send frames of videos, cameras and pictures to the frames topic, each once; videos play in real time."""
    from worker.produce.produce import PlayOptions
    from worker.produce.produce import produce as play
    from worker.produce.sources import Encoding

    options = PlayOptions(Encoding(quality, pixels(size), fps), fast, now, again, loop, limit)
    settings = _set_up(config, bootstrap)
    streams = _streams(sources, stream or [], settings.frames.max_stream_id_bytes)
    with until_stopped() as stop:
        for tally in play(settings, streams, options, state, stop):
            extra = f", {tally.before} passed over: sent before" if tally.before else ""
            extra += f", {tally.dropped} dropped: the broker was too slow" if tally.dropped else ""
            print(f"{tally.stream}: {counted(tally.sent, 'frame')} sent, {tally.bytes / 1e6:.1f} MB{extra}")


def watch(
    stream: Annotated[
        list[str] | None, typer.Option("--stream", "-s", help="Only this stream; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the messages as they are, one per line.")] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Show a live table with a row per stream, instead of lines.")
    ] = False,
    draw: Annotated[Path | None, typer.Option(help="Also write each frame with its label into this folder.")] = None,
    beginning: Annotated[
        bool, typer.Option("--from-beginning", help="Also show what is in the topic already.")
    ] = False,
    count: Annotated[int | None, typer.Option(min=1, help="Stop after this many predictions.")] = None,
    bootstrap: BootstrapOption = None,
    config: ConfigOption = None,
) -> None:
    """Show predictions as they come, with local times, until Ctrl-C; other consumers are not affected."""
    from worker.watch import FrameMarker, Watcher

    if as_json and table:
        raise ConfigError("--json and --table cannot be used together: leave one out")
    settings = _set_up(config, bootstrap)
    with until_stopped() as stop:
        watcher = Watcher(settings, set(stream or []), beginning, stop)
        marker = FrameMarker(settings, draw, stop) if draw else None
        try:
            for prediction in _printed(watcher, as_json, table, count):
                if marker:
                    marker.draw(prediction)
        finally:
            watcher.close()
            if marker:
                marker.close()


def _printed(watcher: Watcher, as_json: bool, table: bool, count: int | None) -> Iterator[Prediction]:
    """Print each prediction as it passes."""
    from rich.live import Live

    from worker.terminal import printable_json, terminal
    from worker.watch import LatestPredictions, line

    predictions = islice(watcher.predictions(), count)
    if table:
        latest = LatestPredictions()
        with Live(latest.table(), console=terminal(), refresh_per_second=4) as live:
            for prediction in predictions:
                latest.take(prediction)
                live.update(latest.table())
                yield prediction
        return
    for prediction in predictions:
        print(printable_json(prediction.model_dump_json()) if as_json else line(prediction), flush=True)
        yield prediction


def _set_up(config: Path | None, bootstrap: str | None) -> WorkerConfig:
    """The configuration. Lines of the log are text, as all that commands write: `log.format` is for the services."""
    from worker.log import set_up_logging

    settings = _settings(config, bootstrap)
    set_up_logging(settings.log.model_copy(update={"format": "text"}))
    return settings


def _settings(config: Path | None, bootstrap: str | None) -> WorkerConfig:
    settings = load_config(config)
    if bootstrap is None:
        return settings
    try:
        kafka = Kafka.model_validate({**settings.kafka.model_dump(), "bootstrap": bootstrap})
    except ValidationError as error:
        raise ConfigError(f"--bootstrap: {mistakes(error)[0][1]}") from error
    return settings.model_copy(update={"kafka": kafka})


def _streams(sources: list[str], names: list[str], max_bytes: int) -> dict[str, Iterable[Item]]:
    """Items by stream. Sources of one stream follow each other; streams play at the same time."""
    from worker.produce.sources import find, without_credentials

    if len(names) not in (0, 1, len(sources)):
        raise ConfigError(
            f"--stream is given {len(names)} times for {len(sources)} sources: give it once, or once for each source"
        )
    names = names * len(sources) if len(names) == 1 else names
    streams: dict[str, list[Iterable[Item]]] = {}
    for number, source in enumerate(sources):
        suggested, items = find(source)
        name = names[number] if names else suggested
        if name is None:
            shown = "standard input" if source == "-" else without_credentials(source)
            raise ConfigError(f"{shown} has no name of its own; give --stream NAME")
        if name == EVERY_STREAM:
            raise ConfigError(
                f"{EVERY_STREAM} means all streams in commands and cannot be a stream's name; give --stream NAME"
            )
        if not name.isprintable() or not 0 < len(name.encode()) <= max_bytes:
            raise ConfigError(f"stream name {name!r} must be printable, of 1 to {max_bytes} bytes; give --stream NAME")
        streams.setdefault(name, []).append(items)
    for name, parts in streams.items():
        if len(parts) > 1 and any(isinstance(part, list) and any(item.live for item in part) for part in parts):
            raise ConfigError(
                f"stream {name}: a camera never ends, so the sources after it never start; give --stream for each"
            )
    return {name: chain.from_iterable(parts) for name, parts in streams.items()}
