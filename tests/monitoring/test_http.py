import contextlib
import socket
import threading
import time

import pytest

from monitoring.http import MAX_OPEN, serve_metrics
from monitoring.metrics import WorkerMetrics
from tests.servers import get, wait_until


def test_metrics_and_probes() -> None:
    state = {"alive": False, "unready": "the store is away"}
    metrics = WorkerMetrics(1)
    metrics.predictions.inc(3)
    server = serve_metrics(metrics.registry, "127.0.0.1", 0, lambda: state["alive"], lambda: state["unready"])
    try:
        status, text = get(server.port, "/metrics")
        assert status == 200
        assert "driftkeel_predictions_total 3.0" in text
        assert get(server.port, "/healthz") == (503, "not ok: the loop stands still\n")
        assert get(server.port, "/readyz") == (503, "not ok: the store is away\n")
        state.update(alive=True, unready="")
        assert get(server.port, "/healthz") == (200, "ok\n")
        assert get(server.port, "/readyz") == (200, "ok\n")
        assert get(server.port, "/etc/passwd")[0] == 404
    finally:
        server.close()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.port)) != 0


def test_a_probe_that_fails_is_an_error_in_the_log(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> bool:
        raise RuntimeError("nobody knows")

    server = serve_metrics(WorkerMetrics(0).registry, "127.0.0.1", 0, fails, lambda: "")
    try:
        assert get(server.port, "/healthz") == (500, "an error: see the log\n")
        assert get(server.port, "/readyz")[0] == 200
    finally:
        server.close()
    (record,) = caplog.records
    assert record.getMessage() == "/healthz cannot be answered"
    assert "nobody knows" in (record.exc_text or "")
    assert capsys.readouterr().err == ""


def test_no_accept_header_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    server = serve_metrics(WorkerMetrics(0).registry, "127.0.0.1", 0, lambda: True, lambda: "")
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as scraper:
            accept = "application/openmetrics-text; version=abc"
            scraper.sendall(f"GET /metrics HTTP/1.0\r\nAccept: {accept}\r\n\r\n".encode())
            assert b" 200 " in scraper.recv(100)
    finally:
        server.close()
    assert not caplog.records


def test_a_connection_that_asks_nothing_is_closed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("monitoring.http._QuietHandler.timeout", 0.1)
    server = serve_metrics(WorkerMetrics(0).registry, "127.0.0.1", 0, lambda: True, lambda: "")
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as idle:
            assert idle.recv(1) == b""
    finally:
        server.close()
    assert capsys.readouterr().err == ""


def test_slow_connections_take_no_more_than_some_threads_and_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monitoring.http._QuietHandler.timeout", 600)  # None ends by itself.
    server = serve_metrics(WorkerMetrics(0).registry, "127.0.0.1", 0, lambda: True, lambda: "")
    before = threading.active_count()
    try:
        with contextlib.ExitStack() as slow:
            for _ in range(2 * MAX_OPEN):
                connection = slow.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60))
                connection.sendall(b"GET /metrics HTTP/1.1\r\n")
                time.sleep(0.005)  # The kernel's queue is short.
            assert get(server.port, "/healthz")[0] == 200
            wait_until(lambda: threading.active_count() - before <= MAX_OPEN, "the end of the oldest connections")
    finally:
        server.close()


def test_a_request_without_end_is_not_read(capsys: pytest.CaptureFixture) -> None:
    server = serve_metrics(WorkerMetrics(0).registry, "127.0.0.1", 0, lambda: True, lambda: "")
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as endless:
            endless.sendall(b"GET /metrics HTTP/1.1\r\n")
            with contextlib.suppress(ConnectionError):
                for _ in range(99):
                    endless.sendall(b"name: " + 65_000 * b"a" + b"\r\n")
                endless.sendall(b"\r\n")
                assert not endless.recv(1)
        assert get(server.port, "/healthz")[0] == 200
    finally:
        server.close()
    assert capsys.readouterr().err == ""


def test_taken_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            serve_metrics(WorkerMetrics(0).registry, "127.0.0.1", taken.getsockname()[1], lambda: True, lambda: "")
