"""Writing: one document that the person and the model share."""

from __future__ import annotations

from typing import Any

import httpx
from playwright.sync_api import expect

from .page_driver import BEGINNING, ENDLESS, PageDriver


def test_the_answer_grows_at_the_end_and_is_told_from_what_was_typed(visitor: PageDriver) -> None:
    visitor.write(BEGINNING)
    answer = visitor.continues(max_tokens=12, seed=1)
    assert answer
    assert visitor.find("#mirror .you, #mirror .line > :not(.model)").count() == 0, "typed text has no marks"
    assert "".join(visitor.find("#mirror .model").all_inner_texts()).strip() in visitor.text
    typed, written = (
        visitor.find(f"#mirror {part}").first.evaluate("(n) => getComputedStyle(n).color")
        for part in (".line", ".model")
    )
    assert typed != written


def test_it_is_the_servers_answer(visitor: PageDriver, open_server: Any) -> None:
    visitor.write(BEGINNING)
    answer = visitor.continues(max_tokens=30, seed=7)
    with open_server.http() as client:
        body = {"prompt": BEGINNING, "max_tokens": 30, "seed": 7}
        assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == answer


def test_the_text_grows_while_it_comes(visitor: PageDriver) -> None:
    visitor.begins_endless()
    expect(visitor.find("#go")).to_have_text("Stop")
    grown = len(visitor.text)
    expect(visitor.tokens.nth(visitor.tokens.count() + 20)).to_be_attached()
    assert len(visitor.text) > grown
    visitor.press("Escape")


def test_stop_keeps_what_has_come(visitor: PageDriver) -> None:
    visitor.begins_endless()
    visitor.press("Escape")
    visitor.says("Stopped")
    kept = visitor.text
    assert len(kept) > len(BEGINNING) + 30
    assert kept.startswith(BEGINNING)
    expect(visitor.find("#go")).to_have_text("Continue")
    assert visitor.continues(max_tokens=3), "and can be continued"
    assert visitor.text.startswith(kept)


def test_the_button_stops_too(visitor: PageDriver) -> None:
    visitor.begins_endless()
    visitor.find("#go").click()
    visitor.says("Stopped")
    assert visitor.text.startswith(BEGINNING)


def test_who_types_while_it_comes_has_the_last_word(visitor: PageDriver) -> None:
    visitor.begins_endless()
    visitor.caret(4)
    visitor.page.keyboard.type("X")
    visitor.says("the text was changed")
    visitor.page.keyboard.type("YZ")
    assert visitor.text.startswith("OnceXYZ upon a time")
    assert len(visitor.text) > len(BEGINNING) + 30
    expect(visitor.find("#go")).to_have_text("Continue")


def test_typing_after_a_gap_that_is_being_filled_stays_where_it_is_typed(visitor: PageDriver) -> None:
    before, after = "Once upon a time", " They went home."
    visitor.write(before + after)
    visitor.set(**ENDLESS)
    visitor.caret(len(before))
    visitor.press("Control+Shift+Enter")
    expect(visitor.tokens.nth(30)).to_be_attached()
    end = visitor.text.index("home.") + 5
    visitor.area.evaluate("(area) => area.setSelectionRange(area.value.length, area.value.length)")
    expect(visitor.tokens.nth(visitor.tokens.count() + 15)).to_be_attached()
    visitor.page.keyboard.type("!?")
    visitor.says("the text was changed")
    assert end > len(before + after)
    assert visitor.text.endswith(f"{after}!?")
    assert visitor.mirrored == visitor.text


def test_pasted_text_is_plain(visitor: PageDriver) -> None:
    visitor.area.focus()
    visitor.page.evaluate(
        """() => {
            const data = new DataTransfer();
            data.setData("text/html", "<b>bold</b> <img src=x onerror=alert(1)>");
            data.setData("text/plain", "bold <b>&amp;</b>\\nline");
            const event = new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true });
            if (document.activeElement.dispatchEvent(event))
                document.execCommand("insertText", false, data.getData("text/plain"));
        }"""
    )
    assert visitor.text == "bold <b>&amp;</b>\nline"
    assert visitor.mirrored == visitor.text
    assert visitor.find("#mirror b, #mirror img").count() == 0


def test_an_edited_token_loses_its_numbers_and_no_text_is_lost(visitor: PageDriver) -> None:
    visitor.write(BEGINNING)
    visitor.continues(max_tokens=12, seed=1)
    before, tokens = visitor.text, visitor.tokens.count()
    start = len(BEGINNING) + len(visitor.tokens.nth(0).inner_text()) + 2
    visitor.caret(start)
    visitor.page.keyboard.type("Q")
    assert visitor.text == before[:start] + "Q" + before[start:]
    assert visitor.tokens.count() == tokens - 1
    assert visitor.mirrored == visitor.text
    assert visitor.find("#mirror .stale").count() == visitor.tokens.count() - 1, "what follows was read in another text"
    visitor.press("Control+z")
    assert visitor.text == before
    assert visitor.tokens.count() == tokens
    assert visitor.find("#mirror .stale").count() == 0


def test_insert_fills_the_gap_at_the_cursor(visitor: PageDriver) -> None:
    before, after = "def add(a, b):\n    ", "\n\nprint(add(1, 2))\n"
    visitor.write(before + after)
    expect(visitor.find("#insert")).to_be_disabled()
    visitor.set(max_tokens=12, temperature=0)
    visitor.caret(len(before))
    visitor.press("Control+Shift+Enter")
    visitor.ended()
    assert (visitor.asked[-1]["prompt"], visitor.asked[-1]["suffix"]) == (before, after)
    assert visitor.text.startswith(before)
    assert visitor.text.endswith(after)
    assert len(visitor.text) > len(before + after)
    assert visitor.find("#mirror .model").count() > 0


def test_an_alternative_within_a_gap_keeps_what_follows(visitor: PageDriver) -> None:
    before, after = "Once upon a time", " They went home."
    visitor.write(before + after)
    visitor.set(max_tokens=8, temperature=0)
    visitor.caret(len(before))
    visitor.find("#insert").click()
    visitor.ended()
    expect(visitor.area, "the keyboard is in the text again").to_be_focused()
    popover = visitor.hover(visitor.tokens.nth(2))
    kept = "".join(visitor.tokens.all_inner_texts()[:2])
    popover.locator("button:not([aria-current]):not(:disabled)").first.click()
    visitor.ended()
    assert visitor.asked[-1]["prompt"].startswith(before + kept)
    assert visitor.asked[-1]["suffix"] == after
    assert visitor.text.endswith(after)


def test_an_empty_document_begins_a_new_text(visitor: PageDriver) -> None:
    assert visitor.continues(max_tokens=6, seed=3)


def test_echo_brings_the_numbers_of_the_text_before(visitor: PageDriver) -> None:
    visitor.write("One day")
    visitor.continues(max_tokens=4, echo=True, seed=1)
    assert visitor.asked[-1]["echo"] is True
    assert visitor.find("#mirror .you.token").count() >= 2
    assert visitor.text.startswith("One day")
    assert visitor.text.count("One day") == 1


def test_what_is_not_streamed_comes_whole(visitor: PageDriver) -> None:
    visitor.write(BEGINNING)
    answer = visitor.continues(max_tokens=8, best_of=3, seed=1)
    assert "stream" not in visitor.asked[-1]
    assert answer


def test_speed_and_usage_are_told(visitor: PageDriver) -> None:
    visitor.write(f"{BEGINNING} {BEGINNING}")
    visitor.continues(max_tokens=20, seed=1)
    expect(visitor.find("#usage-completion-tokens")).to_have_text("20 written")
    expect(visitor.find("#usage-rate")).to_contain_text("tokens/s")
    expect(visitor.find("#usage-wait")).to_contain_text("ms")
    visitor.press("Alt+KeyR")
    visitor.ended()
    expect(visitor.find("#usage-prompt-tokens")).to_contain_text("cached")


def test_the_context_bar_counts_as_the_server_does(visitor: PageDriver, open_server: Any) -> None:
    visitor.write(BEGINNING)
    with httpx.Client(base_url=open_server.url, trust_env=False) as client:
        count = client.post("/tokenize", json={"prompt": BEGINNING}).json()
    expect(visitor.find("#context-text")).to_have_text(f"{count['count']} / {count['max_model_len']:,}")
