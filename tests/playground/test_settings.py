"""The panel: every field of the API, only what was set is sent, and the request as others would write it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from playwright.sync_api import expect

from .page_driver import BEGINNING, PageDriver

ELSEWHERE = {"model", "prompt", "suffix", "stream_options"}  # the document, the list of models, the page itself


def schema(server: Any) -> dict[str, Any]:
    with server.http() as client:
        document: dict[str, Any] = client.get("/openapi.json").json()
        properties: dict[str, Any] = document["components"]["schemas"]["CompletionRequest"]["properties"]
        return properties


def test_every_field_that_the_server_knows_can_be_set(visitor: PageDriver, open_server: Any) -> None:
    names = set(visitor.find("#fields .field label").all_text_contents())
    assert names == set(schema(open_server)) - ELSEWHERE | {"continuous_usage_stats"}


def test_a_strict_server_is_offered_only_its_own_fields(visit: Any, plain_server: Any) -> None:
    visitor = visit(plain_server.url).open()
    names = set(visitor.find("#fields .field label").all_text_contents())
    assert names == set(schema(plain_server)) - ELSEWHERE
    visitor.write("a b")
    visitor.scores()
    assert "prompt_logprobs" not in visitor.asked[-1]
    visitor.caret(1)
    expect(visitor.find("#insert"), "this model cannot fill gaps").to_be_disabled()


def test_only_what_differs_from_the_api_is_sent(visitor: PageDriver, open_server: Any) -> None:
    visitor.write(BEGINNING)
    visitor.continues()
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    first = {"model": open_server.model, "prompt": BEGINNING, "max_tokens": 100, "logprobs": 5}
    assert visitor.asked[-1] == first | streamed
    visitor.write(BEGINNING)
    visitor.continues(max_tokens=16, logprobs=None, temperature=1, top_p=1, stream=False)
    assert visitor.asked[-1] == {"model": open_server.model, "prompt": BEGINNING}


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        ({"temperature": 0.5, "top_p": 0.9, "seed": 0}, {"temperature": 0.5, "top_p": 0.9, "seed": 0}),
        ({"presence_penalty": 0.5, "frequency_penalty": -1}, {"presence_penalty": 0.5, "frequency_penalty": -1}),
        ({"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}, {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}),
        ({"min_tokens": 3, "ignore_eos": True}, {"min_tokens": 3, "ignore_eos": True}),
        ({"add_special_tokens": False, "user": "me"}, {"add_special_tokens": False, "user": "me"}),
        ({"cache_salt": "s", "stop_token_ids": "13, 198"}, {"cache_salt": "s", "stop_token_ids": [13, 198]}),
        ({"return_token_ids": True, "prompt_logprobs": 2}, {"return_token_ids": True, "prompt_logprobs": 2}),
        ({"best_of": 2}, {"best_of": 2}),
    ],
    ids="+".join,
)
def test_fields_reach_the_server_and_it_takes_them(visitor: PageDriver, fields: Any, sent: dict[str, Any]) -> None:
    visitor.write(BEGINNING)
    visitor.continues(max_tokens=5, **fields)
    body = visitor.asked[-1]
    assert {name: body.get(name) for name in sent} == sent


def test_usage_in_every_event_is_an_option_of_the_stream(visitor: PageDriver) -> None:
    visitor.write(BEGINNING)
    visitor.continues(max_tokens=3, continuous_usage_stats=True)
    assert visitor.asked[-1]["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


def test_stop_strings_are_a_list_with_line_ends(visitor: PageDriver) -> None:
    visitor.shows("settings")
    for text in (".", "\\n\\n"):
        visitor.find("#field-stop").fill(text)
        visitor.press("Enter")
    assert visitor.find(".chips li span").all_inner_texts() == [".", "↵↵"]
    visitor.write("Once upon a time")
    answer = visitor.continues(max_tokens=60, seed=2)
    assert visitor.asked[-1]["stop"] == [".", "\n\n"]
    assert "." not in answer
    visitor.find(".chips button").first.click()
    visitor.continues()
    assert visitor.asked[-1]["stop"] == ["\n\n"]


def test_bias_is_given_by_text(visitor: PageDriver, open_server: Any) -> None:
    visitor.shows("settings")
    visitor.find("#fields details summary").first.click()
    visitor.find("#field-logit_bias").fill(" Lily")
    visitor.press("Enter")
    visitor.find(".biases input").fill("100")
    visitor.write("A girl named")
    answer = visitor.continues(max_tokens=4)
    with open_server.http() as client:
        ids = client.post("/tokenize", json={"prompt": " Lily", "add_special_tokens": False}).json()["tokens"]
    assert visitor.asked[-1]["logit_bias"] == {str(token): 100 for token in ids}
    assert answer == " Lily" * 4


def test_reset_goes_back_to_where_the_page_began(visitor: PageDriver) -> None:
    visitor.set(temperature=0.3, n=2)
    visitor.find("#reset").click()
    expect(visitor.find("#field-temperature")).to_have_value("1")
    expect(visitor.find("#field-n")).to_have_value("1")


def test_the_request_as_python_runs(visitor: PageDriver, tmp_path: Any) -> None:
    prompt = 'It\'s "quoted" \\ here,\nand £ 日本. Once upon a time'
    visitor.write(prompt)
    answer = visitor.continues(max_tokens=12, seed=3, top_k=4)
    visitor.press("Alt+ArrowLeft")
    visitor.shows("request")
    expect(visitor.find("#python")).to_contain_text("extra_body")
    script = tmp_path / "request.py"
    script.write_text(visitor.find("#python").inner_text(), encoding="utf-8")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout == answer


def test_the_request_as_curl_is_what_a_shell_understands(visitor: PageDriver) -> None:
    visitor.write("It's here: Once upon a time")
    answer = visitor.continues(max_tokens=12, seed=3, stream=False)
    visitor.press("Alt+ArrowLeft")
    visitor.shows("request")
    expect(visitor.find("#curl")).to_contain_text("It'\\''s here")
    shell = ["bash", "-c", f"{visitor.find('#curl').inner_text()} --silent --noproxy '*'"]
    run = subprocess.run(shell, capture_output=True, check=True, timeout=60)
    import json

    assert json.loads(run.stdout)["choices"][0]["text"] == answer
    visitor.find('[data-copy="curl"]').click()
    expect(visitor.find('[data-copy="curl"]')).to_have_text("Copied")


def test_the_last_answer_can_be_read_raw(visitor: PageDriver) -> None:
    visitor.write(BEGINNING)
    visitor.continues(max_tokens=3)
    visitor.shows("request")
    expect(visitor.find("#answer")).to_contain_text('"object":"text_completion"')
