"""Large responses are encoded in slices and sent in pieces while other tasks run. Shared parts are encoded once."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest
from in_memory_connection import Engine, application

from afterword.api.in_process_client import in_process_client
from afterword.api.responses import incremental, serialization
from afterword.completion import logprobs
from afterword.completion.choice import Delta, fold
from afterword.completion.plan import Plan, make_plan
from afterword.completion.request import CompletionRequest
from afterword.completion.request_limits import RequestLimits
from afterword.completion.run import Usage, run, tokenize
from scripted_engine import EOS, ids, text_script

HEAD = serialization.ResponseHead("cmpl-1", 1, "scripted", "fp_0")
SCRIPT = text_script("Hello 😀 world \u2028 the", " cat", "")


def new_plan(engine: Engine, **fields: Any) -> Plan:
    request = CompletionRequest(**fields)
    return make_plan(request, engine.model_info, asyncio.run(tokenize(request, engine)), 0)


def deltas_of(script: Any = SCRIPT, **fields: Any) -> tuple[list[Delta], Usage]:
    engine = Engine(script)
    plan = new_plan(engine, **fields)

    async def collect() -> list[Delta | Usage]:
        return [item async for item in run(plan, engine)]

    *deltas, usage = asyncio.run(collect())
    return deltas, usage  # type: ignore[return-value]


def reference(choices: list[Delta], usage: Usage) -> bytes:
    """The whole response, encoded in one call."""
    objects = [serialization._choice(choice) for choice in choices]
    return serialization.encode(serialization._object(HEAD, objects) | serialization._usage_member(usage))


FIELDS: list[dict[str, Any]] = [
    {},
    {"logprobs": 0},
    {"logprobs": 3, "echo": True},
    {"echo": True},
    {"logprobs": 2, "echo": True, "max_tokens": 0},
    {"return_token_ids": True, "prompt_logprobs": 2},
    {"return_token_ids": True, "prompt_logprobs": 0, "echo": True, "logprobs": 1},
    {"best_of": 3, "echo": True, "logprobs": 1},
    {"prompt": ("a cat", "", "the cat sat"), "echo": True, "logprobs": 1},
    {"prompt": ((*ids("the"), 0xF0, 0x9F),), "echo": True, "logprobs": 1},
    {"prompt": ("",), "echo": True, "logprobs": 1, "max_tokens": 0},
]


@pytest.fixture(params=[1, 2, 256])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of tokens in a slice; also small numbers, so that short texts have several slices."""
    for module in (incremental, logprobs):
        monkeypatch.setattr(module, "SLICE_TOKENS", request.param)
    return int(request.param)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_response_encoded_in_slices_has_the_same_bytes(fields: dict[str, Any]) -> None:
    fields = {"prompt": ("a cat sat",), "n": 1 if "best_of" in fields else 2} | fields
    deltas, usage = deltas_of(**fields)
    body = incremental.EncodedBody(HEAD, fields["n"])
    for delta in deltas:
        for _ in body.encode(delta):
            pass
    by_index = {delta.index: [each for each in deltas if each.index == delta.index] for delta in deltas}
    choices = [fold(by_index[index]) for index in sorted(by_index)]
    whole = b"".join(body.fragments(usage))
    assert whole == reference(choices, usage) == b"".join(body.fragments(usage))
    assert whole == incremental.completion(HEAD, choices, usage)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("usage", ["never", "later", Usage(1, 2)], ids=str)
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_an_event_encoded_in_slices_has_the_same_bytes(fields: dict[str, Any], usage: Any) -> None:
    for delta in deltas_of(**{"prompt": ("a cat sat",)} | fields)[0]:
        sharing = incremental.PromptEncoder(2)
        for _ in range(3):
            (shared,) = [step for step in sharing.encode(delta) if isinstance(step, incremental.EncodedPrompt)]
            choice = incremental.EncodedChoice(delta.index, shared)
            for _ in choice.encode(delta):
                pass
            chunk = serialization.ChunkEncoder(HEAD).chunk(delta, usage)
            assert b"".join(incremental.event(HEAD, choice, usage)) == chunk


def test_pieces_have_one_size_and_join_to_the_fragments() -> None:
    fragments = [b"a" * size for size in (0, 1, 2**16, 3, 2**20, 2**16 - 1, 5)]
    cut = list(incremental.chunked(fragments))
    assert b"".join(cut) == b"".join(fragments)
    assert all(incremental.MIN_CHUNK_BYTES <= len(piece) < 2 * incremental.MIN_CHUNK_BYTES for piece in cut[:-1])
    assert len(cut[-1]) < 2 * incremental.MIN_CHUNK_BYTES


# ---- through the application


async def post(app: Any, path: str, fields: dict[str, Any], ticks: Counter[str]) -> list[dict[str, Any]]:
    """The ASGI messages of a response. `ticks`: turns of another task before and after the response begins."""
    messages: list[dict[str, Any]] = []
    parts = [{"type": "http.request", "body": json.dumps(fields).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not parts:
            await asyncio.Event().wait()
        return parts.pop()

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    async def count_turns() -> None:
        while True:
            ticks["after" if messages else "before"] += 1
            await asyncio.sleep(0)

    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode()}
    scope |= {"query_string": b"", "root_path": "", "scheme": "http", "client": ("127.0.0.1", 1), "server": None}
    scope["headers"] = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    counting = asyncio.create_task(count_turns())
    try:
        await app(scope, receive, send)
    finally:
        counting.cancel()
    return messages


def ask(
    path: str = "/v1/completions", limits: RequestLimits | None = None, **fields: Any
) -> tuple[list[Any], Counter[str]]:
    ticks: Counter[str] = Counter()
    engine = Engine(lambda *_: iter(lambda: 97, None), max_jobs=10**6)
    app = application(engine, keys=False, limits=limits or RequestLimits())
    return asyncio.run(post(app, path, fields, ticks)), ticks


def content(messages: list[Any]) -> bytes:
    assert messages[0]["status"] == 200, messages[1]
    assert [message["more_body"] for message in messages[1:] if message.get("more_body")] == [True] * (
        len(messages) - 2
    )
    body = b"".join(message["body"] for message in messages[1:])
    assert dict(messages[0]["headers"]).get(b"content-length", b"%d" % len(body)) == b"%d" % len(body)
    return body


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often entries about a token are encoded."""
    counts: Counter[str] = Counter()
    for name in ("top_map", "ranked"):
        function = getattr(logprobs, name)
        monkeypatch.setattr(logprobs, name, lambda *a, f=function, n=name: counts.update([n]) or f(*a))
    return counts


@pytest.mark.parametrize("stream", [False, True])
def test_an_echoed_prompt_is_encoded_once_for_all_choices(encoded: Counter[str], stream: bool) -> None:
    messages, _ = ask(prompt="a" * 40, echo=True, logprobs=3, n=64, max_tokens=1, stream=stream)
    assert content(messages).count(b'"finish_reason":"length"') == 64
    assert encoded["top_map"] == 39 + 64


def test_a_report_about_a_prompt_is_made_once_for_all_choices(encoded: Counter[str]) -> None:
    answer = json.loads(content(ask(prompt=["a" * 40, "b" * 30], prompt_logprobs=5, n=32, max_tokens=1)[0]))
    assert [len(choice["prompt_logprobs"]) for choice in answer["choices"]] == [40] * 32 + [30] * 32
    assert encoded["ranked"] == 39 + 29


def test_best_of_encodes_the_prompt_once(encoded: Counter[str]) -> None:
    fields = {"prompt": "a" * 40, "prompt_logprobs": 5, "n": 10, "best_of": 20, "max_tokens": 1}
    assert len(json.loads(content(ask(**fields)[0]))["choices"]) == 10
    assert encoded["ranked"] == 39


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_logprobs": 14},
        {"echo": True, "logprobs": 14},
        {"echo": True, "logprobs": 14, "stream": True},
    ],
    ids=str,
)
def test_a_large_response_is_sent_in_pieces_and_other_tasks_run_meanwhile(fields: dict[str, Any]) -> None:
    messages, ticks = ask(prompt="a" * 60, n=128, max_tokens=1, **fields)
    body = content(messages)
    assert len(body) > 16 * incremental.MIN_CHUNK_BYTES
    assert max(len(message["body"]) for message in messages[1:]) < 2 * incremental.MIN_CHUNK_BYTES
    assert ticks["after"] >= len(body) // (2 * incremental.MIN_CHUNK_BYTES)


def test_other_tasks_run_while_a_large_response_is_encoded() -> None:
    _, few = ask(prompt="a", max_tokens=1)
    messages, many = ask(prompt=["a" * 60] * 40, echo=True, logprobs=14, max_tokens=0)
    assert len(json.loads(content(messages))["choices"]) == 40
    assert many["before"] - few["before"] >= 40 * 60 // (2 * logprobs.SLICE_TOKENS)


def test_other_tasks_run_while_candidates_are_computed() -> None:
    _, few = ask(prompt="a", best_of=2, max_tokens=1)
    _, many = ask(prompt="a", best_of=2, max_tokens=61)
    assert many["before"] - few["before"] >= 60


def test_other_tasks_run_while_many_prompts_are_begun() -> None:
    _, few = ask(prompt=["a"], max_tokens=1)
    _, many = ask(prompt=["a"] * 640, max_tokens=1)
    assert many["before"] - few["before"] >= 20


def test_a_small_response_is_one_message() -> None:
    messages, _ = ask(prompt="a", n=2, logprobs=1)
    assert len(messages) == 2
    assert content(messages)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 128, "prompt_logprobs": 20}, "prompt_logprobs"),
        ({"n": 128, "logprobs": 20, "echo": True}, "logprobs"),
        ({"prompt": ["a"] * 2000, "logprobs": 14}, "logprobs"),
        ({"n": 128, "echo": True, "prompt": ["a" * 48] * 16}, "echo"),
        ({"n": 128, "max_tokens": 50, "prompt": "a"}, "n"),
        ({"n": 128, "return_token_ids": True}, "return_token_ids"),
    ],
)
def test_an_answer_above_the_limit_is_refused_before_any_work(fields: dict[str, Any], param: str) -> None:
    engine = Engine(text_script("Hello"), max_jobs=10**6)
    app = application(engine, keys=False, limits=RequestLimits(max_answer=50_000))
    request = {"prompt": "a" * 40, "max_tokens": 16} | fields
    head, body = asyncio.run(post(app, "/v1/completions", request, Counter()))
    error = json.loads(body["body"])["error"]
    assert (head["status"], error["param"], error["code"]) == (400, param, "answer_too_large")
    assert f"'{param}'" in error["message"]
    assert not engine.jobs


@pytest.mark.parametrize("most", [4000, 50_000])
def test_the_answer_to_a_batch_line_has_a_limit_of_its_own(most: int) -> None:
    """Each part of it is kept in memory and read once more, for the line of the output."""
    app = application(Engine(SCRIPT), keys=False, limits=RequestLimits(max_answer=most, max_batch_answer=4000))
    request = {"prompt": "a" * 10, "prompt_logprobs": 3, "max_tokens": 1}

    def statuses(n: int) -> list[int]:
        body = request | {"n": n}
        head, *_ = asyncio.run(post(app, "/v1/completions", body, Counter()))
        reply = asyncio.run(in_process_client(app)("POST", "/v1/completions", json.dumps(body).encode()))
        assert reply.status == 200 or json.loads(reply.body)["error"]["code"] == "answer_too_large"
        return [head["status"], reply.status]

    assert statuses(1) == [200, 200]
    assert statuses(4) == ([200, 400] if most > 4000 else [400, 400])


def test_line_ends_of_unicode_are_escaped_in_answers_and_events() -> None:
    for line_end in ("\u2028", "\u2029", "\x85"):
        for stream in (False, True):
            body = content(ask(prompt=f"a{line_end}b", echo=True, logprobs=1, max_tokens=1, stream=stream)[0])
            assert line_end.encode() not in body
            assert f"a\\u{ord(line_end):04x}b" in body.decode()
        answer = content(ask("/detokenize", tokens=list(line_end.encode()))[0])
        assert json.loads(answer) == {"prompt": line_end}
        assert line_end.encode() not in answer


@pytest.mark.parametrize("text", ["", "a", "é😀" * 50_000, "\ufffd"])
def test_a_detokenized_text_is_sent_in_pieces(text: str) -> None:
    messages, ticks = ask("/detokenize", tokens=list(text.encode()))
    assert json.loads(content(messages)) == {"prompt": text}
    assert max(len(message["body"]) for message in messages[1:]) < 2 * incremental.MIN_CHUNK_BYTES
    assert ticks["before"] >= len(text.encode()) // 2**14


@pytest.mark.parametrize("tokens", [[97] * 20_000 + [-1], [97] * 20_000 + [10**6], [97] * 20_000 + ["a"], "a", [[97]]])
def test_an_invalid_token_is_refused_at_any_position(tokens: Any) -> None:
    head, body = ask("/detokenize", tokens=tokens)[0]
    assert (head["status"], json.loads(body["body"])["error"]["param"]) == (400, "tokens")


def test_a_detokenized_text_above_the_response_limit_is_refused() -> None:
    head, body = ask("/detokenize", RequestLimits(max_answer=1000), tokens=[EOS] * 300)[0]
    assert (head["status"], json.loads(body["body"])["error"]["code"]) == (400, "answer_too_large")


# ---- usage in chunks


@pytest.mark.parametrize(
    ("options", "with_usage"),
    [
        ({"continuous_usage_stats": True}, 0),
        ({"continuous_usage_stats": True, "include_usage": False}, 0),
        ({"continuous_usage_stats": True, "include_usage": True}, 4),
        ({"include_usage": True}, 1),
    ],
)
def test_continuous_usage_needs_usage(options: dict[str, bool], with_usage: int) -> None:
    body = content(ask(prompt="a", max_tokens=3, stream=True, stream_options=options)[0])
    assert body.count(b'"usage":{') == with_usage
