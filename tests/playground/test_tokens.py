"""Tokens and their numbers: colours, alternatives, the score of a text; all as in the server's responses."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from playwright.sync_api import expect

from .page_driver import BEGINNING, PageDriver


def scored(server: Any, text: str) -> dict[str, list[Any]]:
    """The server's own columns for a text."""
    with server.http() as client:
        body = {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 5}
        columns: dict[str, list[Any]] = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
        return columns


def sums(visitor: PageDriver) -> dict[str, str]:
    names = visitor.find("#sums dt").all_inner_texts()
    return dict(zip(names, visitor.find("#sums dd").all_inner_texts(), strict=True))


def amount(text: str) -> float:
    return float(text.removesuffix(" nats").replace("−", "-").replace(",", ""))


def percent(logprob: float) -> str:
    share = 100 * math.exp(logprob)
    return "100 %" if share >= 99.95 else f"{share:.{1 if share >= 9.95 else 2}f} %" if share >= 0.01 else "< 0.01 %"


def test_score_has_the_probabilities_of_the_documents_own_tokens(visitor: PageDriver, open_server: Any) -> None:
    visitor.write(BEGINNING)
    visitor.scores()
    columns = scored(open_server, BEGINNING)
    assert visitor.tokens.all_inner_texts() == columns["tokens"]
    assert visitor.find("#mirror .model").count() == 0, "what was typed stays typed"
    total = sum(columns["token_logprobs"][1:])
    count = len(columns["tokens"]) - 1
    expect(visitor.find("#sums")).to_contain_text("perplexity")
    found = sums(visitor)
    assert amount(found["tokens"]) == count + 1
    assert amount(found["log probability"]) == pytest.approx(total, abs=0.006)
    assert amount(found["mean"]) == pytest.approx(total / count, abs=0.0006)
    assert amount(found["perplexity"]) == pytest.approx(math.exp(-total / count), abs=0.006)
    size = len("".join(columns["tokens"][1:]).encode())
    assert amount(found["bits per byte"]) == pytest.approx(-total / math.log(2) / size, abs=0.0006)
    assert visitor.text == BEGINNING


def test_the_course_of_surprise_leads_into_the_text(visitor: PageDriver) -> None:
    visitor.write(f"{BEGINNING} " * 60)
    visitor.scores()
    course = visitor.find("#course")
    expect(course.locator("path")).to_have_attribute("d", re.compile("^M"))
    box = course.bounding_box()
    assert box is not None
    course.click(position={"x": box["width"] * 0.9, "y": 8})
    caret = visitor.area.evaluate("(area) => area.selectionStart")
    assert 0.85 < caret / len(visitor.text) < 0.95
    assert visitor.find("#page").evaluate("(page) => page.scrollTop") > 0


def test_what_is_selected_is_summed_by_itself(visitor: PageDriver, open_server: Any) -> None:
    visitor.write(BEGINNING)
    visitor.scores()
    columns = scored(open_server, BEGINNING)
    start, end = columns["text_offset"][3], columns["text_offset"][7]
    visitor.caret(start, end)
    expect(visitor.find("#sums dt").first).to_have_text("selected tokens")
    found = sums(visitor)
    assert amount(found["selected tokens"]) == 4
    assert amount(found["log probability"]) == pytest.approx(sum(columns["token_logprobs"][3:7]), abs=0.006)


def test_colour_is_the_probability_or_the_surprise_or_nothing(visitor: PageDriver, open_server: Any) -> None:
    visitor.write(BEGINNING)
    visitor.scores()
    logprobs = scored(open_server, BEGINNING)["token_logprobs"]
    likely = max(range(1, len(logprobs)), key=lambda i: logprobs[i])
    unlikely = min(range(1, len(logprobs)), key=lambda i: logprobs[i])

    def ink(index: int) -> float:
        """How much colour lies under a token: the alpha of its background."""
        colour = visitor.tokens.nth(index).evaluate("(node) => getComputedStyle(node).backgroundColor")
        numbers = [float(found) for found in re.findall(r"[\d.]+", colour)]
        return numbers[3] if len(numbers) == 4 else 1.0 if "rgba" not in colour else 0.0

    for mode in ("probability", "surprise"):
        visitor.find(f'#colour [value="{mode}"]').check(force=True)
        assert ink(unlikely) > ink(likely) + 0.2, mode
    visitor.find('#colour [value="off"]').check(force=True)
    assert ink(unlikely) == ink(likely) == 0


def test_pointing_at_a_token_shows_its_alternatives(visitor: PageDriver, open_server: Any) -> None:
    visitor.write(BEGINNING)
    visitor.scores()
    columns = scored(open_server, BEGINNING)
    popover = visitor.hover(visitor.tokens.nth(4))
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
    visitor.page.mouse.move(5, 5)
    expect(popover).to_be_hidden()


def test_the_keyboard_reaches_alternatives_and_takes_one(visitor: PageDriver) -> None:
    visitor.write(BEGINNING)
    visitor.continues(max_tokens=10, temperature=0)
    visitor.caret(len(visitor.text))
    visitor.press("Control+Space")
    expect(visitor.find("#popover")).to_be_visible()
    visitor.press("Escape")
    visitor.caret(len(BEGINNING) + 1)
    visitor.press("Control+Space")
    popover = visitor.find("#popover")
    expect(popover).to_be_visible()
    expect(popover).not_to_contain_text("score again")
    expect(popover.locator("button:focus")).to_be_visible()
    assert len(visitor.asked) == 1, "the key that opens it chooses nothing"
    visitor.press("Escape")
    expect(popover).to_be_hidden()
    expect(visitor.area).to_be_focused()
    visitor.press("Control+Space")
    visitor.press("ArrowDown")
    wanted = popover.locator("button:focus .spelled").inner_text().replace("␣", " ")
    visitor.press("Enter")
    visitor.ended()
    assert visitor.asked[-1]["prompt"] == BEGINNING + wanted


def test_an_alternative_cuts_the_text_there_and_goes_on_from_it(visitor: PageDriver) -> None:
    visitor.write(BEGINNING)
    visitor.continues(max_tokens=12, temperature=0)
    kept = BEGINNING + "".join(visitor.tokens.all_inner_texts()[:5])
    popover = visitor.hover(visitor.tokens.nth(5))
    other = popover.locator("button:not([aria-current]):not(:disabled)").first
    token = other.locator(".spelled").inner_text().replace("␣", " ")
    other.click()
    visitor.ended()
    assert visitor.asked[-1]["prompt"] == kept + token
    assert visitor.text.startswith(kept + token)
    expect(visitor.find("#position"), "it is a branch beside the first answer").to_have_text("2 / 2")


def test_a_character_of_several_tokens_is_one_piece_and_offsets_hold_after_it(visitor: PageDriver) -> None:
    text = "Oné 日本 😀 upon a time"
    visitor.write(text)
    visitor.scores()
    assert "".join(visitor.tokens.all_inner_texts()) == text
    smile = visitor.tokens.filter(has_text="😀")
    assert smile.count() == 1
    popover = visitor.hover(smile)
    assert "4 tokens" in popover.inner_text()
    assert "⟨F0⟩" in popover.inner_text()
    assert popover.locator("li button", has_text="⟨").and_(popover.locator(":enabled")).count() == 0
    visitor.caret(len(text) - 1)
    visitor.press("Control+Space")
    expect(visitor.find("#popover")).to_have_attribute("aria-label", "Alternatives to ␣time")


def test_generated_characters_may_be_made_of_bytes(visitor: PageDriver) -> None:
    visitor.write("日本日本日本")
    visitor.set(max_tokens=12, temperature=0)
    visitor.shows("settings")
    visitor.find("#field-logit_bias").fill("日")
    visitor.press("Enter")
    expect(visitor.find(".biases input")).to_have_value("-100")
    visitor.find(".biases input").fill("60")
    visitor.area.focus()
    visitor.press("Control+Enter")
    visitor.ended()
    assert visitor.mirrored == visitor.text
    assert len(visitor.text) > 6


def test_boundaries_are_shown_for_all_of_the_text(visitor: PageDriver, open_server: Any) -> None:
    visitor.write(BEGINNING)
    visitor.find("#boundaries").click()
    visitor.says("Scored")
    assert visitor.tokens.all_inner_texts() == scored(open_server, BEGINNING)["tokens"]
    shadow = visitor.tokens.nth(1).evaluate("(node) => getComputedStyle(node).boxShadow")
    assert "inset" in shadow
    visitor.find("#boundaries").click()
    assert visitor.tokens.nth(1).evaluate("(node) => getComputedStyle(node).boxShadow") == "none"


def test_tokens_with_line_ends_are_whole(visitor: PageDriver, open_server: Any) -> None:
    text = "One\n\nTwo\n\n\nThree\n"
    visitor.write(text)
    visitor.scores()
    assert visitor.find("#mirror .first").count() == len(scored(open_server, text)["tokens"])
    assert visitor.mirrored == visitor.text == text


def test_another_models_numbers_are_told_apart(visitor: PageDriver) -> None:
    models = [{"id": name, "object": "model", "max_model_len": 2048} for name in ("afterword-tiny", "another")]
    visitor.page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": models}))
    visitor.page.reload()
    visitor.ready()
    visitor.write(BEGINNING)
    visitor.scores()
    assert visitor.find("#mirror .stale").count() == 0
    visitor.find("#model").select_option("another")
    assert visitor.find("#mirror .stale").count() == visitor.tokens.count() > 0
    visitor.find("#model").select_option("afterword-tiny")
    assert visitor.find("#mirror .stale").count() == 0


def test_numbers_from_before_an_edit_are_told_apart(visitor: PageDriver) -> None:
    visitor.write(BEGINNING)
    visitor.scores()
    visitor.caret(0)
    visitor.page.keyboard.type("X")
    expect(visitor.find("#sums-note")).to_contain_text("of another text")
    visitor.scores()
    expect(visitor.find("#sums-note")).to_be_empty()
    assert visitor.find("#mirror .stale").count() == 0
