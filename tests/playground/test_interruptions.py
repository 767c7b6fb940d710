"""What the page says when a server dies, when a model ends a text at once, and while the server is busy."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from playwright.sync_api import Route, expect

from .breakable import breakable
from .page_driver import BEGINNING, PageDriver
from .test_storage import expect_http_error

MARK = "(node) => getComputedStyle(node, '::after').content"
SCROLLED = "() => document.querySelector('#page').scrollTop"


def expect_network_errors(driver: PageDriver) -> None:
    """Remove the browser's console messages about a connection that the test broke."""
    found = [line for line in driver.problems if "net::ERR_" in line]
    assert found
    driver.problems[:] = [line for line in driver.problems if line not in found]


def respond(driver: PageDriver, *choices: dict[str, Any], end: bool = True) -> None:
    """Answer completions with a stream of one event for each choice."""
    defaults = {"index": 0, "text": "", "logprobs": None, "finish_reason": None}
    body = "".join(f"data: {json.dumps({'choices': [defaults | choice]})}\n\n" for choice in choices)
    body += "data: [DONE]\n\n" if end else ""
    driver.page.route("**/v1/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def test_a_server_that_dies_in_mid_stream_is_said_and_the_text_is_marked(visit: Any, open_server: Any) -> None:
    with breakable(open_server.url) as connection:
        driver = visit(connection.url).open()
        driver.begins_endless()
        connection.break_off()
        driver.expect_status("Unfinished. The text that arrived is kept.")
        expect(driver.find("#notice-text")).to_have_text("The connection closed before the response was complete.")
        expect(driver.find("#go")).to_have_text("Continue")
        assert driver.text.startswith(BEGINNING)
        assert driver.tokens.count() >= 30
        assert driver.mirrored == driver.text
        marked = driver.find("#mirror .unfinished")
        expect(marked).to_have_count(1)
        assert "unfinished" in marked.evaluate(MARK)
        assert driver.text.endswith(marked.text_content() or "\n")
        driver.shows("branches")
        expect(driver.find("#branches [aria-current] small")).to_have_text("unfinished")
        driver.find("#go").click()
        expect(driver.find("#notice-text")).to_have_text("The server cannot be reached.")
    expect_network_errors(driver)


def test_the_mark_of_unfinished_text_survives_a_reload_and_edits_before_it(driver: PageDriver) -> None:
    respond(driver, {"text": " there"}, {"text": " was"}, end=False)
    driver.write("Once")
    driver.area.focus()
    driver.press("Control+Enter")
    driver.expect_status("Unfinished")
    marked = driver.find("#mirror .unfinished")
    expect(marked).to_have_text(" was")
    driver.page.reload()
    driver.ready()
    expect(marked).to_have_text(" was")
    driver.caret(0)
    driver.page.keyboard.type("Well. ")
    expect(marked).to_have_text(" was")
    driver.caret(len(driver.text))
    driver.page.keyboard.type(" a")
    expect(marked).to_have_count(0)


def test_a_continued_text_is_not_marked_any_more(driver: PageDriver) -> None:
    respond(driver, {"text": " there"}, end=False)
    driver.write("Once")
    driver.area.focus()
    driver.press("Control+Enter")
    driver.expect_status("Unfinished")
    driver.page.unroute("**/v1/completions")
    driver.continues(max_tokens=4)
    expect(driver.find("#mirror .unfinished")).to_have_count(0)
    driver.press("Alt+ArrowLeft")
    expect(driver.find("#mirror .unfinished")).to_have_count(1)


def test_an_unfinished_choice_is_called_so(driver: PageDriver) -> None:
    respond(driver, {"text": " a", "finish_reason": "stop"}, {"index": 1, "text": " b"}, end=False)
    driver.write("Once")
    driver.set(n=2)
    driver.area.focus()
    driver.press("Control+Enter")
    driver.expect_status("Unfinished")
    cards = driver.find("#card-list article")
    expect(cards.nth(0)).to_contain_text("stop")
    expect(cards.nth(1)).to_contain_text("unfinished")


def test_an_error_does_not_scroll_the_document(driver: PageDriver) -> None:
    error = {"error": {"message": "No.", "type": "invalid_request_error", "param": None, "code": None}}
    driver.page.route("**/v1/completions", lambda route: route.fulfill(status=400, json=error))
    driver.write("A line of the text.\n" * 120)
    driver.caret(0)
    driver.find("#page").evaluate("(page) => { page.scrollTop = 900; }")
    driver.find("#score").click()
    expect(driver.find("#notice")).to_be_in_viewport(ratio=1)
    assert driver.page.evaluate(SCROLLED) == 900
    driver.find("#notice-close").click()
    expect(driver.find("#notice")).to_be_hidden()
    assert driver.page.evaluate(SCROLLED) == 900
    expect_http_error(driver, 400)


def test_a_model_that_ends_the_text_at_once_can_go_on(driver: PageDriver) -> None:
    respond(driver, {"finish_reason": "stop"})
    driver.write("The end.")
    driver.set(max_tokens=12)
    driver.area.focus()
    driver.press("Control+Enter")
    driver.expect_status("ended by stop")
    offer = driver.find("#offer")
    expect(offer).to_contain_text("The model ends the text here.")
    driver.page.unroute("**/v1/completions")
    offer.get_by_role("button", name="Go on").click()
    driver.ended()
    expect(offer).to_be_hidden()
    expect(driver.area).to_be_focused()
    assert driver.asked[-1] == driver.asked[-2] | {"min_tokens": 12}
    assert len(driver.text) > len("The end.")
    expect(driver.find("#field-min_tokens"), "the setting is as it was").to_have_value("0")


@pytest.mark.parametrize("way", ["typing", "dismissing", "undoing"])
def test_an_offer_goes_away(driver: PageDriver, way: str) -> None:
    respond(driver, {"finish_reason": "stop"})
    driver.write("The end.")
    driver.area.focus()
    driver.press("Control+Enter")
    expect(driver.find("#offer")).to_be_visible()
    if way == "typing":
        driver.page.keyboard.type("x")
    elif way == "undoing":
        driver.press("Control+z")
    else:
        driver.find("#offer-close").click()
    expect(driver.find("#offer")).to_be_hidden()


def test_a_server_without_the_field_gets_an_advice(visit: Any, plain_server: Any) -> None:
    driver = visit(plain_server.url).open()
    respond(driver, {"finish_reason": "stop"})
    driver.write("The end.")
    driver.area.focus()
    driver.press("Control+Enter")
    expect(driver.find("#offer")).to_contain_text("Write a few words")
    assert driver.find("#offer-choices button").count() == 0


def test_scoring_and_waiting_show_a_bar_and_the_seconds(driver: PageDriver) -> None:
    held: list[Route] = []
    driver.page.route("**/v1/completions", partial(list.append, held))
    driver.write(BEGINNING)
    for button, said in (("#score", "Scoring"), ("#go", "Writing…")):
        driver.find(button).click()
        driver.expect_status(said)
        expect(driver.find("#progress")).to_be_visible()
        expect(driver.find("#elapsed")).to_contain_text(" s")
        held.pop().continue_()
        expect(driver.find("#progress")).to_be_hidden()
        expect(driver.find("#elapsed")).to_be_empty()
        expect(driver.find("#go")).to_have_text("Continue")


def test_the_page_says_that_the_model_is_loading(visit: Any, open_server: Any) -> None:
    driver = visit(open_server.url)
    models = [{"id": open_server.model, "object": "model", "max_model_len": 2048, "status": "starting"}]
    driver.page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": models}))
    driver.open()
    driver.expect_status("Loading the model…")
    expect(driver.find("#progress")).to_be_visible()
    expect(driver.find("#elapsed")).to_contain_text(" s")
    expect(driver.find("#notice")).to_be_hidden()
    models[0]["status"] = "ready"
    driver.expect_status("The model is loaded.")
    expect(driver.find("#progress")).to_be_hidden()


def test_a_model_that_the_request_loads_is_said_to_be_loading(visit: Any, open_server: Any) -> None:
    driver = visit(open_server.url)
    models = [{"id": open_server.model, "object": "model", "max_model_len": 2048, "status": "unloaded"}]
    driver.page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": models}))
    driver.open()
    held: list[Route] = []
    driver.page.route("**/v1/completions", partial(list.append, held))
    driver.write(BEGINNING)
    driver.find("#go").click()
    driver.expect_status("Loading the model…")
    models[0]["status"] = "ready"
    held.pop().continue_()
    driver.ended()
    driver.find("#go").click()
    driver.expect_status("Writing…")
    held.pop().continue_()
    driver.ended()
