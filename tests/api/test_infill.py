"""`POST /infill` over HTTP: the same texts as `/v1/completions`, in llama-server's form."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from completion_requests import is_idle, one, problem, tokens_of, wait_until

GREEDY = {"samplers": ["temperature"], "temperature": 0}
GAP = {"input_prefix": "The dog\n", "prompt": "went ", "input_suffix": " home."}
Json = dict[str, Any]


def infill(http: httpx.Client, **body: Any) -> Json:
    response = http.post("/infill", json=GAP | GREEDY | {"n_predict": 12} | body)
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


def events(http: httpx.Client, **body: Any) -> list[Json]:
    response = http.post("/infill", json=GAP | GREEDY | {"n_predict": 12, "stream": True} | body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *found, rest = response.text.split("\n\n")
    assert rest == ""
    return [json.loads(event.removeprefix("data: ")) for event in found]


def test_the_text_is_that_of_a_completion_with_a_suffix(http: httpx.Client) -> None:
    for max_tokens in (1, 12):
        expected = one(
            http, prompt="The dog\nwent ", suffix=" home.", temperature=0, max_tokens=max_tokens, return_token_ids=True
        )
        answer = infill(http, n_predict=max_tokens, return_tokens=True)
        assert (answer["content"], answer["tokens"]) == (expected["text"], expected["token_ids"])
        assert answer["tokens_evaluated"] == len(expected["prompt_token_ids"])
        assert answer["tokens_predicted"] == len(expected["token_ids"])
        assert answer["stop_type"] == {"length": "limit", "stop": "eos"}[expected["finish_reason"]]


def test_a_seeded_sample_is_that_of_a_completion(http: httpx.Client) -> None:
    sampling = {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "seed": 11}
    expected = one(http, prompt="The dog\nwent ", suffix=" home.", max_tokens=12, **sampling)
    answer = infill(http, **sampling, samplers=["top_k", "top_p", "temperature"])
    assert answer["content"] == expected["text"]
    assert answer["generation_settings"]["seed"] == 11


def test_files_come_first_with_separators_where_the_model_has_them(files_client: httpx.Client) -> None:
    extra = [{"filename": "a.py", "text": "A = 1\n"}]
    expected = one(
        files_client,
        **{"prompt": "The dog\nwent ", "suffix": " home.", "input_extra": extra, "temperature": 0, "max_tokens": 12},
    )
    assert infill(files_client, input_extra=extra)["content"] == expected["text"]


def test_files_are_text_where_the_model_has_no_separators(http: httpx.Client) -> None:
    """The layout is that of llama-server: files, then the prompt in the usual layout."""
    extra = [{"filename": "a.py", "text": "One day "}, {"text": "a cat sat."}]
    text = "".join(f"\n\n--- snippet ---\n\n{file['text']}" for file in extra)
    laid_out = f"{text}<|fim_prefix|>The dog\nwent <|fim_suffix|> home.<|fim_middle|>"
    expected = one(http, prompt=laid_out, temperature=0, max_tokens=12)
    answer = infill(http, input_extra=extra)
    assert answer["content"] == expected["text"].partition("<|fim")[0]
    assert (
        answer["tokens_evaluated"]
        == sum(
            len(tokens_of(http, part))
            for part in (
                "\n\n--- snippet ---\n\nOne day ",
                "\n\n--- snippet ---\n\na cat sat.",
                "The dog\nwent ",
                " home.",
            )
        )
        + 3
    )


def test_names_of_special_tokens_are_text(http: httpx.Client) -> None:
    plain = infill(http, input_prefix="<|fim_middle|>")["tokens_evaluated"]
    assert plain > infill(http, input_prefix="")["tokens_evaluated"] + 1


def test_names_of_special_tokens_in_a_suffix_are_text(http: httpx.Client) -> None:
    """A file about tokenizers has such names. As tokens they would break the layout, which the server writes."""
    suffix = " <|fim_middle|><|endoftext|> home."
    body = {"prompt": "The dog went", "suffix": suffix, "temperature": 0, "max_tokens": 1}
    ids = one(http, **body, return_token_ids=True)["prompt_token_ids"]
    for name, count in (("<|fim_prefix|>", 1), ("<|fim_suffix|>", 1), ("<|fim_middle|>", 1), ("<|endoftext|>", 0)):
        (token,) = tokens_of(http, name)
        assert ids.count(token) == count
    spelled = http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert spelled == f"<|fim_prefix|>The dog went<|fim_suffix|>{suffix}<|fim_middle|>"


@pytest.mark.usefixtures("kernel_products")
def test_a_request_without_tokens_fills_the_prefix_cache(files_client: httpx.Client) -> None:
    extra = [{"filename": "warm.py", "text": "C = 3\n" * 20}]  # no other test has a file with this first letter
    warm = {"input_prefix": "", "input_suffix": "", "prompt": "", "input_extra": extra, "n_predict": 0, "samplers": []}
    answer = infill(files_client, **warm)
    assert (answer["content"], answer["tokens_predicted"], answer["timings"]["cache_n"]) == ("", 0, 0)
    cached = infill(files_client, input_extra=extra)["timings"]["cache_n"]
    assert cached == len(tokens_of(files_client, "warm.py\n" + extra[0]["text"]))
    assert infill(files_client, input_extra=extra, cache_prompt=False)["timings"]["cache_n"] == 0


def test_the_events_of_a_stream_add_up_to_the_response(http: httpx.Client) -> None:
    whole = infill(http, return_tokens=True)
    *parts, last = events(http, return_tokens=True)
    assert "".join(part["content"] for part in parts) == whole["content"]
    assert [token for part in parts for token in part["tokens"]][: whole["tokens_predicted"]]
    assert [part["stop"] for part in parts] == [False] * len(parts)
    assert parts[-1]["tokens_predicted"] <= last["tokens_predicted"]
    for name in ("tokens_predicted", "tokens_evaluated", "stop_type", "stop", "truncated", "tokens_cached"):
        assert last[name] == whole[name]
    assert last["content"] == ""


def test_several_middles_are_an_array(http: httpx.Client) -> None:
    sampling = {"samplers": ["top_k", "top_p", "temperature"], "temperature": 1.5, "seed": 2, "n_cmpl": 3}
    response = http.post("/infill", json=GAP | {"n_predict": 12} | sampling)
    found = response.json()
    assert [middle["index"] for middle in found] == [0, 1, 2]
    assert len({middle["content"] for middle in found}) > 1
    streamed = events(http, **sampling)
    for index, middle in enumerate(found):
        assert "".join(each["content"] for each in streamed if each["index"] == index) == middle["content"]
    assert sum(each["stop"] for each in streamed) == 3


def test_a_stop_string_and_the_reason_are_named(http: httpx.Client) -> None:
    whole = infill(http, ignore_eos=True)["content"]
    stop = whole[-3:]
    answer = infill(http, ignore_eos=True, stop=[stop])
    expected = (whole[: whole.index(stop)], "word", stop)
    assert (answer["content"], answer["stop_type"], answer["stopping_word"]) == expected


def test_a_length_of_minus_one_fills_the_context(files_client: httpx.Client) -> None:
    context = files_client.get("/v1/models").json()["data"][0]["max_model_len"]
    for length in (-1, 10_000):
        answer = infill(files_client, n_predict=length, ignore_eos=True, stop=[])
        assert answer["tokens_evaluated"] + answer["tokens_predicted"] == context
        assert (answer["truncated"], answer["stop_type"]) == (True, "limit")
        assert answer["generation_settings"]["n_ctx"] == context
    assert not infill(files_client, n_predict=4, ignore_eos=True)["truncated"]


def test_response_fields_select_members_by_their_paths(http: httpx.Client) -> None:
    names = ["content", "timings/predicted_n", "no/such", "timings"]
    answer = infill(http, response_fields=names)
    assert answer.keys() == {"content", "timings/predicted_n", "timings"}
    assert answer["timings/predicted_n"] == answer["timings"]["predicted_n"]
    assert infill(http, response_fields=[""]) == {}


def test_errors_have_the_form_of_all_errors(http: httpx.Client, no_infill_client: httpx.Client) -> None:
    error = problem(no_infill_client.post("/infill", json=GAP), 400)
    assert error["message"].startswith("Infill is not supported by this model")
    assert problem(http.post("/infill", json={"input_prefix": ""}), 400)["param"] == "input_suffix"
    error = problem(http.post("/infill", json=GAP | {"input_prefix": "word " * 5000}), 400)
    assert "maximum context length" in error["message"]
    assert problem(http.post("/infill", json=GAP | {"model": "other"}), 404)["code"] == "model_not_found"


def test_a_disconnect_frees_the_sequence(files_client: httpx.Client) -> None:
    body = GAP | {"n_predict": -1, "ignore_eos": True, "stream": True}
    with files_client.stream("POST", "/infill", json=body) as response:
        next(response.iter_lines())
    wait_until(lambda: is_idle(files_client))


def test_long_prompts_are_shortened_only_with_the_option(serve: Any, http: httpx.Client) -> None:
    long = {"input_prefix": "Once upon a time.\n" * 2000, "input_suffix": "They went home.\n" * 2000}
    assert "maximum context length" in problem(http.post("/infill", json=long | {"n_predict": 8}), 400)["message"]
    with serve("--infill-trim", "--parallel", "2", "--context", "256", key=None) as server, server.http() as client:
        assert 128 < infill(client, **long, n_predict=8)["tokens_evaluated"] <= 248
        body = {"prompt": long["input_prefix"], "suffix": long["input_suffix"], "max_tokens": 8}
        assert 128 < client.post("/v1/completions", json=body).json()["usage"]["prompt_tokens"] <= 245
        problem(client.post("/v1/completions", json={"prompt": long["input_prefix"]}), 400)
