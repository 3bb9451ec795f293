"""Run the demo: start everything, replay, keep the score, stop everything."""

from __future__ import annotations

import importlib.util
import json
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from kafka import KafkaProducer, TopicPartition
from pydantic import SecretStr
from rich.console import Console

from meta.bundle import Bundle, load_bundle
from meta.data import fashion_mnist
from schemas.config import Batch, Frames, Kafka, Log, Metrics, Store, WorkerConfig
from schemas.config import Bundle as BundleSettings
from schemas.config import Console as ConsoleSettings
from schemas.errors import DriftkeelError
from schemas.frame import Position
from schemas.prediction import Prediction
from schemas.update import UpdateEvent
from worker.decode.image import decode_image
from worker.decode.pixels import normalise_pixels
from worker.demo.cameras import CAMERAS, Reel, film
from worker.demo.score import CameraScore, Scoreboard
from worker.demo.view import Show, open_view, table
from worker.embedded import Broker, Child, EmbeddedStore, embedded_services, free_port, start_child, worker_process
from worker.kafka.client import close_producer, connection, create_topics, open_reader

PARTITIONS = 4
LEAD = 256  # frames of a camera that are sent ahead of their predictions
STALLED_S = 60.0  # without a prediction, after which the demo gives up
STARTING_S = 240.0  # the same before the first: on a busy machine importing torch alone takes a minute


def run_demo(
    frames: int,
    seed: int,
    bundle_path: Path,
    report: Path | None,
    html: Path,
    picture: Path | None,
    view: bool,
    web_console: bool,
) -> int:
    """Returns the exit code: 0 only if every frame has its prediction."""
    console = Console()
    unwind = _unwind_on_signals()
    bundle = load_bundle(bundle_path)
    board = _prepare(bundle, frames, seed, console)
    try:
        with embedded_services() as (broker, store, folder):
            config = _config(broker, store, bundle_path)
            create_topics(config.kafka, PARTITIONS)
            console.print(f"broker {broker.bootstrap}, store {store.url}", highlight=False)
            console.print(f"worker metrics: http://127.0.0.1:{config.metrics.port}/metrics", highlight=False)
            with (
                worker_process(config, folder) as child,
                _web_console(config, folder, web_console, console),
                open_view(view, console) as show,
            ):
                started = time.monotonic()
                _replay(config.kafka, board, child, folder / f"{config.worker}.log", show, unwind)
                board.seconds = time.monotonic() - started
    except KeyboardInterrupt:
        console.print("stopped; broker, store and worker are gone")
        return 130
    results = {"seed": seed, "bundle": bundle.hash, **board.results()}
    console.print(table(board))
    _write(results, board, report, html, picture, bundle.hash)
    console.print(
        f"shifted cameras {results['gain_shifted_points']:+.1f} points, healthy camera "
        f"{results['gain_healthy_points']:+.1f}; {results['frames_predicted']:,} of {results['frames_sent']:,} frames "
        f"predicted in {results['seconds']:.0f} s; report: {html}",
        highlight=False,
        soft_wrap=True,
    )
    return 0 if results["predictions_missing"] == 0 else 1


def _prepare(bundle: Bundle, frames: int, seed: int, console: Console) -> Scoreboard:
    """Film all cameras, and have the source model answer every frame for comparison."""
    console.print(f"filming {len(CAMERAS)} cameras, {frames} frames each, seed {seed}", highlight=False)
    data = fashion_mnist("test")
    scores = []
    for camera in CAMERAS:
        reel = film(camera, data, frames, seed)
        scores.append(CameraScore(reel, _source_right(bundle, reel)))
    return Scoreboard(scores)


def _source_right(bundle: Bundle, reel: Reel) -> Any:
    preprocess = bundle.manifest.preprocess
    pixels = [decode_image(frame, Frames(), preprocess) for frame in reel.frames]
    answers = []
    with torch.inference_mode():
        for start in range(0, len(pixels), 500):
            answers.append(bundle.model(normalise_pixels(pixels[start : start + 500], preprocess)).argmax(1))
    return torch.cat(answers).numpy() == reel.labels


def _config(broker: Broker, store: EmbeddedStore, bundle: Path) -> WorkerConfig:
    return WorkerConfig(
        worker="demo",
        kafka=Kafka(
            bootstrap=broker.bootstrap,
            group="demo",
            session_timeout_ms=6_000,
            heartbeat_interval_ms=500,
            fetch_max_wait_ms=20,
        ),
        store=Store(url=SecretStr(store.url)),
        batch=Batch(max_wait_ms=200),
        bundle=BundleSettings(path=bundle.resolve()),
        metrics=Metrics(port=free_port()),
        console=ConsoleSettings(port=_usual_port()),
        log=Log(format="text"),
    )


def _usual_port() -> int:
    """The console's usual port, so that a bookmark works; another one if it is taken."""
    usual = ConsoleSettings().port
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", usual))
        except OSError:
            return free_port()
    return usual


@contextmanager
def _web_console(config: WorkerConfig, folder: Path, wanted: bool, console: Console) -> Iterator[None]:
    """Run the web console, if it is wanted and its packages are installed. The demo does not depend on it."""
    if not wanted or importlib.util.find_spec("uvicorn") is None:
        yield
        return
    command = [sys.executable, "-m", "worker", "console", "--config", str(folder / f"{config.worker}.yaml")]
    child = start_child("the console", command, folder / "console.log")
    console.print(f"console: http://127.0.0.1:{config.console.port}/", highlight=False)
    try:
        yield
    finally:
        child.stop()


def _unwind_on_signals() -> Callable[[], None]:
    """From here on Ctrl-C and SIGTERM raise an exception, so that every child process is stopped.

    kafka-python's event loop swallows what is raised inside it. The function returned raises the exception again, if a
    signal has come.
    """
    asked: list[BaseException] = []

    def unwind(number: int, _: object) -> None:
        asked.append(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number))
        raise asked[0]

    def again() -> None:
        if asked:
            raise asked[0]

    signal.signal(signal.SIGINT, unwind)
    signal.signal(signal.SIGTERM, unwind)
    return again


def _replay(
    kafka: Kafka, board: Scoreboard, worker: Child, worker_log: Path, show: Show, unwind: Callable[[], None]
) -> None:
    """Send frames, at most `LEAD` ahead of their predictions, until all are answered or the worker stands still."""
    producer = KafkaProducer(**connection(kafka), linger_ms=2, batch_size=64 << 10)
    outputs = open_reader(kafka, auto_offset_reset="earliest")
    outputs.assign([TopicPartition(kafka.topics.predictions, 0), TopicPartition(kafka.topics.updates, 0)])
    outputs.seek_to_beginning()
    began = last_news = time.monotonic()
    answered = -1
    try:
        while board.answered < board.total:
            unwind()
            _send(producer, kafka.topics.frames, board)
            _collect(outputs, kafka, board)
            if board.answered != answered:
                answered, last_news = board.answered, time.monotonic()
            silent, most = time.monotonic() - last_news, STALLED_S if answered > 0 else STARTING_S
            if worker.process.poll() is not None or silent > most:
                raise DriftkeelError(_standstill(worker.process.poll(), silent, worker_log))
            show(board, board.answered / max(1e-9, time.monotonic() - began))
        _collect_last_updates(outputs, kafka, board)
    finally:
        close_producer(producer, 2)
        outputs.close(autocommit=False)


def _standstill(exit_code: int | None, silent: float, worker_log: Path) -> str:
    """The message about a worker that has ended, or has not answered for `silent` seconds."""
    what = f"has answered no frame for {silent:.0f} s" if exit_code is None else f"has ended with code {exit_code}"
    lines = worker_log.read_text(errors="replace").splitlines()[-8:]
    if not lines:
        return f"the worker {what}, and has written nothing; is this machine busy, or short of memory?"
    return "\n".join([f"the worker {what}; its last lines:", *lines])


def _send(producer: Any, topic: str, board: Scoreboard) -> None:
    for stream, score in board.cameras.items():
        end = min(len(score.reel.frames), score.answered + LEAD)
        for index in range(score.sent, end):
            label = str(score.reel.labels[index]).encode()
            headers = [
                ("content-type", f"image/{score.reel.camera.format.lower()}".encode()),
                ("demo-label", label),
            ]
            future = producer.send(topic, key=stream.encode(), value=score.reel.frames[index], headers=headers)
            future.add_callback(_note_position, board, stream, index)
        score.sent = max(score.sent, end)
    producer.flush()


def _note_position(board: Scoreboard, stream: str, index: int, metadata: Any) -> None:
    board.sent(stream, index, str(Position.of(metadata)))


def _collect(outputs: Any, kafka: Kafka, board: Scoreboard, timeout_ms: int = 50) -> int:
    polled = outputs.poll(timeout_ms=timeout_ms, max_records=2_000)
    for records in polled.values():
        for record in records:
            if record.topic == kafka.topics.predictions:
                board.take_prediction(Prediction.model_validate_json(record.value))
            else:
                board.take_update(UpdateEvent.model_validate_json(record.value))
    return sum(len(records) for records in polled.values())


def _collect_last_updates(outputs: Any, kafka: Kafka, board: Scoreboard) -> None:
    """Read until none has come for a while, as events follow their predictions by a moment."""
    quiet = 0
    while quiet < 10:
        quiet = 0 if _collect(outputs, kafka, board) else quiet + 1


def _write(
    results: dict[str, Any], board: Scoreboard, report: Path | None, html: Path, picture: Path | None, bundle: str
) -> None:
    from worker.demo.report import draw, write_report

    write_report(html, board, results, bundle)
    if report:
        report.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if picture:
        picture.write_text(draw(board), encoding="utf-8")
