"""Steps as spans: off by default, and otherwise linked to the traces of their frames."""

from __future__ import annotations

import sys

import pytest

from meta.bundle import Bundle
from schemas.config import Kafka, Store, Traces
from schemas.errors import ConfigError
from tests.worker.engine.test_engine import batch
from tests.worker.test_step import Held, make_step
from worker.step import Step
from worker.trace import Trace, open_trace

sdk = pytest.importorskip("opentelemetry.sdk.trace")
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans():
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace = Trace(provider)
    yield trace, exporter
    trace.close()


def by_name(exporter) -> dict:
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_step_is_a_trace_that_its_frames_lead_to(
    tiny_bundle: Bundle, kafka_settings: Kafka, store_settings: Store, spans
) -> None:
    trace, exporter = spans
    engine = Held(tiny_bundle)
    engine.go.set()
    micro = batch("a", 5)
    micro.frames[0].traceparent = micro.frames[3].traceparent = PARENT
    micro.frames[1].traceparent = "no trace"
    with make_step(engine, kafka_settings, store_settings, trace) as step:
        finish(step, micro)
    found = by_name(exporter)
    whole = found.pop("step")
    assert list(found) == ["consume", "predict", "publish", "adapt", "settle", "store"]
    (link,) = whole.links
    assert f"{link.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{link.context.span_id:016x}" == PARENT.split("-")[2]
    assert whole.attributes["driftkeel.positions"] == tuple(str(frame.position) for frame in micro.frames)
    for span in found.values():
        assert span.parent.span_id == whole.context.span_id
        assert whole.start_time <= span.start_time <= span.end_time <= whole.end_time
    assert found["predict"].end_time <= found["store"].start_time


def finish(step: Step, micro) -> None:
    flight = step.start([micro])
    flight.adapted.result(120)
    step.finish(flight)


def test_without_an_endpoint_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    assert open_trace(Traces(), "w") is None
    assert not [name for name in sys.modules if name.startswith("opentelemetry")]


def test_an_endpoint_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'driftkeel\[otel\]'"):
        open_trace(Traces(endpoint="http://127.0.0.1:4318/v1/traces"), "w")


def test_an_endpoint_that_is_away_stops_nothing() -> None:
    trace = open_trace(Traces(endpoint="http://127.0.0.1:9/v1/traces"), "w")
    trace.step({"predict": (1.0, 2.0)}, [], {})
    trace.close()
