"""The settings panel: all API fields, requests with only changed fields, and the request as curl and Python."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from playwright.sync_api import expect

from .page_driver import BEGINNING, PageDriver

ELSEWHERE = {"model", "prompt", "suffix", "stream_options"}  # the document, the list of models, the page itself
NOT_OFFERED = {
    *("input_extra", "prediction"),  # the page has one document, and does not know what comes next
    *("json_schema", "response_format", "structured_outputs"),  # no control for objects; the page offers `grammar`
    "repetition_detection",  # no control for objects
    "custom_token_bans",  # another form of `banned_tokens`
}


def schema(server: Any) -> dict[str, Any]:
    with server.http() as client:
        document: dict[str, Any] = client.get("/openapi.json").json()
        properties: dict[str, Any] = document["components"]["schemas"]["CompletionRequest"]["properties"]
        return properties


def test_every_field_of_the_server_can_be_set(driver: PageDriver, open_server: Any) -> None:
    names = set(driver.find("#fields .field label").all_text_contents())
    assert names == set(schema(open_server)) - ELSEWHERE - NOT_OFFERED | {"continuous_usage_stats"}


def test_a_strict_server_shows_only_its_own_fields(visit: Any, plain_server: Any) -> None:
    driver = visit(plain_server.url).open()
    names = set(driver.find("#fields .field label").all_text_contents())
    assert names == set(schema(plain_server)) - ELSEWHERE
    driver.write("a b")
    driver.scores()
    assert "prompt_logprobs" not in driver.asked[-1]
    driver.caret(1)
    expect(driver.find("#insert"), "this model cannot fill gaps").to_be_disabled()


def test_only_changed_fields_are_sent(driver: PageDriver, open_server: Any) -> None:
    driver.write(BEGINNING)
    driver.continues()
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    first = {"model": open_server.model, "prompt": BEGINNING, "max_tokens": 100, "temperature": 0.7, "logprobs": 5}
    assert driver.asked[-1] == first | streamed
    driver.write(BEGINNING)
    driver.continues(max_tokens=16, logprobs=None, temperature=1, top_p=1, stream=False)
    assert driver.asked[-1] == {"model": open_server.model, "prompt": BEGINNING}


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
        (
            {"allowed_token_ids": "13, 198", "logprob_token_ids": "7"},
            {"allowed_token_ids": [13, 198], "logprob_token_ids": [7]},
        ),
        (
            {"truncate_prompt_tokens": 2, "truncation_side": "right"},
            {"truncate_prompt_tokens": 2, "truncation_side": "right"},
        ),
        (
            {"dry_multiplier": 0.8, "dry_base": 2, "xtc_probability": 0.5, "typical_p": 0.9},
            {"dry_multiplier": 0.8, "dry_base": 2, "xtc_probability": 0.5, "typical_p": 0.9},
        ),
        ({"mirostat": 2, "mirostat_tau": 4.5}, {"mirostat": 2, "mirostat_tau": 4.5}),
        (
            {"skip_special_tokens": True, "spaces_between_special_tokens": False},
            {"skip_special_tokens": True, "spaces_between_special_tokens": False},
        ),
    ],
    ids="+".join,
)
def test_the_server_accepts_all_fields(driver: PageDriver, fields: Any, sent: dict[str, Any]) -> None:
    driver.write(BEGINNING)
    driver.continues(max_tokens=5, **fields)
    body = driver.asked[-1]
    assert {name: body.get(name) for name in sent} == sent


def test_usage_in_every_event_is_an_option_of_the_stream(driver: PageDriver) -> None:
    driver.write(BEGINNING)
    driver.continues(max_tokens=3, continuous_usage_stats=True)
    assert driver.asked[-1]["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


def test_stop_strings_are_a_list_with_line_ends(driver: PageDriver) -> None:
    driver.shows("settings")
    for text in (".", "\\n\\n"):
        driver.find("#field-stop").fill(text)
        driver.press("Enter")
    assert driver.find(".chips li span").all_inner_texts() == [".", "↵↵"]
    driver.write("Once upon a time")
    answer = driver.continues(max_tokens=60, seed=2)
    assert driver.asked[-1]["stop"] == [".", "\n\n"]
    assert "." not in answer
    driver.find(".chips button").first.click()
    driver.continues()
    assert driver.asked[-1]["stop"] == ["\n\n"]


def test_a_bias_is_set_by_text(driver: PageDriver, open_server: Any) -> None:
    driver.shows("settings")
    driver.find("#fields details summary").first.click()
    driver.find("#field-logit_bias").fill(" Lily")
    driver.press("Enter")
    driver.find(".biases input").fill("100")
    driver.write("A girl named")
    answer = driver.continues(max_tokens=4)
    with open_server.http() as client:
        ids = client.post("/tokenize", json={"prompt": " Lily", "add_special_tokens": False}).json()["tokens"]
    assert driver.asked[-1]["logit_bias"] == {str(token): 100 for token in ids}
    assert answer == " Lily" * 4


def test_reset_restores_the_initial_settings(driver: PageDriver) -> None:
    driver.set(temperature=0.3, n=2)
    driver.find("#reset").click()
    expect(driver.find("#field-temperature")).to_have_value("0.7")
    expect(driver.find("#field-n")).to_have_value("1")


def test_the_request_as_python_runs(driver: PageDriver, tmp_path: Any) -> None:
    prompt = 'It\'s "quoted" \\ here,\nand £ 日本. Once upon a time'
    driver.write(prompt)
    answer = driver.continues(max_tokens=12, seed=3, top_k=4)
    driver.press("Alt+ArrowLeft")
    driver.shows("request")
    expect(driver.find("#python")).to_contain_text("extra_body")
    script = tmp_path / "request.py"
    script.write_text(driver.find("#python").inner_text(), encoding="utf-8")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout == answer


def test_the_request_as_curl_runs_in_a_shell(driver: PageDriver) -> None:
    driver.write("It's here: Once upon a time")
    answer = driver.continues(max_tokens=12, seed=3, stream=False)
    driver.press("Alt+ArrowLeft")
    driver.shows("request")
    expect(driver.find("#curl")).to_contain_text("It'\\''s here")
    shell = ["bash", "-c", f"{driver.find('#curl').inner_text()} --silent --noproxy '*'"]
    run = subprocess.run(shell, capture_output=True, check=True, timeout=60)
    import json

    assert json.loads(run.stdout)["choices"][0]["text"] == answer
    driver.find('[data-copy="curl"]').click()
    expect(driver.find('[data-copy="curl"]')).to_have_text("Copied")


def test_the_last_response_is_shown_unchanged(driver: PageDriver) -> None:
    driver.write(BEGINNING)
    driver.continues(max_tokens=3)
    driver.shows("request")
    expect(driver.find("#answer")).to_contain_text('"object":"text_completion"')
