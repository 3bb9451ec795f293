"""Spans of steps for OpenTelemetry. Nothing is loaded or done unless `traces.endpoint` is set.

A step serves many frames of many streams. So it is a trace of its own, with links to the traces that its frames belong
to by their `traceparent` headers (W3C Trace Context). Its spans are created when it is over, from times that the worker
measures anyway.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from schemas.config import Traces
from schemas.errors import ConfigError

MOST_LINKS = 128  # as many as the SDK keeps of a span
EXPORT_TIMEOUT_S = 2.0  # a collector that is away must not hold up the end of a worker
Span = tuple[float, float]  # begin and end, monotonic seconds


class Trace:
    """Exports steps as spans, through a tracer provider of the OpenTelemetry SDK."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._tracer = provider, provider.get_tracer("driftkeel")
        self._propagator, self._kind = TraceContextTextMapPropagator(), SpanKind.CONSUMER

    def step(self, stages: Mapping[str, Span], traceparents: Iterable[str | None], about: Mapping[str, Any]) -> None:
        """One step that is over: its stages, the frames' headers, and attributes."""
        from opentelemetry.trace import set_span_in_context

        # Spans need the time of day. One offset for all of them: the clock may have been set during the step.
        offset = time.time_ns() - time.monotonic_ns()
        spans = {name: tuple(offset + int(t * 1e9) for t in span) for name, span in stages.items()}
        whole = self._tracer.start_span(
            "step",
            links=self._links(traceparents),
            start_time=min(begin for begin, _ in spans.values()),
            attributes=dict(about),
            kind=self._kind,
        )
        parent = set_span_in_context(whole)
        for name, (begin, end) in spans.items():
            self._tracer.start_span(name, context=parent, start_time=begin).end(end)
        whole.end(max(end for _, end in spans.values()))

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()

    def _links(self, traceparents: Iterable[str | None]) -> list[Any]:
        from opentelemetry.trace import Link, get_current_span

        links = []
        for text in islice(dict.fromkeys(t for t in traceparents if t), MOST_LINKS):
            context = get_current_span(self._propagator.extract({"traceparent": text})).get_span_context()
            if context.is_valid:
                links.append(Link(context))
        return links


def open_trace(settings: Traces, worker: str) -> Trace | None:
    """A trace to the endpoint; None where none is set. Raises ConfigError where OpenTelemetry is missing."""
    if settings.endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
    except ImportError as error:
        raise ConfigError(
            f"traces.endpoint is set, but OpenTelemetry is not installed ({error.name}); pip install 'driftkeel[otel]'"
        ) from error
    provider = TracerProvider(
        sampler=TraceIdRatioBased(settings.sample_ratio),
        resource=Resource.create({"service.name": "driftkeel", "service.instance.id": worker}),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(
        BatchSpanProcessor(OTLPSpanExporter(endpoint=settings.endpoint, timeout=EXPORT_TIMEOUT_S))
    )
    return Trace(provider)
