"""Sessions in local storage, errors, and API keys."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.sync_api import expect

from .page_driver import BEGINNING, PageDriver

KEY = "sk-test-0123456789abcdef"
REFUSED = "Failed to load resource: the server responded with a status of"


def expect_http_error(driver: PageDriver, status: int) -> None:
    """Remove the browser's console message about an expected error status."""
    driver.problems[:] = [line for line in driver.problems if f"{REFUSED} {status}" not in line]


def test_a_session_survives_a_reload(driver: PageDriver) -> None:
    driver.write(BEGINNING)
    driver.continues(max_tokens=6, seed=1)
    text, tokens = driver.text, driver.tokens.count()
    driver.page.reload()
    driver.ready()
    assert driver.text == text
    assert driver.tokens.count() == tokens
    assert driver.find("#mirror .stale").count() == 0
    driver.press("Alt+ArrowLeft")
    assert driver.text == BEGINNING
    expect(driver.find("#field-max_tokens")).to_have_value("6")


def test_an_edit_without_a_branch_survives_a_reload(driver: PageDriver) -> None:
    driver.write(BEGINNING)
    driver.continues(max_tokens=6, seed=1)
    driver.press("Alt+ArrowLeft")
    driver.caret(4)
    driver.page.keyboard.type("!")
    edited = driver.text
    driver.page.reload()
    driver.ready()
    assert driver.text == edited
    driver.shows("branches")
    expect(driver.find("#branches .branch")).to_have_count(2)
    driver.press("Alt+ArrowUp")
    assert driver.text == BEGINNING, "the text that was continued is as it was"
    driver.press("Alt+ArrowRight")
    assert len(driver.text) > len(BEGINNING)
    expect(driver.find("#branches .branch")).to_have_count(3)


def test_a_first_visit_begins_with_a_text_that_reads_well_when_continued(driver: PageDriver) -> None:
    first = driver.text
    assert first.startswith("Once upon a time")
    answer = driver.continues(max_tokens=20, seed=1)
    assert (driver.asked[-1]["prompt"], driver.asked[-1]["temperature"]) == (first, 0.7)
    driver.page.reload()
    driver.ready()
    assert driver.text == first + answer
    driver.shows("sessions")
    driver.find("#session-new").click()
    assert driver.text == "", "only the first visit begins with a text"


def test_the_first_text_leaves_nothing_behind_when_it_is_replaced(driver: PageDriver) -> None:
    driver.write("Mine")
    driver.shows("branches")
    expect(driver.find("#branches .branch")).to_have_count(1)
    driver.shows("sessions")
    assert driver.find("#sessions .branch span").all_inner_texts() == ["Mine"]


def test_sessions_are_created_named_selected_and_deleted(driver: PageDriver) -> None:
    driver.write("The first text")
    driver.shows("sessions")
    assert driver.find("#sessions li").count() == 1, "the open session is in the list at once"
    driver.find("#session-new").click()
    assert driver.text == ""
    driver.write("The second text")
    driver.find("#session-name").fill("Two")
    rows = driver.find("#sessions li")
    expect(rows).to_have_count(2)
    rows.filter(has_text="The first text").locator(".branch").click()
    assert driver.text == "The first text"
    rows.filter(has_text="Two").locator(".branch").click()
    assert driver.text == "The second text"
    driver.page.get_by_role("button", name="Delete The first text").click()
    expect(rows).to_have_count(1)


def test_an_exported_session_can_be_imported_completely(driver: PageDriver, visit: Any, tmp_path: Any) -> None:
    driver.write(BEGINNING)
    driver.continues(max_tokens=6, seed=1)
    driver.shows("sessions")
    with driver.page.expect_download() as download:
        driver.find("#session-export").click()
    path = tmp_path / "session.json"
    download.value.save_as(path)
    assert json.loads(path.read_text(encoding="utf-8"))["version"] == 1
    other = visit(driver.url).open()
    other.shows("sessions")
    other.find("#session-file").set_input_files(path)
    expect(other.area).to_have_value(driver.text)
    assert other.tokens.count() == driver.tokens.count()
    other.press("Alt+ArrowLeft")
    assert other.text == BEGINNING


NO_ROOM = """(part) => {
  const put = Storage.prototype.setItem;
  Storage.prototype.setItem = function (name, value) {
    if (name.startsWith("afterword.session.") && value.includes(part)) throw new DOMException("full");
    put.call(this, name, value);
  };
}"""


def test_a_full_storage_leaves_out_alternatives_first(driver: PageDriver) -> None:
    driver.page.evaluate(NO_ROOM, '"top":[[')
    driver.write(BEGINNING)
    driver.continues(max_tokens=6, seed=1)
    text, tokens = driver.text, driver.tokens.count()
    driver.page.reload()
    driver.ready()
    assert (driver.text, driver.tokens.count()) == (text, tokens)
    popover = driver.hover(driver.tokens.nth(2))
    assert popover.locator("li button").count() == 0
    assert "%" in popover.inner_text()


def test_a_full_storage_is_reported(driver: PageDriver) -> None:
    driver.page.evaluate(NO_ROOM, "")
    driver.write(BEGINNING)
    expect(driver.find("#notice-text")).to_contain_text("storage is full")


def test_a_file_that_is_not_a_session_is_reported(driver: PageDriver, tmp_path: Any) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"kind": "other"}', encoding="utf-8")
    driver.write("kept")
    driver.shows("sessions")
    driver.find("#session-file").set_input_files(path)
    expect(driver.find("#notice-text")).to_contain_text("other.json is not a session")
    assert driver.text == "kept"


def test_a_server_error_is_shown_unchanged(driver: PageDriver, open_server: Any) -> None:
    driver.write(BEGINNING)
    driver.set(max_tokens=100000)
    driver.area.focus()
    driver.press("Control+Enter")
    with open_server.http() as client:
        body = {"prompt": BEGINNING, "max_tokens": 100000}
        message = client.post("/v1/completions", json=body).json()["error"]["message"]
    expect(driver.find("#notice-text")).to_have_text(message)
    expect(driver.find("#notice-title")).to_contain_text("400 · req_")
    assert driver.text == BEGINNING
    expect(driver.find("#position"), "a refused request leaves no branch").to_have_text("1 / 1")
    driver.find("#notice-close").click()
    expect(driver.find("#notice")).to_be_hidden()
    expect_http_error(driver, 400)


@pytest.mark.parametrize("whole", [True, False], ids=["with its end", "broken off"])
def test_an_error_within_a_stream_keeps_the_received_text(driver: PageDriver, whole: bool) -> None:
    chunk = {"choices": [{"index": 0, "text": " there", "logprobs": None, "finish_reason": None}]}
    error = {"error": {"message": "The engine died.", "type": "server_error", "param": None, "code": None}}
    events = [chunk, error] if whole else [chunk]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    driver.page.route("**/v1/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    driver.write("Hello")
    driver.area.focus()
    driver.press("Control+Enter")
    expect(driver.find("#notice-text")).to_have_text(
        "The engine died." if whole else "The connection closed before the response was complete."
    )
    assert driver.text == "Hello there"


def test_requests_carry_the_entered_api_key(visit: Any, server: Any) -> None:
    driver = visit(server.url)
    driver.page.goto(server.url)
    dialog = driver.find("#key-dialog")
    expect(dialog).to_be_visible()
    expect(driver.find("#key-message")).to_contain_text("You didn't provide an API key")
    driver.find("#key-given").fill(KEY)
    driver.press("Enter")
    expect(dialog).to_be_hidden()
    driver.ready()
    driver.write(BEGINNING)
    assert driver.continues(max_tokens=3)
    driver.shows("request")
    expect(driver.find("#curl")).to_contain_text("Bearer $AFTERWORD_API_KEY")
    assert KEY not in driver.page.content()
    stored = "() => [sessionStorage.getItem('afterword.key'), localStorage.getItem('afterword.key')]"
    assert driver.page.evaluate(stored) == [KEY, None]
    driver.shows("settings")
    driver.find("#pane-settings > details > summary").click()
    driver.find("#key-keep").check()
    assert driver.page.evaluate(stored) == [None, KEY]
    expect_http_error(driver, 401)


def test_a_wrong_api_key_reopens_the_dialog(visit: Any, server: Any) -> None:
    driver = visit(server.url)
    driver.page.goto(server.url)
    driver.find("#key-given").fill("sk-wrong-0000000000")
    driver.find("#key-save").click()
    expect(driver.find("#key-message")).to_contain_text("Incorrect API key provided")
    expect_http_error(driver, 401)


def test_a_link_can_set_the_text(visit: Any, open_server: Any) -> None:
    driver = visit(open_server.url).open("#prompt=Once%20upon%20a%20time")
    assert driver.text == "Once upon a time"
    assert "prompt" not in driver.page.url
