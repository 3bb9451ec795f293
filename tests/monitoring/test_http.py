import socket
import urllib.error
import urllib.request

import pytest

from monitoring.http import serve_metrics
from monitoring.metrics import WorkerMetrics


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_metrics_and_probes() -> None:
    state = {"ready": False}
    metrics = WorkerMetrics(1)
    metrics.predictions.inc(3)
    server = serve_metrics(metrics.registry, "127.0.0.1", 0, lambda: True, lambda: state["ready"])
    try:
        status, text = get(server.port, "/metrics")
        assert status == 200
        assert "driftkeel_predictions_total 3.0" in text
        assert get(server.port, "/healthz")[0] == 200
        assert get(server.port, "/readyz")[0] == 503
        state["ready"] = True
        assert get(server.port, "/readyz")[0] == 200
        assert get(server.port, "/etc/passwd")[0] == 404
    finally:
        server.close()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.port)) != 0


def test_a_connection_that_asks_nothing_is_closed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("monitoring.http._Silent.timeout", 0.1)
    server = serve_metrics(WorkerMetrics(0).registry, "127.0.0.1", 0, lambda: True, lambda: True)
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as idle:
            assert idle.recv(1) == b""
    finally:
        server.close()
    assert capsys.readouterr().err == ""


def test_taken_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            serve_metrics(WorkerMetrics(0).registry, "127.0.0.1", taken.getsockname()[1], lambda: True, lambda: True)
