"""OpenAI's official Python client against a real server."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest
from completion_requests import is_idle, tokens_of, wait_until

STORY = "Once upon a time"


def test_all_forms_of_a_prompt_are_accepted(client: openai.OpenAI, server: Any, http: httpx.Client) -> None:
    ids = tokens_of(http, STORY)
    for prompt, count in ((STORY, 1), ([STORY, "The dog"], 2), (ids, 1), ([ids, ids[:1]], 2), (None, 1)):
        answer = client.completions.create(model=server.model, prompt=prompt, max_tokens=4)
        assert [choice.index for choice in answer.choices] == list(range(count))


def test_the_best_n_are_returned(client: openai.OpenAI, server: Any) -> None:
    answer = client.completions.create(model=server.model, prompt=STORY, n=3, best_of=5, max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


def test_a_prompt_is_scored(client: openai.OpenAI, server: Any) -> None:
    answer = client.completions.create(model=server.model, prompt=STORY, echo=True, logprobs=5, max_tokens=0)
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text == "".join(logprobs.tokens) == STORY
    assert logprobs.token_logprobs[0] is logprobs.top_logprobs[0] is None
    assert all(5 <= len(top) <= 6 for top in logprobs.top_logprobs[1:])
    assert answer.usage.completion_tokens == 0


def test_a_stream_ends_with_its_usage(client: openai.OpenAI, server: Any) -> None:
    body: dict[str, Any] = {"model": server.model, "prompt": STORY, "temperature": 0}
    with client.completions.create(**body, stream=True, stream_options={"include_usage": True}) as stream:
        *chunks, last = stream
    whole = client.completions.create(**body)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert last.usage == whole.usage


def test_the_asynchronous_client_is_served(server: Any) -> None:
    async def ask() -> tuple[str, str]:
        body: dict[str, Any] = {"model": server.model, "prompt": STORY, "temperature": 0}
        async with (
            openai.DefaultAsyncHttpxClient(trust_env=False) as transport,
            openai.AsyncOpenAI(
                base_url=f"{server.url}/v1", api_key=server.key, max_retries=0, http_client=transport
            ) as client,
        ):
            whole = await client.completions.create(**body)
            async with await client.completions.create(**body, stream=True) as stream:
                return whole.choices[0].text, "".join([chunk.choices[0].text async for chunk in stream])

    whole, streamed = asyncio.run(ask())
    assert whole == streamed


def test_a_refusal_names_the_field(client: openai.OpenAI, server: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=server.model, prompt="a", temperature=3)
    assert (caught.value.param, caught.value.code) == ("temperature", "decimal_above_max_value")
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id.startswith("req_")


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="no-such", prompt="a")
    assert caught.value.code == "model_not_found"
    assert caught.value.request_id.startswith("req_")


def test_a_wrong_key_is_an_authentication_error(client: openai.OpenAI, server: Any) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key="sk-not-this-one-at-all").completions.create(model=server.model, prompt="a")
    assert caught.value.code == "invalid_api_key"
    assert caught.value.request_id.startswith("req_")


def test_leaving_a_stream_frees_its_sequences(
    client: openai.OpenAI, server: Any, http: httpx.Client, endless: dict[str, int]
) -> None:
    max_tokens = http.get("/tokenizer_info").json()["model_max_length"] - len(tokens_of(http, STORY))
    with client.completions.create(
        model=server.model, prompt=STORY, n=4, max_tokens=max_tokens, logit_bias=endless, stream=True
    ) as stream:
        for _ in stream:
            break
    wait_until(lambda: is_idle(http))


def test_models_are_listed_and_retrieved(client: openai.OpenAI, server: Any) -> None:
    (model,) = client.models.list()
    assert model.id == server.model
    assert client.models.retrieve(server.model) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such")


def test_headers_can_be_read(client: openai.OpenAI, server: Any) -> None:
    raw = client.completions.with_raw_response.create(model=server.model, prompt="a", max_tokens=1)
    assert raw.headers["x-request-id"] == raw.request_id
    assert raw.headers["openai-version"] == "2020-10-01"
    assert raw.headers["openai-processing-ms"].isdigit()
    assert raw.parse().object == "text_completion"
