"""What stays in the browser, what goes wrong, and keys."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.sync_api import expect

from .page_driver import BEGINNING, PageDriver

KEY = "sk-test-0123456789abcdef"
REFUSED = "Failed to load resource: the server responded with a status of"


def forgiven(visitor: PageDriver, status: int) -> None:
    """The browser's own note of an answer that was to be expected."""
    visitor.trouble[:] = [line for line in visitor.trouble if f"{REFUSED} {status}" not in line]


def test_a_session_survives_a_reload(visitor: PageDriver) -> None:
    visitor.write(BEGINNING)
    visitor.continues(max_tokens=6, seed=1)
    text, tokens = visitor.text, visitor.tokens.count()
    visitor.page.reload()
    visitor.ready()
    assert visitor.text == text
    assert visitor.tokens.count() == tokens
    assert visitor.find("#mirror .stale").count() == 0
    visitor.press("Alt+ArrowLeft")
    assert visitor.text == BEGINNING
    expect(visitor.find("#field-max_tokens")).to_have_value("6")


def test_an_edit_that_hangs_nowhere_yet_survives_too(visitor: PageDriver) -> None:
    visitor.write(BEGINNING)
    visitor.continues(max_tokens=6, seed=1)
    visitor.press("Alt+ArrowLeft")
    visitor.caret(4)
    visitor.page.keyboard.type("!")
    edited = visitor.text
    visitor.page.reload()
    visitor.ready()
    assert visitor.text == edited
    visitor.shows("branches")
    expect(visitor.find("#branches .branch")).to_have_count(2)
    visitor.press("Alt+ArrowUp")
    assert visitor.text == BEGINNING, "the text that was continued is as it was"
    visitor.press("Alt+ArrowRight")
    assert len(visitor.text) > len(BEGINNING)
    expect(visitor.find("#branches .branch")).to_have_count(3)


def test_sessions_are_begun_named_chosen_and_deleted(visitor: PageDriver) -> None:
    visitor.write("The first text")
    visitor.shows("sessions")
    assert visitor.find("#sessions li").count() == 1, "what is on the desk is on the shelf at once"
    visitor.find("#session-new").click()
    assert visitor.text == ""
    visitor.write("The second text")
    visitor.find("#session-name").fill("Two")
    rows = visitor.find("#sessions li")
    expect(rows).to_have_count(2)
    rows.filter(has_text="The first text").locator(".branch").click()
    assert visitor.text == "The first text"
    rows.filter(has_text="Two").locator(".branch").click()
    assert visitor.text == "The second text"
    visitor.page.get_by_role("button", name="Delete The first text").click()
    expect(rows).to_have_count(1)


def test_a_session_is_exported_whole_and_imported_elsewhere(visitor: PageDriver, visit: Any, tmp_path: Any) -> None:
    visitor.write(BEGINNING)
    visitor.continues(max_tokens=6, seed=1)
    visitor.shows("sessions")
    with visitor.page.expect_download() as download:
        visitor.find("#session-export").click()
    path = tmp_path / "session.json"
    download.value.save_as(path)
    assert json.loads(path.read_text(encoding="utf-8"))["version"] == 1
    other = visit(visitor.url).open()
    other.shows("sessions")
    other.find("#session-file").set_input_files(path)
    expect(other.area).to_have_value(visitor.text)
    assert other.tokens.count() == visitor.tokens.count()
    other.press("Alt+ArrowLeft")
    assert other.text == BEGINNING


NO_ROOM = """(part) => {
  const put = Storage.prototype.setItem;
  Storage.prototype.setItem = function (name, value) {
    if (name.startsWith("afterword.session.") && value.includes(part)) throw new DOMException("full");
    put.call(this, name, value);
  };
}"""


def test_without_room_alternatives_are_left_out_first(visitor: PageDriver) -> None:
    visitor.page.evaluate(NO_ROOM, '"top":[[')
    visitor.write(BEGINNING)
    visitor.continues(max_tokens=6, seed=1)
    text, tokens = visitor.text, visitor.tokens.count()
    visitor.page.reload()
    visitor.ready()
    assert (visitor.text, visitor.tokens.count()) == (text, tokens)
    popover = visitor.hover(visitor.tokens.nth(2))
    assert popover.locator("li button").count() == 0
    assert "%" in popover.inner_text()


def test_without_any_room_it_is_said(visitor: PageDriver) -> None:
    visitor.page.evaluate(NO_ROOM, "")
    visitor.write(BEGINNING)
    expect(visitor.find("#notice-text")).to_contain_text("storage is full")


def test_a_file_that_is_no_session_is_said_to_be_none(visitor: PageDriver, tmp_path: Any) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"kind": "other"}', encoding="utf-8")
    visitor.write("kept")
    visitor.shows("sessions")
    visitor.find("#session-file").set_input_files(path)
    expect(visitor.find("#notice-text")).to_contain_text("other.json is not a session")
    assert visitor.text == "kept"


def test_an_error_is_shown_in_the_servers_words(visitor: PageDriver, open_server: Any) -> None:
    visitor.write(BEGINNING)
    visitor.set(max_tokens=100000)
    visitor.area.focus()
    visitor.press("Control+Enter")
    with open_server.http() as client:
        body = {"prompt": BEGINNING, "max_tokens": 100000}
        message = client.post("/v1/completions", json=body).json()["error"]["message"]
    expect(visitor.find("#notice-text")).to_have_text(message)
    expect(visitor.find("#notice-title")).to_contain_text("400 · req_")
    assert visitor.text == BEGINNING
    expect(visitor.find("#position"), "a refused request leaves no branch").to_have_text("1 / 1")
    visitor.find("#notice-close").click()
    expect(visitor.find("#notice")).to_be_hidden()
    forgiven(visitor, 400)


@pytest.mark.parametrize("whole", [True, False], ids=["with its end", "broken off"])
def test_an_error_within_a_stream_keeps_what_had_come(visitor: PageDriver, whole: bool) -> None:
    chunk = {"choices": [{"index": 0, "text": " there", "logprobs": None, "finish_reason": None}]}
    error = {"error": {"message": "The engine died.", "type": "server_error", "param": None, "code": None}}
    events = [chunk, error] if whole else [chunk]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    visitor.page.route("**/v1/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    visitor.write("Hello")
    visitor.area.focus()
    visitor.press("Control+Enter")
    expect(visitor.find("#notice-text")).to_have_text(
        "The engine died." if whole else "The connection closed before the response was complete."
    )
    assert visitor.text == "Hello there"


def test_a_guarded_server_is_asked_with_a_key(visit: Any, server: Any) -> None:
    visitor = visit(server.url)
    visitor.page.goto(server.url)
    dialog = visitor.find("#key-dialog")
    expect(dialog).to_be_visible()
    expect(visitor.find("#key-message")).to_contain_text("You didn't provide an API key")
    visitor.find("#key-given").fill(KEY)
    visitor.press("Enter")
    expect(dialog).to_be_hidden()
    visitor.ready()
    visitor.write(BEGINNING)
    assert visitor.continues(max_tokens=3)
    visitor.shows("request")
    expect(visitor.find("#curl")).to_contain_text("Bearer $AFTERWORD_API_KEY")
    assert KEY not in visitor.page.content()
    stored = "() => [sessionStorage.getItem('afterword.key'), localStorage.getItem('afterword.key')]"
    assert visitor.page.evaluate(stored) == [KEY, None]
    visitor.shows("settings")
    visitor.find("#pane-settings > details > summary").click()
    visitor.find("#key-keep").check()
    assert visitor.page.evaluate(stored) == [None, KEY]
    forgiven(visitor, 401)


def test_a_wrong_key_is_asked_for_again(visit: Any, server: Any) -> None:
    visitor = visit(server.url)
    visitor.page.goto(server.url)
    visitor.find("#key-given").fill("sk-wrong-0000000000")
    visitor.find("#key-save").click()
    expect(visitor.find("#key-message")).to_contain_text("Incorrect API key provided")
    forgiven(visitor, 401)


def test_a_link_may_bring_a_beginning(visit: Any, open_server: Any) -> None:
    visitor = visit(open_server.url).open("#prompt=Once%20upon%20a%20time")
    assert visitor.text == "Once upon a time"
    assert "prompt" not in visitor.page.url
