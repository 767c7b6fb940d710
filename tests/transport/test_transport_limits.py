"""Limits: every limit is listed, can be set by name, and is applied to requests."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from click.testing import CliRunner

from afterword.cli import main
from afterword.completion.request import parse
from afterword.completion.request_limits import RequestLimits
from afterword.engine.parent.job_queue import QueuePolicy
from afterword.errors import RequestError, SettingError
from afterword.settings import limit_table
from afterword.transport.transport_limits import TransportLimits

TABLES = (RequestLimits(), TransportLimits(), QueuePolicy())


def printed(*words: str) -> str:
    result = CliRunner().invoke(main, ["serve", *words, "--print-limits"], prog_name="afterword")
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_limit_is_listed_once_under_its_name() -> None:
    names = [row.name for row in limit_table.limit_entries(*TABLES)]
    assert len(set(names)) == len(names)
    assert all(any(line.startswith(f"{name} ") for line in printed().splitlines()) for name in names)
    unlisted = {field.name for table in TABLES for field in fields(table)} - set(names)
    assert unlisted == {"strict", "ignore_unknown"}


@pytest.mark.parametrize("row", list(limit_table.limit_entries(*TABLES)), ids=lambda row: row.name)
def test_every_limit_can_be_set(row: limit_table.LimitEntry) -> None:
    assert f"{row.name:<22} {'77':>10}" in printed("--limit", f"{row.name}=77")


@pytest.mark.parametrize("words", [["--max-logprobs", "7"], ["--limit", "max_logprobs=7"]])
def test_an_explicit_limit_overrides_strict(words: list[str]) -> None:
    found = printed("--strict", *words)
    assert f"{'max_logprobs':<22} {'7':>10}" in found
    assert f"{'max_stop':<22} {'4':>10}" in found
    assert f"{'max_logprobs':<22} {'7':>10}" in printed("--max-logprobs", "9", "--limit", "max_logprobs=7")


def test_addresses_are_limited_where_other_machines_can_connect() -> None:
    assert f"{'max_per_peer':<22} {'-':>10}" in printed()
    assert f"{'max_per_peer':<22} {'64':>10}" in printed("--host", "0.0.0.0", "--api-key", "some-key")


@pytest.mark.parametrize(
    "words", ["max_n", "max_n=", "max_n=x", "max_n=-1", "max_n=nan", "max_n=1.5", "no_such=1", "strict=1"]
)
def test_an_invalid_limit_gives_a_message_of_one_line(words: str) -> None:
    result = CliRunner().invoke(main, ["serve", "--limit", words, "--print-limits"], prog_name="afterword")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "--limit" in result.stderr


def test_seconds_may_be_fractions() -> None:
    assert limit_table.with_limits(TransportLimits(), {"head_seconds": 0.5}).head_seconds == 0.5
    with pytest.raises(SettingError):
        limit_table.check_all_used({"rest": 1})


# ---- a request as a whole


def refusal(limits: RequestLimits, **body: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(json.dumps(body).encode(), limits)
    assert caught.value.status == 400
    assert len(caught.value.message) < 500
    return caught.value


def test_prompts_and_candidates_count_as_a_product() -> None:
    few = RequestLimits(max_completions=100)
    assert refusal(few, prompt=["a"] * 11, n=10).param == "prompt"
    assert refusal(few, prompt=["a"] * 11, best_of=10).param == "prompt"
    assert refusal(few, prompt=[[1]] * 101).param == "prompt"
    parse(json.dumps({"prompt": ["a"] * 10, "n": 10}).encode(), few)


def test_tokens_count_as_a_whole() -> None:
    few = RequestLimits(max_request_tokens=100)
    assert refusal(few, prompt=["a"] * 3, n=2, max_tokens=20).param == "max_tokens"
    assert refusal(few, prompt=["a"], best_of=3, max_tokens=50).param == "max_tokens"
    assert refusal(few, prompt=[1] * 90, max_tokens=11).param == "prompt"
    assert refusal(few, prompt=[[1] * 60, [1] * 60], max_tokens=1).param == "prompt"
    parse(json.dumps({"prompt": ["a"] * 5, "n": 2, "max_tokens": 10}).encode(), few)


def test_a_refused_request_costs_no_memory() -> None:
    """A body of 12 kB that requests 16 million choices is refused before anything is allocated for them."""
    assert "2048" in refusal(RequestLimits(max_n=16384), prompt=["a"] * 1024, n=16384).message


@pytest.mark.parametrize(("field", "length"), [("model", 256), ("user", 256), ("cache_salt", 1024)])
def test_names_have_a_length(field: str, length: int) -> None:
    parse(json.dumps({field: "é" * length}).encode(), RequestLimits())
    error = refusal(RequestLimits(), **{field: "é" * (length + 1)})
    assert (error.param, error.code) == (field, "string_above_max_length")


# ---- JSON


@pytest.mark.parametrize(
    "body",
    [
        b'{"n":1,"n":2}',
        b'{"n":1,"\\u006e":2}',
        b'{"n" : 1 , "n"\t:\n2}',
        b'{"logit_bias":{"1":1,"1":2}}',
        b'{"stream":true,"stream_options":{"include_usage":true,"include_usage":false}}',
        b'{"x":[{"a":1,"a":2}]}',
        b'{"prompt":"a:b","n":1,"n":2}',
        b'{"a\\\\":1,"a\\\\":2}',
    ],
)
def test_a_key_that_comes_twice_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="key twice"):
        parse(body, RequestLimits(ignore_unknown=True))


@pytest.mark.parametrize("prompt", ["a:b", '"n":1', '{"n":1,"n":2}', "::::", '\\"n\\":1', "a\\", "é:é"])
def test_a_string_that_looks_like_a_member_is_accepted(prompt: str) -> None:
    assert parse(json.dumps({"n": 2, "prompt": prompt}).encode(), RequestLimits()).prompt == (prompt,)


@pytest.mark.parametrize("depth", [100, 900, 2_000, 100_000])
def test_deeply_nested_json_is_refused(depth: int) -> None:
    for body in (b"[" * depth + b"]" * depth, b'{"x":' * depth + b"1" + b"}" * depth):
        with pytest.raises(RequestError):
            parse(b'{"prompt":"a:b","y":' + body + b"}", RequestLimits())
