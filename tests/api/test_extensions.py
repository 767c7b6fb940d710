"""Extension fields over HTTP, each with a required effect; and the options `--strict` and `--ignore-unknown`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from completion_requests import one


def ask(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post("/v1/completions", json={"prompt": "Once upon a time", "max_tokens": 12, "seed": 3} | body)


def choice(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = ask(http, **body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["choices"][0]
    return found


def eos(http: httpx.Client) -> int:
    return int(http.get("/tokenizer_info").json()["eos_token_id"])


def test_top_k_1_is_greedy(http: httpx.Client) -> None:
    assert choice(http, top_k=1)["text"] == choice(http, temperature=0)["text"]
    assert choice(http, top_k=0)["text"] == choice(http)["text"]


def test_min_p_1_is_greedy(http: httpx.Client) -> None:
    assert choice(http, min_p=1)["text"] == choice(http, temperature=0)["text"]


def test_a_repetition_penalty_changes_what_repeats(http: httpx.Client) -> None:
    prompt = "the the the the the the the the"
    plain = choice(http, prompt=prompt, temperature=0, max_tokens=40)
    assert choice(http, prompt=prompt, temperature=0, max_tokens=40, repetition_penalty=2.0)["text"] != plain["text"]


def test_ignore_eos_continues_until_max_tokens(http: httpx.Client) -> None:
    forced = {"logit_bias": {str(eos(http)): 100}}
    assert choice(http, **forced)["finish_reason"] == "stop"
    assert choice(http, **forced, ignore_eos=True)["finish_reason"] == "length"


def test_min_tokens_delays_the_end_token(http: httpx.Client) -> None:
    answer = choice(http, logit_bias={str(eos(http)): 100}, min_tokens=5, return_token_ids=True)
    assert len(answer["token_ids"]) == 6
    assert answer["token_ids"][-1] == eos(http)
    assert answer["finish_reason"] == "stop"


def test_stop_token_ids_end_the_text_before_the_token(http: httpx.Client) -> None:
    ids = choice(http, return_token_ids=True)["token_ids"]
    answer = choice(http, stop_token_ids=[ids[4]], return_token_ids=True)
    first = ids.index(ids[4])
    assert (answer["token_ids"], answer["finish_reason"]) == (ids[: first + 1], "stop")
    assert answer["text"] == http.post("/detokenize", json={"tokens": ids[:first]}).json()["prompt"]


def test_return_token_ids_adds_ids_of_prompt_and_completion(http: httpx.Client) -> None:
    answer = choice(http, return_token_ids=True)
    assert answer["prompt_token_ids"] == http.post("/tokenize", json={"prompt": "Once upon a time"}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": answer["token_ids"]}).json()["prompt"] == answer["text"]
    assert "token_ids" not in choice(http)


def test_prompt_logprobs_equal_those_of_an_echo(http: httpx.Client) -> None:
    answer = choice(http, prompt_logprobs=2, echo=True, logprobs=2)
    first, *rest = answer["prompt_logprobs"]
    assert first is None
    for entries, logprob in zip(rest, answer["logprobs"]["token_logprobs"][1:], strict=False):
        assert next(iter(entries.values()))["logprob"] == logprob
        assert sorted(entry["rank"] for entry in entries.values())[:2] == [1, 2]


def test_add_special_tokens_false_omits_the_bos(bos_client: httpx.Client) -> None:
    bos = bos_client.get("/tokenizer_info").json()["bos_token_id"]
    assert choice(bos_client, prompt="a", return_token_ids=True)["prompt_token_ids"][0] == bos
    bare = choice(bos_client, prompt="a", return_token_ids=True, add_special_tokens=False)
    assert bos not in bare["prompt_token_ids"]


def test_continuous_usage_grows_with_the_stream(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "Once", "max_tokens": 5, "ignore_eos": True, "stream": True, "stream_options": options}
    lines = http.post("/v1/completions", json=body).text.split("\n\n")
    usages = [httpx.Response(200, text=line[6:]).json()["usage"] for line in lines if line.startswith("data: {")]
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 5)


def cached(http: httpx.Client, **body: Any) -> int:
    return int(ask(http, **body).json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_usage_reports_cached_tokens(http: httpx.Client) -> None:
    story = "A wolf and a crow met at the well, and neither of them would let the other drink before the sun went down."
    assert cached(http, prompt=story) == 0
    tokens = ask(http, prompt=story, max_tokens=1).json()["usage"]["prompt_tokens"]
    assert cached(http, prompt=story) == tokens - 1
    # The last token of the story is cached too if the second prompt starts before the first has recomputed it.
    assert cached(http, prompt=[story, story + " Then"]) in (2 * tokens - 2, 2 * tokens - 1)


def test_cache_salts_separate_the_prefix_cache(http: httpx.Client) -> None:
    story = "The old ferryman counted his coins twice each night, once for himself and once for the river that fed him."
    assert cached(http, prompt=story) == 0
    assert cached(http, prompt=story, cache_salt="mine") == 0
    assert cached(http, prompt=story, cache_salt="mine") > 16


def test_scores_from_the_cache_are_equal(http: httpx.Client) -> None:
    story = {
        "prompt": "Three goats lived on a hill above the mill, and every one of them was afraid of the bridge.",
        "echo": True,
    }
    first = choice(http, **story, max_tokens=0, logprobs=3)
    assert choice(http, **story, max_tokens=0, logprobs=3)["logprobs"] == first["logprobs"]
    assert (
        choice(http, **story, max_tokens=0, logprobs=0)["logprobs"]["token_logprobs"]
        == first["logprobs"]["token_logprobs"]
    )
    longer = choice(http, **story, max_tokens=4, logprobs=3)["logprobs"]
    assert longer["token_logprobs"][: len(first["logprobs"]["tokens"])] == first["logprobs"]["token_logprobs"]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 0, "stop": "."},
        {"n": 2, "logprobs": 2},
        {"best_of": 3, "presence_penalty": 0.5, "top_p": 0.9},
        {"min_tokens": 60, "echo": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("changed", [False, True])
def test_a_prediction_changes_nothing_but_usage(http: httpx.Client, fields: dict[str, Any], changed: bool) -> None:
    plain = ask(http, **{"max_tokens": 80, **fields}).json()
    text = plain["choices"][0]["text"].removeprefix("Once upon a time")
    if changed:
        text = text.replace(" the ", " a ").replace("e", "i", 1)
    prediction = {"type": "content", "content": [{"type": "text", "text": text}]}
    predicted = ask(http, **{"max_tokens": 80, **fields}, prediction=prediction).json()
    assert predicted["choices"] == plain["choices"]
    assert predicted["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
    details = predicted["usage"]["completion_tokens_details"]
    accepted, rejected = (details[f"{kind}_prediction_tokens"] for kind in ("accepted", "rejected"))
    predicted_tokens = len(http.post("/tokenize", json={"prompt": text}).json()["tokens"])
    assert accepted + rejected <= predicted_tokens * max(fields.get("n", 1), fields.get("best_of", 1))
    assert accepted > (0 if changed or "stop" in fields else 10)
    assert details.keys() == plain["usage"]["completion_tokens_details"].keys()
    again = ask(http, **{"max_tokens": 80, **fields}, prediction=prediction).json()
    assert again["usage"]["completion_tokens_details"] == details


def test_a_streamed_prediction_has_the_same_events(http: httpx.Client) -> None:
    def texts(**more: Any) -> list[str]:
        events = ask(http, stream=True, max_tokens=60, temperature=0, **more).text.split("\n\n")
        return [json.loads(event[6:])["choices"][0]["text"] for event in events if event.startswith("data: {")]

    plain = texts()
    assert texts(prediction={"type": "content", "content": "".join(plain)}) == plain


@pytest.mark.parametrize("name", ["logit_processors", "guided_regex"])
def test_unsupported_fields_are_refused_by_name(http: httpx.Client, name: str) -> None:
    assert ask(http, **{name: {}}).json()["error"]["param"] == name


@pytest.fixture(scope="module")
def strict(serve: Any) -> Iterator[httpx.Client]:
    with serve("--strict", "--parallel", "2") as server, server.http() as client:
        yield client


def test_strict_applies_openais_limits(strict: httpx.Client) -> None:
    model = {"model": "afterword-tiny"}
    assert ask(strict).json()["error"]["message"] == "you must provide a model parameter"
    assert ask(strict, **model, top_k=5).status_code == 400
    assert ask(strict, **model, stop=["a", "b", "c", "d", "e"]).status_code == 400
    logprobs = one(strict, **model, prompt="Once", max_tokens=3, logprobs=15)["logprobs"]
    assert all(len(entry) in (5, 6) for entry in logprobs["top_logprobs"])


def test_only_strict_servers_leave_out_prompt_logprobs(strict: httpx.Client, http: httpx.Client) -> None:
    """Clients of vLLM read the member without having requested it."""
    body = {"model": "afterword-tiny", "n": 2, "max_tokens": 2}
    for each in ask(http, **body).json()["choices"]:
        assert [*each] == ["text", "index", "logprobs", "finish_reason", "prompt_logprobs"]
        assert each["prompt_logprobs"] is None
    for each in ask(strict, **body).json()["choices"]:
        assert [*each] == ["text", "index", "logprobs", "finish_reason"]
    assert "prompt_logprobs" not in ask(http, **body, stream=True).text
    assert choice(http, **body, prompt_logprobs=0)["prompt_logprobs"][0] is None


def test_unknown_fields_can_be_ignored_and_are_listed(serve: Any) -> None:
    with serve("--ignore-unknown", "--parallel", "2") as server, server.http() as client:
        response = ask(client, foo=1, **{"naïve\r\nset-cookie: a": 2})
        assert response.status_code == 200
        assert response.headers["x-afterword-ignored"] == "foo, na?ve??set-cookie: a"
        assert "set-cookie" not in response.headers
        assert "x-afterword-ignored" not in ask(client).headers


def test_the_model_object_states_its_promise(http: httpx.Client) -> None:
    assert http.get("/v1/models/afterword-tiny").json()["reproducible"] == "exact"


def test_input_extra_puts_files_before_the_prompt(files_client: httpx.Client, http: httpx.Client) -> None:
    files = [{"filename": "a.py", "text": "A = 1\n"}, {"text": "<|fim_middle|>"}]
    answer = choice(files_client, prompt="a = ", suffix="\n", input_extra=files, return_token_ids=True)
    read = files_client.post("/detokenize", json={"tokens": answer["prompt_token_ids"]}).json()["prompt"]
    assert read == (
        "<|repo_name|>myproject\n<|file_sep|>a.py\nA = 1\n<|file_sep|>tmp\n<|fim_middle|><|file_sep|>filename\n"
        "<|fim_prefix|>a = <|fim_suffix|>\n<|fim_middle|>"
    )
    assert files_client.get("/v1/models").json()["data"][0]["infill_files"]
    refused = ask(http, suffix="x", input_extra=files)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input_extra")


@pytest.mark.usefixtures("kernel_products")
def test_files_are_counted_and_cached(files_client: httpx.Client) -> None:
    files = [{"filename": "long.py", "text": "B = 2\n" * 20}]
    usage = ask(files_client, prompt="b", suffix="c", input_extra=files).json()["usage"]
    sent = sum(
        files_client.post("/tokenize", json={"prompt": text}).json()["count"]
        for text in ("long.py\n" + files[0]["text"], "b", "c")
    )
    assert usage["prompt_tokens"] == sent
    again = ask(files_client, prompt="another", suffix="d", input_extra=files).json()["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] == sent - 2
