"""Tokens and their numbers: colours, alternatives and scores agree with the server's responses."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from playwright.sync_api import expect

from .page_driver import BEGINNING, PageDriver


def scored(server: Any, text: str) -> dict[str, list[Any]]:
    """The log probability columns of the server's response for a text."""
    with server.http() as client:
        body = {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 5}
        columns: dict[str, list[Any]] = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
        return columns


def sums(driver: PageDriver) -> dict[str, str]:
    names = driver.find("#sums dt").all_inner_texts()
    return dict(zip(names, driver.find("#sums dd").all_inner_texts(), strict=True))


def amount(text: str) -> float:
    return float(text.removesuffix(" nats").replace("−", "-").replace(",", ""))


def percent(logprob: float) -> str:
    share = 100 * math.exp(logprob)
    return "100 %" if share >= 99.95 else f"{share:.{1 if share >= 9.95 else 2}f} %" if share >= 0.01 else "< 0.01 %"


def test_score_has_the_probabilities_of_the_documents_own_tokens(driver: PageDriver, open_server: Any) -> None:
    driver.write(BEGINNING)
    driver.scores()
    columns = scored(open_server, BEGINNING)
    assert driver.tokens.all_inner_texts() == columns["tokens"]
    assert driver.find("#mirror .model").count() == 0, "typed text is not marked as generated"
    total = sum(columns["token_logprobs"][1:])
    count = len(columns["tokens"]) - 1
    expect(driver.find("#sums")).to_contain_text("perplexity")
    found = sums(driver)
    assert amount(found["tokens"]) == count + 1
    assert amount(found["log probability"]) == pytest.approx(total, abs=0.006)
    assert amount(found["mean"]) == pytest.approx(total / count, abs=0.0006)
    assert amount(found["perplexity"]) == pytest.approx(math.exp(-total / count), abs=0.006)
    size = len("".join(columns["tokens"][1:]).encode())
    assert amount(found["bits per byte"]) == pytest.approx(-total / math.log(2) / size, abs=0.0006)
    assert driver.text == BEGINNING


def test_a_click_in_the_surprise_curve_scrolls_to_the_token(driver: PageDriver) -> None:
    driver.write(f"{BEGINNING} " * 60)
    driver.scores()
    course = driver.find("#course")
    expect(course.locator("path")).to_have_attribute("d", re.compile("^M"))
    box = course.bounding_box()
    assert box is not None
    course.click(position={"x": box["width"] * 0.9, "y": 8})
    caret = driver.area.evaluate("(area) => area.selectionStart")
    assert 0.85 < caret / len(driver.text) < 0.95
    assert driver.find("#page").evaluate("(page) => page.scrollTop") > 0


def test_the_sums_cover_the_selection(driver: PageDriver, open_server: Any) -> None:
    driver.write(BEGINNING)
    driver.scores()
    columns = scored(open_server, BEGINNING)
    start, end = columns["text_offset"][3], columns["text_offset"][7]
    driver.caret(start, end)
    expect(driver.find("#sums dt").first).to_have_text("selected tokens")
    found = sums(driver)
    assert amount(found["selected tokens"]) == 4
    assert amount(found["log probability"]) == pytest.approx(sum(columns["token_logprobs"][3:7]), abs=0.006)


def test_colour_is_the_probability_or_the_surprise_or_nothing(driver: PageDriver, open_server: Any) -> None:
    driver.write(BEGINNING)
    driver.scores()
    logprobs = scored(open_server, BEGINNING)["token_logprobs"]
    likely = max(range(1, len(logprobs)), key=lambda i: logprobs[i])
    unlikely = min(range(1, len(logprobs)), key=lambda i: logprobs[i])

    def ink(index: int) -> float:
        """The alpha of a token's background colour."""
        colour = driver.tokens.nth(index).evaluate("(node) => getComputedStyle(node).backgroundColor")
        numbers = [float(found) for found in re.findall(r"[\d.]+", colour)]
        return numbers[3] if len(numbers) == 4 else 1.0 if "rgba" not in colour else 0.0

    for mode in ("probability", "surprise"):
        driver.find(f'#colour [value="{mode}"]').check(force=True)
        assert ink(unlikely) > ink(likely) + 0.2, mode
    driver.find('#colour [value="off"]').check(force=True)
    assert ink(unlikely) == ink(likely) == 0


def test_pointing_at_a_token_shows_its_alternatives(driver: PageDriver, open_server: Any) -> None:
    driver.write(BEGINNING)
    driver.scores()
    columns = scored(open_server, BEGINNING)
    popover = driver.hover(driver.tokens.nth(4))
    top = sorted(columns["top_logprobs"][4].items(), key=lambda pair: -pair[1])
    rows = popover.locator("li button")
    assert [row.replace("\n", " ") for row in rows.locator(".spelled").all_inner_texts()] == [
        token.replace(" ", "␣") for token, _ in top
    ]
    assert rows.locator(".share > span:last-child").all_inner_texts() == [percent(value) for _, value in top]
    chosen = popover.locator("[aria-current] .spelled")
    assert chosen.inner_text() == columns["tokens"][4].replace(" ", "␣")
    assert percent(columns["token_logprobs"][4]) in popover.locator("header").inner_text()
    assert "rank" in popover.inner_text()
    driver.page.mouse.move(5, 5)
    expect(popover).to_be_hidden()


def test_the_keyboard_reaches_alternatives_and_takes_one(driver: PageDriver) -> None:
    driver.write(BEGINNING)
    driver.continues(max_tokens=10, temperature=0)
    driver.caret(len(driver.text))
    driver.press("Control+Space")
    expect(driver.find("#popover")).to_be_visible()
    driver.press("Escape")
    driver.caret(len(BEGINNING) + 1)
    driver.press("Control+Space")
    popover = driver.find("#popover")
    expect(popover).to_be_visible()
    expect(popover).not_to_contain_text("score again")
    expect(popover.locator("button:focus")).to_be_visible()
    assert len(driver.asked) == 1, "the key that opens it chooses nothing"
    driver.press("Escape")
    expect(popover).to_be_hidden()
    expect(driver.area).to_be_focused()
    driver.press("Control+Space")
    driver.press("ArrowDown")
    wanted = popover.locator("button:focus .spelled").inner_text().replace("␣", " ")
    driver.press("Enter")
    driver.ended()
    assert driver.asked[-1]["prompt"] == BEGINNING + wanted


def test_an_alternative_cuts_the_text_and_continues(driver: PageDriver) -> None:
    driver.write(BEGINNING)
    driver.continues(max_tokens=12, temperature=0)
    kept = BEGINNING + "".join(driver.tokens.all_inner_texts()[:5])
    popover = driver.hover(driver.tokens.nth(5))
    other = popover.locator("button:not([aria-current]):not(:disabled)").first
    token = other.locator(".spelled").inner_text().replace("␣", " ")
    other.click()
    driver.ended()
    assert driver.asked[-1]["prompt"] == kept + token
    assert driver.text.startswith(kept + token)
    expect(driver.find("#position"), "it is a sibling of the first text").to_have_text("2 / 2")


def test_a_character_of_several_tokens_is_one_piece_with_correct_offsets(driver: PageDriver) -> None:
    text = "Oné 日本 😀 upon a time"
    driver.write(text)
    driver.scores()
    assert "".join(driver.tokens.all_inner_texts()) == text
    smile = driver.tokens.filter(has_text="😀")
    assert smile.count() == 1
    popover = driver.hover(smile)
    assert "4 tokens" in popover.inner_text()
    assert "⟨F0⟩" in popover.inner_text()
    assert popover.locator("li button", has_text="⟨").and_(popover.locator(":enabled")).count() == 0
    driver.caret(len(text) - 1)
    driver.press("Control+Space")
    expect(driver.find("#popover")).to_have_attribute("aria-label", "Alternatives to ␣time")


def test_generated_characters_can_consist_of_byte_tokens(driver: PageDriver) -> None:
    driver.write("日本日本日本")
    driver.set(max_tokens=12, temperature=0)
    driver.shows("settings")
    driver.find("#field-logit_bias").fill("日")
    driver.press("Enter")
    expect(driver.find(".biases input")).to_have_value("-100")
    driver.find(".biases input").fill("60")
    driver.area.focus()
    driver.press("Control+Enter")
    driver.ended()
    assert driver.mirrored == driver.text
    assert len(driver.text) > 6


def test_boundaries_are_shown_for_all_of_the_text(driver: PageDriver, open_server: Any) -> None:
    driver.write(BEGINNING)
    driver.find("#boundaries").click()
    driver.expect_status("Scored")
    assert driver.tokens.all_inner_texts() == scored(open_server, BEGINNING)["tokens"]
    shadow = driver.tokens.nth(1).evaluate("(node) => getComputedStyle(node).boxShadow")
    assert "inset" in shadow
    driver.find("#boundaries").click()
    assert driver.tokens.nth(1).evaluate("(node) => getComputedStyle(node).boxShadow") == "none"


def test_tokens_with_line_ends_are_whole(driver: PageDriver, open_server: Any) -> None:
    text = "One\n\nTwo\n\n\nThree\n"
    driver.write(text)
    driver.scores()
    assert driver.find("#mirror .first").count() == len(scored(open_server, text)["tokens"])
    assert driver.mirrored == driver.text == text


def test_numbers_of_another_model_are_stale(driver: PageDriver) -> None:
    models = [{"id": name, "object": "model", "max_model_len": 2048} for name in ("afterword-tiny", "another")]
    driver.page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": models}))
    driver.page.reload()
    driver.ready()
    driver.write(BEGINNING)
    driver.scores()
    assert driver.find("#mirror .stale").count() == 0
    driver.find("#model").select_option("another")
    assert driver.find("#mirror .stale").count() == driver.tokens.count() > 0
    driver.find("#model").select_option("afterword-tiny")
    assert driver.find("#mirror .stale").count() == 0


def test_numbers_from_before_an_edit_are_stale(driver: PageDriver) -> None:
    driver.write(BEGINNING)
    driver.scores()
    driver.caret(0)
    driver.page.keyboard.type("X")
    expect(driver.find("#sums-note")).to_contain_text("of another text")
    driver.scores()
    expect(driver.find("#sums-note")).to_be_empty()
    assert driver.find("#mirror .stale").count() == 0
