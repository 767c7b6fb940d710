"""Sends one OpenTelemetry span per request to a collector. It needs the extra `otel` and the option `--traces`.

Attributes have the names of the semantic conventions for generative AI and HTTP. They contain nothing that a client
wrote: the route is the server's name for it, the model is the served model. The variables `OTEL_*` set the collector's
address and the sampling. A thread of the OpenTelemetry library sends the spans.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from afterword import __version__
from afterword.errors import SettingError
from afterword.observability.metrics import METHODS, NO_ROUTE, CompletionOutcome, RequestOutcome

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

PARENT_HEADERS = ("traceparent", "tracestate")
"""The headers that name the trace and span to which a request belongs."""


class Traces:
    """Creates the spans of finished requests and sends them from a thread."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        """Send spans to the collector, or to `exporter` at once. Raises `SettingError` without the libraries."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
        except ImportError:
            raise SettingError("--traces needs the OpenTelemetry libraries: pip install 'afterword[otel]'.") from None
        service = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "afterword"}
        resource = Resource.create({"service.version": __version__, **service})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        processor = SimpleSpanProcessor(exporter) if exporter else BatchSpanProcessor(OTLPSpanExporter())
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("afterword", __version__)

    def record_request(self, outcome: RequestOutcome, headers: Mapping[str, str]) -> None:
        """Create the span of a finished request. `headers`: those of `PARENT_HEADERS` that the request has."""
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        end = time.time_ns()
        start = end - int(outcome.seconds * 1e9)
        completion = outcome.completion
        span = self._tracer.start_span(
            f"text_completion {completion.model}" if completion else f"{_method(outcome)} {outcome.route}",
            context=TraceContextTextMapPropagator().extract(dict(headers)),
            kind=SpanKind.SERVER,
            attributes=span_attributes(outcome),
            start_time=start,
        )
        for name, moment in (("begun", completion.begun), ("first_token", completion.first)) if completion else ():
            if moment is not None:
                span.add_event(f"afterword.{name}", timestamp=start + int(moment * 1e9))
        if outcome.failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end(end)

    def close(self) -> None:
        """Send the remaining spans, for at most a few seconds."""
        self._provider.shutdown()


def span_attributes(outcome: RequestOutcome) -> dict[str, Any]:
    """The attributes of a request's span."""
    attributes: dict[str, Any] = {
        "http.request.method": _method(outcome),
        "http.response.status_code": outcome.status,
    }
    if outcome.route != NO_ROUTE:
        attributes["http.route"] = outcome.route
    if outcome.error is not None:
        attributes["error.type"] = outcome.error
    return attributes | (_completion_attributes(outcome.completion) if outcome.completion else {})


def _method(outcome: RequestOutcome) -> str:
    return outcome.method if outcome.method in METHODS else "_OTHER"


def _completion_attributes(completion: CompletionOutcome) -> dict[str, Any]:
    return {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "afterword",
        "gen_ai.request.model": completion.model,
        "gen_ai.response.model": completion.model,
        "gen_ai.request.choice.count": completion.n,
        "gen_ai.response.finish_reasons": completion.reasons,
        "gen_ai.usage.input_tokens": completion.prompt_tokens,
        "gen_ai.usage.output_tokens": completion.generated_tokens,
        "gen_ai.usage.cache_read.input_tokens": completion.cached_tokens,
    }


@contextmanager
def open_traces(wanted: bool) -> Iterator[Traces | None]:
    """Open traces and close them at the end; None if they are not wanted.

    Raises `SettingError` without the libraries.
    """
    if not wanted:
        yield None
        return
    traces = Traces()
    try:
        yield traces
    finally:
        traces.close()
