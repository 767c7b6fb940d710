"""Tests of the bodies of vLLM's route for token ids."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest

from afterword.engine.http.failures import Broken, Malformed, Refused, TooFewAlternatives, Unavailable
from afterword.engine.http.wire import EventReader, most_bytes, read_part, request_body
from afterword.engine.protocol import Job, Sampling, Token
from afterword.engine.vllm.requests import SampleRequest, generated_tokens, sample_request, scored_tokens

JOB = Job(
    prompt=(3, 4, 5), samples=1, max_tokens=4, sampling=Sampling(), end_tokens=(7,), key=bytes(16), alternatives=2
)
VOCABULARY = 10


def request(**changes: Any) -> SampleRequest:
    return sample_request(1, msgspec.structs.replace(JOB, **changes), 0, VOCABULARY)


def body(stream: bool = True, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(request_body("m", request(**changes), VOCABULARY, stream=stream))
    return found


def entry(token: int, logprob: float = -1.0, rank: int | None = 1) -> dict[str, Any]:
    return {"token_id": token, "logprob": logprob, "rank": rank}


def listed(token: int, count: int = 3) -> list[int]:
    """A token and others: as many as are requested for two alternatives."""
    return [token, *(each for each in range(VOCABULARY) if each != token)][:count]


def choice(*ids: int, **fields: Any) -> dict[str, Any]:
    content = [entry(token) | {"top_logprobs": [entry(each) for each in listed(token)]} for token in ids]
    return {"index": 0, "token_ids": ids, "logprobs": {"content": content}, "finish_reason": None} | fields


def event(*ids: int, **fields: Any) -> bytes:
    return json.dumps({"choices": [choice(*ids, **fields)]}).encode()


def read(data: bytes, stream: bool = True, **changes: Any) -> Any:
    return read_part(data, request(**changes), VOCABULARY, stream=stream)


# ---- requests


def test_a_request_has_the_tokens_and_all_fields_of_the_sample():
    sampling = Sampling(0.5, 0.9, 40, 0.1, 1.5, -1.0, 1.2, ((3, 2.0),))
    sent = body(sampling=sampling)
    assert (sent["model"], sent["token_ids"], sent["stream"]) == ("m", [3, 4, 5], True)
    fields = sent["sampling_params"]
    assert fields["logit_bias"] == {"3": 2.0}
    assert (fields["max_tokens"], fields["stop_token_ids"], fields["ignore_eos"]) == (4, [7], True)
    assert fields["watermarking"] is False
    for name in ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"):
        assert fields[name] == getattr(sampling, name)


@pytest.mark.parametrize(("alternatives", "sent"), [(None, None), (0, 0), (2, 3), (9, 10), (50, 10)])
def test_one_more_alternative_is_requested_than_is_needed(alternatives, sent):
    """vLLM counts the sampled token among the alternatives that it lists."""
    assert body(alternatives=alternatives)["sampling_params"].get("logprobs") == sent


def test_scores_are_requested_with_one_token_and_never_in_a_stream():
    whole = body(stream=False, prompt_alternatives=2, min_tokens=3)["sampling_params"]
    assert (whole["prompt_logprobs"], whole["max_tokens"], whole["min_tokens"]) == (2, 1, 1)
    assert "prompt_logprobs" not in body(prompt_alternatives=2)["sampling_params"]


def test_each_token_of_a_whole_response_is_an_event_too():
    """The time between two events is limited, so an upstream that is slow but works must not be silent."""
    assert "stream_interval" in request(whole=True).fields
    assert "stream_interval" not in body(whole=True)["sampling_params"]


def test_a_namespace_is_a_salt_that_vllm_accepts_and_that_does_not_show_it():
    assert "cache_salt" not in body()
    salts = {body(namespace=name)["cache_salt"] for name in ("key/1", "x" * 1000, "a@b")}
    assert len(salts) == 3
    assert all(len(salt) <= 128 and salt.isalnum() for salt in salts)


# ---- the stream


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_events_are_found_however_the_bytes_are_split(size, end):
    stream = end.join([b"data: one", b"", b": a comment", b"data:two", b"", b"data: [DONE]", b"", b""])
    reader = EventReader(100)
    found = [data for at in range(0, len(stream), size) for data in reader.feed(stream[at : at + size])]
    assert found == [b"one", b"two", b"[DONE]"]


def test_an_event_that_is_too_long_is_refused():
    reader = EventReader(100)
    assert not list(reader.feed(b"data: " + b"x" * 90))
    with pytest.raises(Malformed, match="more than 100 bytes"):
        list(reader.feed(b"x" * 20))


def test_other_lines_than_events_are_refused():
    with pytest.raises(Malformed, match="is no event") as caught:
        list(EventReader(100).feed(b"<html>\n"))
    assert "<html>" in caught.value.quoted


def test_the_most_bytes_grow_with_what_is_requested():
    small = most_bytes(request(), stream=True)
    assert most_bytes(request(alternatives=1000), stream=True) > small
    scored = {"prompt": (3,) * 1000, "prompt_alternatives": 5}
    assert most_bytes(request(**scored), stream=False) > most_bytes(request(**scored), stream=True)


# ---- responses


def test_an_event_has_tokens_with_the_most_likely_alternatives():
    content = [entry(3, -2.0, 3) | {"top_logprobs": [entry(3, -2.0, 3), entry(5, -0.5), entry(6, -1.0, 2)]}]
    part = read(event(3, logprobs={"content": content}))
    assert generated_tokens(JOB, part.output) == [Token(3, -2.0, ((5, -0.5), (6, -1.0)))]
    assert part.reason == ""
    assert read(event(3, finish_reason="length")).reason == "length"


def test_a_last_event_may_have_no_token():
    part = read(event(finish_reason="abort"))
    assert (part.output.ids, part.reason) == ((), "abort")


def test_a_token_without_a_rank_has_no_finite_log_probability():
    content = [entry(3, -9999.0, None) | {"top_logprobs": []}]
    (alternatives,) = read(event(3, logprobs={"content": content})).output.alternatives
    assert math.isnan(dict(alternatives)[3])


def test_log_probabilities_that_were_not_requested_are_not_read():
    assert read(event(3), alternatives=None).output.alternatives is None


def test_a_whole_response_has_the_scores_of_the_prompt():
    rows = [None, {"4": {"logprob": -1.0, "rank": 1}}, {"5": {"logprob": -3.0, "rank": 2}, "6": {"logprob": -0.5}}]
    data = json.dumps({"choices": [choice(8)], "prompt_logprobs": rows}).encode()
    output = read(data, stream=False, prompt_alternatives=1).output
    job = msgspec.structs.replace(JOB, prompt_alternatives=1)
    assert scored_tokens(job, output.scores) == [Token(4, -1.0, ((4, -1.0),), 1), Token(5, -3.0, ((6, -0.5),), 2)]
    assert output.ids == (8,)


@pytest.mark.parametrize(
    ("code", "kind"), [(400, Refused), (404, Refused), (429, Unavailable), (503, Unavailable), (500, Broken)]
)
def test_an_error_in_a_stream_is_the_failure_that_its_code_means(code, kind):
    with pytest.raises(kind, match=f"^status {code}$") as caught:
        read(json.dumps({"error": {"message": "no\nluck", "type": "X", "param": None, "code": code}}).encode())
    assert caught.value.detailed == f"status {code}: no luck"


GARBAGE = [
    *(b"", b"{", b"[]", b"{}", b"null", b"\xff", b'"x"', b'{"choices": {}}', b'{"choices": []}'),
    *(event(10), event(-1), event(3, 3, 3, 3, 3), event(), event(3, 7, 3), event(3, index=1)),
    event(3, logprobs=None),
    event(3, logprobs={"content": [entry(4)]}),
    event(3, logprobs={"content": [entry(3) | {"top_logprobs": [entry(99)]}]}),
    event(3, logprobs={"content": [{"token_id": 3, "logprob": None}]}),
    event(3, logprobs={"content": [entry(3, 1.0)]}),
    event(3, logprobs={"content": [entry(3, -1e9)]}),
    event(3, logprobs={"content": [entry(3)]}).replace(b"-1.0", b"1e999"),
    json.dumps({"choices": [choice(3), choice(3)]}).encode(),
    json.dumps({"error": "text"}).encode(),
    b'{"choices":' + b"[" * 100_000,
]


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_refused(data):
    with pytest.raises(Malformed):
        read(data)


@pytest.mark.parametrize(("alternatives", "count"), [(0, 1), (2, 3), (8, 9), (9, 10), (50, 10)])
def test_as_many_alternatives_come_back_as_were_requested(alternatives, count):
    def data(count: int) -> bytes:
        content = entry(3) | {"top_logprobs": [entry(each) for each in listed(3, count)]}
        return event(3, logprobs={"content": [content]})

    assert len(read(data(count), alternatives=alternatives).output.alternatives[0]) == count
    if count > 1:
        with pytest.raises(TooFewAlternatives):
            read(data(count - 1), alternatives=alternatives)


def test_as_many_alternatives_of_prompt_tokens_come_back_as_were_requested():
    def data(count: int) -> bytes:
        rows = [{str(each): {"logprob": -1.0, "rank": 1} for each in listed(token, count)} for token in (4, 5)]
        return json.dumps({"choices": [choice(8)], "prompt_logprobs": [None, *rows]}).encode()

    assert read(data(3), stream=False, prompt_alternatives=3).output.scores
    with pytest.raises(TooFewAlternatives):
        read(data(2), stream=False, prompt_alternatives=3)


@pytest.mark.parametrize(
    "rows",
    [
        None,
        [],
        [None, None, None],
        [None, {"4": {"logprob": -1.0, "rank": 1}}],
        [None, {"9": {"logprob": -1.0, "rank": 1}}, None],
        [None, *({str(token): {"logprob": -1.0, "rank": rank}} for token, rank in ((4, 1), (5, None)))],
        [None, *({str(token): {"logprob": -1.0, "rank": rank}} for token, rank in ((4, 1), (5, 11)))],
        [None, *({str(token): {"logprob": value, "rank": 1}} for token, value in ((4, -1.0), (5, 7.0)))],
    ],
)
def test_scores_of_another_prompt_are_refused(rows):
    data = json.dumps({"choices": [choice(8)], "prompt_logprobs": rows}).encode()
    with pytest.raises(Malformed):
        read(data, stream=False, prompt_alternatives=1)
