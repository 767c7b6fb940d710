"""Writing: generation into the document, stopping, and infill."""

from __future__ import annotations

from typing import Any

import httpx
from playwright.sync_api import expect

from .page_driver import BEGINNING, ENDLESS, PageDriver


def test_generated_text_is_appended_and_has_another_colour(driver: PageDriver) -> None:
    driver.write(BEGINNING)
    answer = driver.continues(max_tokens=12, seed=1)
    assert answer
    assert driver.find("#mirror .you, #mirror .line > :not(.model)").count() == 0, "typed text has no marks"
    assert "".join(driver.find("#mirror .model").all_inner_texts()).strip() in driver.text
    typed, written = (
        driver.find(f"#mirror {part}").first.evaluate("(n) => getComputedStyle(n).color")
        for part in (".line", ".model")
    )
    assert typed != written


def test_the_text_is_the_servers_response(driver: PageDriver, open_server: Any) -> None:
    driver.write(BEGINNING)
    answer = driver.continues(max_tokens=30, seed=7)
    with open_server.http() as client:
        body = {"prompt": BEGINNING, "max_tokens": 30, "temperature": 0.7, "seed": 7}
        assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == answer


def test_the_text_grows_while_the_stream_runs(driver: PageDriver) -> None:
    driver.begins_endless()
    expect(driver.find("#go")).to_have_text("Stop")
    grown = len(driver.text)
    expect(driver.tokens.nth(driver.tokens.count() + 20)).to_be_attached()
    assert len(driver.text) > grown
    driver.press("Escape")


def test_stop_keeps_the_received_text(driver: PageDriver) -> None:
    driver.begins_endless()
    driver.press("Escape")
    driver.expect_status("Stopped")
    kept = driver.text
    assert len(kept) > len(BEGINNING) + 30
    assert kept.startswith(BEGINNING)
    expect(driver.find("#go")).to_have_text("Continue")
    assert driver.continues(max_tokens=3), "and can be continued"
    assert driver.text.startswith(kept)


def test_the_button_stops_too(driver: PageDriver) -> None:
    driver.begins_endless()
    driver.find("#go").click()
    driver.expect_status("Stopped")
    assert driver.text.startswith(BEGINNING)


def test_typing_stops_the_generation(driver: PageDriver) -> None:
    driver.begins_endless()
    driver.caret(4)
    driver.page.keyboard.type("X")
    driver.expect_status("the text was changed")
    driver.page.keyboard.type("YZ")
    assert driver.text.startswith("OnceXYZ upon a time")
    assert len(driver.text) > len(BEGINNING) + 30
    expect(driver.find("#go")).to_have_text("Continue")


def test_text_typed_after_a_gap_during_infill_keeps_its_position(driver: PageDriver) -> None:
    before, after = "Once upon a time", " They went home."
    driver.write(before + after)
    driver.set(**ENDLESS)
    driver.caret(len(before))
    driver.press("Control+Shift+Enter")
    expect(driver.tokens.nth(30)).to_be_attached()
    end = driver.text.index("home.") + 5
    driver.area.evaluate("(area) => area.setSelectionRange(area.value.length, area.value.length)")
    expect(driver.tokens.nth(driver.tokens.count() + 15)).to_be_attached()
    driver.page.keyboard.type("!?")
    driver.expect_status("the text was changed")
    assert end > len(before + after)
    assert driver.text.endswith(f"{after}!?")
    assert driver.mirrored == driver.text


def test_pasted_text_is_plain(driver: PageDriver) -> None:
    driver.write("")
    driver.area.focus()
    driver.page.evaluate(
        """() => {
            const data = new DataTransfer();
            data.setData("text/html", "<b>bold</b> <img src=x onerror=alert(1)>");
            data.setData("text/plain", "bold <b>&amp;</b>\\nline");
            const event = new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true });
            if (document.activeElement.dispatchEvent(event))
                document.execCommand("insertText", false, data.getData("text/plain"));
        }"""
    )
    assert driver.text == "bold <b>&amp;</b>\nline"
    assert driver.mirrored == driver.text
    assert driver.find("#mirror b, #mirror img").count() == 0


def test_an_edited_token_loses_its_numbers_and_no_text_is_lost(driver: PageDriver) -> None:
    driver.write(BEGINNING)
    driver.continues(max_tokens=12, seed=1)
    before, tokens = driver.text, driver.tokens.count()
    start = len(BEGINNING) + len(driver.tokens.nth(0).inner_text()) + 2
    driver.caret(start)
    driver.page.keyboard.type("Q")
    assert driver.text == before[:start] + "Q" + before[start:]
    assert driver.tokens.count() == tokens - 1
    assert driver.mirrored == driver.text
    assert driver.find("#mirror .stale").count() == driver.tokens.count() - 1, (
        "the numbers of the following tokens are stale"
    )
    driver.press("Control+z")
    assert driver.text == before
    assert driver.tokens.count() == tokens
    assert driver.find("#mirror .stale").count() == 0


def test_insert_fills_the_gap_at_the_cursor(driver: PageDriver) -> None:
    before, after = "def add(a, b):\n    ", "\n\nprint(add(1, 2))\n"
    driver.write(before + after)
    expect(driver.find("#insert")).to_be_disabled()
    driver.set(max_tokens=12, temperature=0)
    driver.caret(len(before))
    driver.press("Control+Shift+Enter")
    driver.ended()
    assert (driver.asked[-1]["prompt"], driver.asked[-1]["suffix"]) == (before, after)
    assert driver.text.startswith(before)
    assert driver.text.endswith(after)
    assert len(driver.text) > len(before + after)
    assert driver.find("#mirror .model").count() > 0


def test_an_alternative_within_a_gap_keeps_the_suffix(driver: PageDriver) -> None:
    before, after = "Once upon a time", " They went home."
    driver.write(before + after)
    driver.set(max_tokens=8, temperature=0)
    driver.caret(len(before))
    driver.find("#insert").click()
    driver.ended()
    expect(driver.area, "the keyboard is in the text again").to_be_focused()
    popover = driver.hover(driver.tokens.nth(2))
    kept = "".join(driver.tokens.all_inner_texts()[:2])
    popover.locator("button:not([aria-current]):not(:disabled)").first.click()
    driver.ended()
    assert driver.asked[-1]["prompt"].startswith(before + kept)
    assert driver.asked[-1]["suffix"] == after
    assert driver.text.endswith(after)


def test_an_empty_document_begins_a_new_text(driver: PageDriver) -> None:
    assert driver.continues(max_tokens=6, seed=3)


def test_echo_adds_the_numbers_of_the_prompt(driver: PageDriver) -> None:
    driver.write("One day")
    driver.continues(max_tokens=4, echo=True, seed=1)
    assert driver.asked[-1]["echo"] is True
    assert driver.find("#mirror .you.token").count() >= 2
    assert driver.text.startswith("One day")
    assert driver.text.count("One day") == 1


def test_a_response_without_streaming_arrives_whole(driver: PageDriver) -> None:
    driver.write(BEGINNING)
    answer = driver.continues(max_tokens=8, best_of=3, seed=1)
    assert "stream" not in driver.asked[-1]
    assert answer


def test_speed_and_usage_are_shown(driver: PageDriver) -> None:
    driver.write(f"{BEGINNING} {BEGINNING}")
    driver.continues(max_tokens=20, seed=1)
    expect(driver.find("#usage-completion-tokens")).to_have_text("20 written")
    expect(driver.find("#usage-rate")).to_contain_text("tokens/s")
    expect(driver.find("#usage-wait")).to_contain_text("ms")
    driver.press("Alt+KeyR")
    driver.ended()
    expect(driver.find("#usage-prompt-tokens")).to_contain_text("cached")


def test_the_context_bar_counts_as_the_server_does(driver: PageDriver, open_server: Any) -> None:
    driver.write(BEGINNING)
    with httpx.Client(base_url=open_server.url, trust_env=False) as client:
        count = client.post("/tokenize", json={"prompt": BEGINNING}).json()
    expect(driver.find("#context-text")).to_have_text(f"{count['count']} / {count['max_model_len']:,}")
