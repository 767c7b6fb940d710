"""A span for each request, told to an OpenTelemetry collector. Needs the extra `otel`, and is on with `--traces` only.

Names are those of the semantic conventions for generative AI and HTTP. Nothing that a caller wrote is told: the route
is our name of it, the model the served one's. Where the collector is and what is sampled say the `OTEL_*` variables.
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
"""The headers that say what a request is a part of."""


class Traces:
    """Makes spans of requests that are over, and has them sent by a thread."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        """Tell a collector, or `exporter` at once. Raises `SettingError` without the libraries."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
        except ImportError:
            raise SettingError("--traces needs the OpenTelemetry libraries: pip install 'afterword[otel]'.") from None
        named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "afterword"}
        resource = Resource.create({"service.version": __version__, **named})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        processor = SimpleSpanProcessor(exporter) if exporter else BatchSpanProcessor(OTLPSpanExporter())
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("afterword", __version__)

    def record_request(self, outcome: RequestOutcome, headers: Mapping[str, str]) -> None:
        """A request is over. `headers` are those of `PARENT_HEADERS` that it had."""
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        end = time.time_ns()
        start = end - int(outcome.seconds * 1e9)
        answer = outcome.completion
        span = self._tracer.start_span(
            f"text_completion {answer.model}" if answer else f"{_method(outcome)} {outcome.route}",
            context=TraceContextTextMapPropagator().extract(dict(headers)),
            kind=SpanKind.SERVER,
            attributes=span_attributes(outcome),
            start_time=start,
        )
        for name, moment in (("begun", answer.begun), ("first_token", answer.first)) if answer else ():
            if moment is not None:
                span.add_event(f"afterword.{name}", timestamp=start + int(moment * 1e9))
        if outcome.failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end(end)

    def close(self) -> None:
        """Tell what is still to be told, for at most a few seconds."""
        self._provider.shutdown()


def span_attributes(outcome: RequestOutcome) -> dict[str, Any]:
    """What is told of a request."""
    told: dict[str, Any] = {
        "http.request.method": _method(outcome),
        "http.response.status_code": outcome.status,
    }
    if outcome.route != NO_ROUTE:
        told["http.route"] = outcome.route
    if outcome.error is not None:
        told["error.type"] = outcome.error
    return told | (_of_answer(outcome.completion) if outcome.completion else {})


def _method(outcome: RequestOutcome) -> str:
    return outcome.method if outcome.method in METHODS else "_OTHER"


def _of_answer(answer: CompletionOutcome) -> dict[str, Any]:
    return {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "afterword",
        "gen_ai.request.model": answer.model,
        "gen_ai.response.model": answer.model,
        "gen_ai.request.choice.count": answer.n,
        "gen_ai.response.finish_reasons": answer.reasons,
        "gen_ai.usage.input_tokens": answer.prompt_tokens,
        "gen_ai.usage.output_tokens": answer.generated_tokens,
        "gen_ai.usage.cache_read.input_tokens": answer.cached_tokens,
    }


@contextmanager
def open_traces(wanted: bool) -> Iterator[Traces | None]:
    """Traces if they are wanted, closed in the end. Raises `SettingError` without the libraries."""
    if not wanted:
        yield None
        return
    traces = Traces()
    try:
        yield traces
    finally:
        traces.close()
