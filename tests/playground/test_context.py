"""The end of the context: the oldest text is left out of the request if the writer wants that, and dimmed."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import expect

from .page_driver import PageDriver
from .test_storage import expect_http_error

LONG = "".join(f"This is line {i} of a text that is too long for the context of the model.\n" for i in range(260))
DIMMED = "() => CSS.highlights.has('unsent') ? [...CSS.highlights.get('unsent')].map(String).join('') : ''"


@pytest.fixture
def full(driver: PageDriver) -> PageDriver:
    """A text that is longer than the context, of which the oldest part is left out."""
    driver.shows("settings")
    driver.find("#pane-settings > details > summary").click()
    driver.find("#leave-out").check()
    driver.write(LONG)
    expect(driver.find("#cut")).to_be_visible()
    return driver


def tokens_of(server: Any, text: str) -> int:
    with server.http() as client:
        count: int = client.post("/tokenize", json={"prompt": text}).json()["count"]
        return count


def test_the_oldest_text_is_dimmed_and_not_sent(full: PageDriver, open_server: Any) -> None:
    full.continues(max_tokens=20, seed=1)
    prompt = full.asked[-1]["prompt"]
    assert prompt.startswith("This is line "), "it begins with a whole line"
    assert LONG.endswith(prompt)
    assert 2048 * 0.6 < tokens_of(open_server, prompt) <= 2048 - 20
    hidden = LONG.removesuffix(prompt)
    assert full.page.evaluate(DIMMED).replace("\n", "") == hidden.replace("\n", "")
    expect(full.find("#cut")).to_contain_text("Not sent")
    assert full.text.startswith(LONG), "the document is whole"
    assert full.mirrored == full.text
    expect(full.find("#context-text")).to_contain_text(f" / {2048:,}")
    expect(full.find("#context-text")).not_to_contain_text(f"{tokens_of(open_server, LONG):,}")


def test_the_next_request_begins_at_the_same_place(full: PageDriver) -> None:
    full.continues(max_tokens=20, seed=1)
    full.continues()
    first, second = (body["prompt"] for body in full.asked[-2:])
    assert second.startswith(first), "the server has the beginning in its prefix cache"
    full.shows("request")
    expect(full.find("#curl")).not_to_contain_text("This is line 0 ")


def test_the_line_is_at_the_cut(full: PageDriver) -> None:
    full.continues(max_tokens=4, seed=1)
    number = int(full.asked[-1]["prompt"].split()[3])
    line = full.find("#mirror .line").nth(number).bounding_box()
    cut = full.find("#cut").bounding_box()
    assert line is not None
    assert cut is not None
    assert abs(line["y"] - cut["y"]) < 8


def test_the_scores_are_those_of_what_is_sent(full: PageDriver, open_server: Any) -> None:
    full.scores()
    prompt = full.asked[-1]["prompt"]
    assert len(prompt) < len(LONG)
    with open_server.http() as client:
        body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1}
        tokens = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["tokens"]
    assert full.find("#mirror .first").count() == len(tokens)
    assert full.find("#mirror .stale").count() == 0
    assert full.text == LONG
    assert full.mirrored == LONG


def test_echo_adds_numbers_to_what_is_sent(full: PageDriver) -> None:
    full.continues(max_tokens=4, echo=True, seed=1)
    assert full.text.startswith(LONG)
    assert len(full.text) < len(LONG) + 60
    assert full.find("#mirror .you.first").count() > 1000
    assert full.find("#mirror .stale").count() == 0


def test_a_gap_is_filled_from_what_fits(full: PageDriver) -> None:
    full.set(max_tokens=6, seed=1)
    at = len(LONG) - 40
    full.caret(at)
    full.press("Control+Shift+Enter")
    full.ended()
    body = full.asked[-1]
    assert body["suffix"] == LONG[at:]
    assert LONG[:at].endswith(body["prompt"])
    assert full.text.startswith(LONG[:at])
    assert full.text.endswith(LONG[at:])


def test_a_text_that_fits_again_is_sent_whole(full: PageDriver) -> None:
    full.write("A short text.")
    expect(full.find("#cut")).to_be_hidden()
    full.continues(max_tokens=3)
    assert full.asked[-1]["prompt"] == "A short text."
    assert full.page.evaluate(DIMMED) == ""


def test_a_text_that_is_too_long_is_an_error_that_offers_it(driver: PageDriver) -> None:
    driver.write(LONG)
    driver.find("#go").click()
    expect(driver.find("#notice-text")).to_contain_text("maximum context length")
    assert driver.text == LONG
    driver.find("#offer").get_by_role("button", name="Leave out the oldest text").click()
    expect(driver.find("#cut")).to_be_visible()
    driver.continues(max_tokens=3)
    driver.page.reload()
    driver.ready()
    expect(driver.find("#leave-out"), "it is kept").to_be_checked()
    expect_http_error(driver, 400)
