"""All metrics of `/metrics` after known requests, on real servers and on a scripted engine for rare failures."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from completion_requests import complete, is_idle, stream, wait_until
from one_text_model import TEXT, write_one_text_model
from prometheus_client.parser import text_string_to_metric_families

import scripted_engine
from afterword.api.app import make_app
from afterword.api.in_process_client import in_process_client
from afterword.api.service import Service
from afterword.config import Config
from afterword.errors import SettingError
from afterword.keys.key_registry import KeyRegistry
from afterword.observability.metrics import Metrics
from oracle.tiny import write_tiny
from transport.in_memory_connection import Engine, InMemoryServer, model_manager_of

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTED = re.findall(
    r"^\| `([a-z0-9_:]+)`", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), re.MULTILINE
)
VLLM = {
    # the metrics that dashboards for vLLM read
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total"),
    *("generation_tokens_total", "request_success_total", "prefix_cache_queries_total", "prefix_cache_hits_total"),
    *(
        f"{name}_{part}"
        for part in ("bucket", "sum", "count")
        for name in (
            *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
            *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
            *("request_prompt_tokens", "request_generation_tokens", "request_params_n"),
        )
    ),
}
Samples = dict[tuple[str, ...], float]


def read(http: httpx.Client) -> Samples:
    """All samples except buckets, by name without prefix and the values of all labels but the model's."""
    response = http.get("/metrics")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return parsed(response.text)


def parsed(text: str) -> Samples:
    return {
        (
            sample.name.rpartition(":")[2],
            *(value for label, value in sorted(sample.labels.items()) if label != "model_name"),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def increase(before: Samples, after: Samples) -> Samples:
    """The increase of each sample, except times, states, memory and forward passes."""
    excluded = re.compile(r".*_(seconds|seconds_sum|bytes|perc|state|fds)$|process_.*|engine_pass.*|.*_created")
    return {
        name: value - before.get(name, 0)
        for name, value in after.items()
        if value != before.get(name, 0) and not excluded.match(name[0])
    }


def settled(http: httpx.Client) -> Samples:
    """The metrics after the engine is idle and the server has counted every request of this client.

    The server counts a request after it has sent the response, so a client can read `/metrics` before that.
    """
    wait_until(lambda: is_idle(http))
    found: list[Samples] = []

    def is_complete() -> bool:
        sent = SENT[str(http.base_url)]
        found[:] = [read(http)]
        return sum(value for name, value in found[0].items() if name[0] == "http_requests_total") == sent

    wait_until(is_complete)
    return {name: value for name, value in found[0].items() if name[1:2] not in (("/ready",), ("/metrics",))}


SENT: Counter[str] = Counter()
"""Requests that `counting_client` has sent, by the base URL of the server."""


@contextmanager
def counting_client(server: Any) -> Iterator[httpx.Client]:
    """A client that counts its requests in `SENT`. Its server must have no other client."""
    with server.http() as http:
        http.event_hooks = {"response": [lambda _: SENT.update([str(http.base_url)])]}
        yield http


@pytest.fixture(scope="module")
def counted(serve: Any) -> Iterator[httpx.Client]:
    with serve("--parallel", "4", key=None) as server, counting_client(server) as http:
        yield http


@pytest.fixture(scope="module")
def one_text_http(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server with the model that generates one fixed text."""
    path = write_one_text_model(tmp_path_factory.mktemp("counted") / "one-text.gguf")
    with serve(str(path), "--parallel", "2", key=None) as server, counting_client(server) as http:
        yield http


# ---- after known requests


def test_a_response_with_two_choices_is_counted(counted, endless):
    before = settled(counted)
    usage = complete(counted, prompt="One, two", n=2, max_tokens=5, logit_bias=endless)["usage"]
    assert usage["completion_tokens"] == 10
    assert increase(before, settled(counted)) == {
        ("http_requests_total", "/v1/completions", "POST", "2xx"): 1,
        ("request_success_total", "length"): 2,
        ("prompt_tokens_total",): usage["prompt_tokens"],
        ("prefix_cache_queries_total",): usage["prompt_tokens"],
        ("generation_tokens_total",): 10,
        ("inter_token_latency_seconds_count",): 8,
        ("time_to_first_token_seconds_count",): 1,
        ("e2e_request_latency_seconds_count",): 1,
        ("request_queue_time_seconds_count",): 1,
        ("request_prefill_time_seconds_count",): 1,
        ("request_decode_time_seconds_count",): 1,
        ("request_prompt_tokens_count",): 1,
        ("request_prompt_tokens_sum",): usage["prompt_tokens"],
        ("request_generation_tokens_count",): 1,
        ("request_generation_tokens_sum",): 10,
        ("request_params_n_count",): 1,
        ("request_params_n_sum",): 2,
    }


def test_a_stream_counts_like_a_whole_response(counted, endless):
    body = {"prompt": "Red, green, blue, white", "max_tokens": 7, "logit_bias": endless, "cache_salt": "a"}
    samples = [settled(counted)]
    complete(counted, **body)
    samples.append(settled(counted))
    stream(counted, **body | {"cache_salt": "b"})
    samples.append(settled(counted))
    whole, streamed = increase(*samples[:2]), increase(*samples[1:])
    assert whole == streamed
    assert streamed["inter_token_latency_seconds_count",] == 6


def test_each_prompt_is_queued_but_counts_as_one_request(counted, endless):
    before = settled(counted)
    complete(counted, prompt=["A long time ago", "In a far country", "There was"], max_tokens=3, logit_bias=endless)
    more = increase(before, settled(counted))
    assert more["request_queue_time_seconds_count",] == more["request_decode_time_seconds_count",] == 3
    assert more["request_success_total", "length"] == 3
    assert more["e2e_request_latency_seconds_count",] == more["request_params_n_count",] == 1
    assert more["generation_tokens_total",] == more["request_generation_tokens_sum",] == 9


def test_scoring_generates_nothing(counted):
    before = settled(counted)
    usage = complete(counted, prompt="The cat sat on the mat.", echo=True, logprobs=1, max_tokens=0)["usage"]
    more = increase(before, settled(counted))
    assert more["prompt_tokens_total",] == more["request_prompt_tokens_sum",] == usage["prompt_tokens"]
    assert more["request_prefill_time_seconds_count",] == more["request_success_total", "length"] == 1
    assert not {("generation_tokens_total",), ("request_decode_time_seconds_count",)} & more.keys()


def test_cached_tokens_count_as_prefix_cache_hits(counted):
    body = {"prompt": "It was the best of times, it was the worst of times, it was the age of", "max_tokens": 1}
    complete(counted, **body)
    before = settled(counted)
    usage = complete(counted, **body)["usage"]
    more = increase(before, settled(counted))
    assert more["prefix_cache_hits_total",] == usage["prompt_tokens_details"]["cached_tokens"] > 0
    assert more["prefix_cache_queries_total",] == more["prompt_tokens_total",] == usage["prompt_tokens"]


def test_all_candidates_are_counted_as_generated(counted, endless):
    before = settled(counted)
    usage = complete(counted, prompt="Yes", n=1, best_of=3, max_tokens=4, logit_bias=endless)["usage"]
    more = increase(before, settled(counted))
    assert (
        more["generation_tokens_total",] == usage["completion_tokens"] == more["request_generation_tokens_sum",] == 12
    )
    assert more["request_success_total", "length"] == more["request_params_n_sum",] == 1


def test_the_end_token_is_generated_and_not_in_usage(one_text_http):
    before = settled(one_text_http)
    usage = complete(one_text_http, prompt="(", max_tokens=100, temperature=0)["usage"]
    more = increase(before, settled(one_text_http))
    assert more["request_success_total", "stop"] == 1
    assert more["request_generation_tokens_sum",] == usage["completion_tokens"] + 1
    assert more["generation_tokens_total",] == usage["completion_tokens"] + 1


def test_a_stop_string_ends_a_choice_and_a_running_pass_may_still_count(one_text_http):
    before = settled(one_text_http)
    usage = complete(one_text_http, prompt="(", max_tokens=100, temperature=0, stop="5")["usage"]
    more = increase(before, settled(one_text_http))
    assert more["request_success_total", "stop"] == more["request_decode_time_seconds_count",] == 1
    assert usage["completion_tokens"] < more["generation_tokens_total",] <= len(TEXT.encode()) + 1


def test_a_disconnect_aborts_every_unfinished_choice(counted, endless):
    before = settled(counted)
    body = {"prompt": "Leave", "max_tokens": 1900, "n": 3, "logit_bias": endless, "stream": True}
    with counted.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    wait_until(lambda: read(counted)["request_success_total", "abort"] == before["request_success_total", "abort"] + 3)
    more = increase(before, settled(counted))
    assert 0 < more.pop(("generation_tokens_total",)) < 3 * 1900
    more.pop(("inter_token_latency_seconds_count",), None)
    (prompt,) = {more.pop((name,)) for name in ("prompt_tokens_total", "prefix_cache_queries_total")}
    assert prompt > 0
    more.pop(("prefix_cache_hits_total",), None)
    assert more == {
        ("http_requests_total", "/v1/completions", "POST", "2xx"): 1,
        ("request_success_total", "abort"): 3,
        ("time_to_first_token_seconds_count",): 1,
        ("request_queue_time_seconds_count",): 1,
        ("request_prefill_time_seconds_count",): 1,
    }, "and no metric of a finished completion"


@pytest.mark.parametrize(
    ("request_line", "body", "handler", "code"),
    [
        ("POST /v1/completions", {"temperature": 9}, "/v1/completions", "decimal_above_max_value"),
        ("POST /v1/completions", {"prompt": "a", "model": "x"}, "/v1/completions", "model_not_found"),
        ("POST /v1/completions", {"prompt": "a", "frobnicate": 1}, "/v1/completions", "unknown_parameter"),
        ("POST /v1/completions", [1], "/v1/completions", "invalid_request_error"),
        ("GET /v1/models/unknown", None, "/v1/models/{model:path}", "model_not_found"),
        ("GET /nowhere/7", None, "none", "unknown_url"),
        ("PUT /version", None, "/version", "method_not_supported"),
    ],
)
def test_refusals_are_counted_by_route_and_code_only(counted, request_line, body, handler, code):
    before = settled(counted)
    method, path = request_line.split()
    assert counted.request(method, path, json=body).status_code >= 400
    expected = {("http_requests_total", handler, method, "4xx"): 1, ("request_errors_total", code): 1}
    assert increase(before, settled(counted)) == expected


def test_unknown_hosts_and_methods_get_no_labels_of_their_own(counted):
    before = settled(counted)
    assert counted.get("/version", headers={"Host": "evil.example"}).status_code == 400
    assert counted.request("PROPFIND", "/anything").status_code == 404
    more = increase(before, settled(counted))
    assert more["http_requests_total", "none", "GET", "4xx"] == more["request_errors_total", "unknown_host"] == 1
    assert more["http_requests_total", "none", "other", "4xx"] == 1


def test_health_checks_and_metrics_requests_are_counted(counted):
    name = ("http_requests_total", "/metrics", "GET", "2xx")
    before = settled(counted)
    counted.get("/health")
    assert increase(before, settled(counted)) == {("http_requests_total", "/health", "GET", "2xx"): 1}
    reads = read(counted)[name]
    wait_until(lambda: read(counted)[name] > reads)


def test_malformed_http_is_counted_as_a_refused_connection(counted):
    before = read(counted)
    with socket.create_connection((counted.base_url.host, counted.base_url.port or 80)) as link:
        link.sendall(b"hello\r\n\r\n")
        while link.recv(4096):
            pass
    assert increase(before, read(counted))["connections_refused_total", "400"] == 1


def test_gauges_show_running_and_waiting_sequences(counted, endless):
    body = {"prompt": "Many words", "max_tokens": 1900, "n": 6, "logit_bias": endless, "stream": True}
    with counted.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        wait_until(lambda: read(counted)["num_requests_running",] == 4)
        busy = read(counted)
        assert busy["num_requests_waiting",] == 2
        assert 0 < busy["kv_cache_usage_perc",] <= 1
        del lines
    idle = settled(counted)
    assert idle["num_requests_running",] == idle["num_requests_waiting",] == idle["kv_cache_usage_perc",] == 0
    assert 0 < idle["kv_cache_kept_perc",] <= 1


def test_a_new_server_has_all_metrics_and_counts_forward_passes(serve, endless):
    with serve("--parallel", "4", key=None) as server, counting_client(server) as http:
        samples = settled(http)
        assert {samples["request_success_total", reason] for reason in ("stop", "length", "abort", "error")} == {0}
        assert samples["prompt_tokens_total",] == samples["engine_restarts_total",] == 0
        assert samples["e2e_request_latency_seconds_count",] == samples["engine_pass_tokens_count", "prompt"] == 0
        assert samples["engine_state", "ready"] == samples["server_state", "ready"] == 1
        assert sum(value for (name, *_), value in samples.items() if name == "server_state") == 1
        usage = complete(http, prompt="One two three four five six", n=3, max_tokens=9, logit_bias=endless)["usage"]
        samples = settled(http)
    assert samples["engine_pass_tokens_sum", "prompt"] == usage["prompt_tokens"]
    assert samples["engine_pass_tokens_sum", "generation"] == 3 * 8, "the prefill pass generates the first tokens"
    assert samples["engine_pass_tokens_count", "generation"] >= 8
    assert samples["engine_pass_seconds_count", "generation"] == samples["engine_pass_tokens_count", "generation"]
    assert samples["engine_pass_seconds_sum", "prompt"] > 0


def test_queue_prefill_and_decode_times_add_up(counted, endless):
    """Queue, prefill and decode time are within the time of the response; token gaps add up to the decode time."""
    before = settled(counted)
    complete(counted, prompt="Time flies like an arrow", max_tokens=30, logit_bias=endless, cache_salt="t")
    after = settled(counted)
    seconds = {
        name: after[name,] - before[name,] for (name, *labels) in after if name.endswith("_seconds_sum") and not labels
    }
    parts = [seconds[f"request_{part}_time_seconds_sum"] for part in ("queue", "prefill", "decode")]
    assert 0 < sum(parts) <= seconds["e2e_request_latency_seconds_sum"]
    assert seconds["inter_token_latency_seconds_sum"] == pytest.approx(parts[2])
    assert parts[0] <= seconds["time_to_first_token_seconds_sum"] <= seconds["e2e_request_latency_seconds_sum"]


def test_buckets_are_cumulative_and_end_with_the_count(counted):
    complete(counted, prompt="a", max_tokens=2)
    families = text_string_to_metric_families(counted.get("/metrics").text)
    histograms = [family for family in families if family.type == "histogram"]
    assert len(histograms) >= 11
    for family in histograms:
        rows: dict[tuple[str, ...], list[float]] = {}
        counts = {}
        for sample in family.samples:
            labels = tuple(value for label, value in sorted(sample.labels.items()) if label != "le")
            if sample.name.endswith("_bucket"):
                rows.setdefault(labels, []).append(sample.value)
            elif sample.name.endswith("_count"):
                counts[labels] = sample.value
        assert rows
        for labels, row in rows.items():
            assert row == sorted(row)
            assert row[-1] == counts[labels]


# ---- several models


def of_model(http: httpx.Client, model: str) -> dict[str, str]:
    """The samples of one model, by name and the other labels."""
    lines = re.findall(r"^afterword:(\w+)\{(.*)\} (\S+)$", http.get("/metrics").text, re.MULTILINE)
    label = f'model_name="{model}"'
    return {
        f"{name} {labels.replace(label, '').strip(',')}".strip(): value
        for name, labels, value in lines
        if label in labels
    }


def test_metrics_are_per_model_and_outlive_the_worker(serve, tmp_path):
    one_text, noise = (
        write_one_text_model(tmp_path / "one-text.gguf"),
        write_tiny(tmp_path / "noise.gguf", infill=False),
    )
    with (
        serve(str(one_text), str(noise), "--keep-alive", "0", "--parallel", "1", key=None) as server,
        server.http() as http,
    ):
        for model in ("one-text", "noise"):
            new = of_model(http, model)
            assert new['engine_state state="unloaded"'] == "1.0"
            assert new["generation_tokens_total"] == new["kv_cache_usage_perc"] == "0.0"
            assert "engine_resident_memory_bytes" not in new
        for times in (1, 2):
            complete(http, model="one-text", prompt="(", max_tokens=2, temperature=0)
            wait_until(lambda: of_model(http, "one-text")['engine_state state="unloaded"'] == "1.0")
            used, unused = of_model(http, "one-text"), of_model(http, "noise")
            assert used["generation_tokens_total"] == f"{2.0 * times}"
            assert used["request_queue_time_seconds_count"] == f"{1.0 * times}"
            assert (
                unused["generation_tokens_total"] == unused['request_success_total finished_reason="length"'] == "0.0"
            )


# ---- failing engines


def test_a_killed_worker_counts_as_a_restart_and_no_token_counts_twice(serve, endless):
    with serve("--parallel", "2", key=None) as server, counting_client(server) as http:
        body = {"prompt": "On and on", "max_tokens": 1000, "logit_bias": endless, "stream": True, "seed": 1}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = (line for line in answer.iter_lines() if line)
            for _ in range(20):
                next(lines)
            (child,) = psutil.Process(server.pid).children()
            with counting_client(server) as other:
                assert read(other)["engine_resident_memory_bytes",] > 2**20
            os.kill(child.pid, signal.SIGKILL)
            assert list(lines)[-1] == "data: [DONE]"
        samples = settled(http)
    assert samples["engine_restarts_total",] == 1
    assert samples["generation_tokens_total",] == 1000
    assert samples["inter_token_latency_seconds_count",] == 999
    assert samples["request_success_total", "length"] == 1
    assert samples["request_queue_time_seconds_count",] == samples["request_decode_time_seconds_count",] == 1


async def metrics_after(engine: Engine, *requests: bytes) -> Samples:
    """The metrics after completion requests to a scripted engine, each on its own connection."""
    metrics = Metrics(["scripted"])
    app = make_app(Service(Config(), model_manager_of(engine), KeyRegistry(()), metrics=metrics))
    in_memory_server = InMemoryServer(app)
    for body in requests:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client = in_memory_server.connect()
        await client.send(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        client.disconnect()
    return parsed(metrics.text("ready", []).decode())


@pytest.mark.parametrize("streams", [b"true", b"false"])
def test_a_failed_engine_counts_as_an_error_streamed_or_not(streams):
    engine = Engine(scripted_engine.text_script(b"Hello" * 4, b"Hello" * 4), dies_after=2)
    samples = asyncio.run(metrics_after(engine, b'{"prompt": "a", "n": 2, "stream": %s}' % streams))
    assert samples["request_success_total", "error"] == 2
    assert samples["request_success_total", "abort"] == samples["request_success_total", "stop"] == 0
    assert samples["request_errors_total", "server_error"] == 1
    assert samples["e2e_request_latency_seconds_count",] == 0
    status = "2xx" if streams == b"true" else "5xx"
    assert samples["http_requests_total", "/v1/completions", "POST", status] == 1


def test_a_bug_within_a_stream_counts_as_an_error_not_as_an_abort():
    def breaks(*_: object) -> Iterator[int]:
        yield 65
        raise ZeroDivisionError

    samples = asyncio.run(metrics_after(Engine(breaks), b'{"prompt": "a", "stream": true}'))
    assert samples["request_success_total", "error"] == samples["request_errors_total", "server_error"] == 1
    assert samples["request_success_total", "abort"] == 0
    assert samples["http_requests_total", "/v1/completions", "POST", "2xx"] == 1


def test_an_overloaded_server_counts_errors_and_no_completions(serve):
    samples = asyncio.run(
        metrics_after(
            Engine(scripted_engine.text_script("a"), max_jobs=0), b'{"prompt": "a"}', b'{"prompt": "a", "stream": true}'
        )
    )
    assert samples["request_errors_total", "server_is_overloaded"] == 2
    assert {value for (name, *_), value in samples.items() if name.startswith("request_success")} == {0}


def test_a_batch_line_counts_as_a_completion_but_not_as_an_http_request():
    async def ask() -> Samples:
        metrics = Metrics(["scripted"])
        app = make_app(
            Service(
                Config(),
                model_manager_of(Engine(scripted_engine.text_script("Hello"))),
                KeyRegistry(()),
                metrics=metrics,
            )
        )
        reply = await in_process_client(app)("POST", "/v1/completions", b'{"prompt": "a"}')
        assert reply.status == 200
        return parsed(metrics.text("ready", []).decode())

    samples = asyncio.run(ask())
    assert samples["request_success_total", "stop"] == samples["request_generation_tokens_count",] == 1
    assert samples["e2e_request_latency_seconds_count",] == samples["time_to_first_token_seconds_count",] == 0
    assert not [name for name in samples if name[0] == "http_requests_total"]


# ---- API keys, names and labels


def test_metrics_need_a_key_on_a_server_with_keys(server, http):
    with server.http("wrong-key-0123456789") as other:
        assert other.get("/metrics").status_code == 401
    with httpx.Client(base_url=server.url, trust_env=False) as anonymous:
        assert anonymous.get("/metrics").status_code == 401
    assert http.get("/metrics").status_code == 200


def test_metrics_open_needs_no_key_and_the_vllm_prefix_has_all_vllm_names(serve):
    with (
        serve("--parallel", "1", "--metrics-open", "--metrics-prefix", "vllm") as server,
        counting_client(server) as http,
    ):
        complete(http, prompt="a", max_tokens=2)
        settled(http)
        del http.headers["authorization"]
        assert http.get("/version").status_code == 401
        text = http.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = {sample.name: sample.labels for family in families.values() for sample in family.samples}
    assert {f"vllm:{name}" for name in VLLM} <= samples.keys()
    assert all(samples[f"vllm:{name}"]["model_name"] == server.model for name in VLLM)
    assert samples["http_requests_total"].keys() == {"handler", "method", "status"}
    assert "afterword:" not in text


@pytest.mark.parametrize("prefix", ["", "1st", "a:b", "a-b", "a b", 'a"'])
def test_an_invalid_metrics_prefix_is_refused(prefix):
    with pytest.raises(SettingError, match="--metrics-prefix"):
        Config(metrics_prefix=prefix)


def test_the_document_lists_exactly_the_exported_metrics(counted):
    text = counted.get("/metrics").text
    served = set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))
    ours = {name for name in served if not name.startswith("process_")}
    assert len(DOCUMENTED) == len(set(DOCUMENTED))
    assert {name for name in DOCUMENTED if not name.startswith("process_")} == ours


def test_only_known_labels_are_used(counted):
    text = counted.get("/metrics").text
    labels = set(re.findall(r'(\w+)="', text))
    assert labels == {
        "handler",
        "method",
        "status",
        "version",
        "state",
        "code",
        "model_name",
        "finished_reason",
        "le",
        "kind",
    }


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (Debian: prometheus) is not installed")
def test_promtool_accepts_the_metrics_except_for_the_colons(counted):
    text = counted.get("/metrics").text
    check = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    output = [line for line in (check.stdout + check.stderr).splitlines() if line]
    assert [line for line in output if "metric names should not contain ':'" not in line] == []
