"""Trace spans of requests: their attributes, their export, and that they contain no text from the client."""

from __future__ import annotations

import asyncio
import builtins
import json
import secrets
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from completion_requests import complete

import scripted_engine
from afterword.api.app import make_app
from afterword.api.service import Service
from afterword.config import Config
from afterword.engine.parent.worker_process import without_secrets
from afterword.errors import SettingError
from afterword.keys.key_registry import KeyRegistry
from afterword.observability.traces import Traces, open_traces
from transport.in_memory_connection import Engine, InMemoryServer, model_manager_of

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def spans_of(*requests: tuple[str, dict[str, Any], dict[str, str]], engine: Engine | None = None) -> list[Any]:
    """The spans after requests, each of path, body and headers, on a scripted engine."""
    pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()

    async def ask() -> None:
        models = model_manager_of(engine or Engine(scripted_engine.text_script("Hello", "Hello"), max_jobs=100))
        in_memory_server = InMemoryServer(make_app(Service(Config(), models, KeyRegistry(()), traces=Traces(exporter))))
        for path, body, headers in requests:
            data = json.dumps(body).encode()
            all_headers = {
                "Host": "localhost",
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
                **headers,
            }
            head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in all_headers.items())
            await in_memory_server.connect().send(head.encode() + b"\r\n" + data)

    asyncio.run(ask())
    return list(exporter.get_finished_spans())


@pytest.mark.parametrize("stream", [False, True])
def test_a_span_has_the_attributes_of_its_request(stream):
    (span,) = spans_of(("/v1/completions", {"prompt": "Hello the cat", "n": 2, "stream": stream}, {}))
    assert (span.name, span.kind.name, span.status.status_code.name) == ("text_completion scripted", "SERVER", "UNSET")
    assert dict(span.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "afterword",
        "gen_ai.request.model": "scripted",
        "gen_ai.response.model": "scripted",
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.finish_reasons": ("stop", "stop"),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,  # including the end tokens
        "gen_ai.usage.cache_read.input_tokens": 0,
    }
    assert [event.name for event in span.events] == ["afterword.begun", "afterword.first_token"]
    moments = [span.start_time, *(event.timestamp for event in span.events), span.end_time]
    assert moments == sorted(moments)


def test_a_span_joins_the_trace_of_the_traceparent_header():
    body = {"prompt": "a"}
    inside, alone, odd = spans_of(
        ("/v1/completions", body, {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "a=b"}),
        ("/v1/completions", body, {}),
        ("/v1/completions", body, {"traceparent": "00-nonsense"}),
    )
    assert f"{inside.context.trace_id:032x}" == TRACE
    assert f"{inside.parent.span_id:016x}" == SPAN
    assert inside.context.trace_state["a"] == "b"
    assert alone.parent is odd.parent is None
    assert alone.context.trace_id != odd.context.trace_id


def test_unsampled_traces_have_no_span():
    assert spans_of(("/v1/completions", {"prompt": "a"}, {"traceparent": f"00-{TRACE}-{SPAN}-00"})) == []


def test_spans_of_refused_and_failed_requests():
    refused, failed = (
        spans_of(("/v1/completions", {"prompt": "a", "temperature": 9}, {})),
        spans_of(
            ("/v1/completions", {"prompt": "a"}, {}), engine=Engine(scripted_engine.text_script("Hello"), dies_after=0)
        ),
    )
    assert (refused[0].name, refused[0].status.status_code.name) == ("POST /v1/completions", "UNSET")
    assert refused[0].attributes["error.type"] == "decimal_above_max_value"
    assert failed[0].status.status_code.name == "ERROR"
    assert (failed[0].attributes["error.type"], failed[0].attributes["http.response.status_code"]) == (
        "server_error",
        500,
    )


def test_a_span_contains_no_text_from_the_client():
    word = f"canary{secrets.token_hex(8)}"
    body = {"prompt": word, "stop": [word], "user": word, "cache_salt": word, "suffix": None}
    spans = spans_of(
        ("/v1/completions", body, {"User-Agent": word}),
        ("/v1/completions", {"prompt": "a", "model": word}, {}),
        (f"/{word}?{word}", body, {}),
    )
    assert len(spans) == 3
    assert not [span for span in spans if word in span.to_json()]


def test_spans_arrive_at_a_collector(serve, monkeypatch):
    pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        with serve("--parallel", "1", "--traces", key=None) as server, server.http() as http:
            complete(http, prompt="Once", max_tokens=3)
        collector.shutdown()  # the server has ended and exported its last spans before
    assert {path for path, _ in received} == {"/v1/traces"}
    assert b"text_completion afterword-tiny" in b"".join(body for _, body in received)


def test_the_error_without_opentelemetry_names_the_package_to_install(monkeypatch):
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SettingError, match=r"afterword\[otel\]"), open_traces(True):
        pass
    with open_traces(False) as traces:
        assert traces is None


def test_the_worker_environment_has_no_collector_headers():
    environment = {
        "OTEL_EXPORTER_OTLP_HEADERS": "a=b",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "a=b",
        "OTEL_SERVICE_NAME": "x",
    }
    assert without_secrets(environment) == {"OTEL_SERVICE_NAME": "x"}
