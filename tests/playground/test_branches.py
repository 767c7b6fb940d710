"""Branches: every answer stays, beside the others, under the text that it continued."""

from __future__ import annotations

import json
from typing import Any

from playwright.sync_api import expect

from .page_driver import BEGINNING, PageDriver


def test_several_answers_stand_side_by_side_until_one_is_picked(visitor: PageDriver) -> None:
    visitor.write(BEGINNING)
    visitor.set(n=3, max_tokens=10, seed=4)
    visitor.area.focus()
    visitor.press("Control+Enter")
    visitor.ended()
    cards = visitor.find("#card-list article")
    assert cards.count() == 3
    assert visitor.text == BEGINNING, "nothing is chosen yet"
    texts = [card.locator(".mirror").text_content() or "" for card in cards.all()]
    assert len(set(texts)) == 3
    assert "10 tokens" in cards.nth(1).inner_text()
    assert visitor.find("#cards .token").count() > visitor.find("#cards .stale").count() == 0
    cards.nth(1).get_by_role("button", name="Use answer 2").click()
    assert visitor.text.replace("\n", "") == BEGINNING + texts[1].replace("\n", "")
    expect(visitor.find("#cards")).to_be_hidden()
    expect(visitor.find("#position")).to_have_text("2 / 3")
    for keys, index in (("Alt+ArrowDown", 2), ("Alt+ArrowUp", 1), ("Alt+ArrowUp", 0)):
        visitor.press(keys)
        assert visitor.text.replace("\n", "") == BEGINNING + texts[index].replace("\n", ""), keys


def test_an_answer_that_ended_at_once_is_shown_and_is_no_branch(visitor: PageDriver) -> None:
    def choice(index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": "stop"}

    events = [{"choices": [choice(0, "")]}, {"choices": [choice(1, " there")]}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    visitor.page.route("**/v1/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    visitor.write("Hello")
    visitor.set(n=2)
    visitor.area.focus()
    visitor.press("Control+Enter")
    visitor.ended()
    cards = visitor.find("#card-list article")
    expect(cards).to_have_count(2)
    expect(cards.nth(0)).to_contain_text("0 tokens")
    expect(cards.nth(0).locator("button")).to_be_disabled()
    cards.nth(1).locator("button").click()
    assert visitor.text == "Hello there"
    expect(visitor.find("#position")).to_have_text("1 / 1")


def test_answers_can_be_put_away_and_found_again(visitor: PageDriver) -> None:
    visitor.write(BEGINNING)
    visitor.set(n=2, max_tokens=4)
    visitor.area.focus()
    visitor.press("Control+Enter")
    visitor.ended()
    visitor.find("#cards [data-close]").click()
    expect(visitor.find("#cards")).to_be_hidden()
    assert visitor.text == BEGINNING
    visitor.press("Alt+ArrowRight")
    assert len(visitor.text) > len(BEGINNING)


def test_alternatives_of_a_card_go_on_from_there(visitor: PageDriver) -> None:
    visitor.write(BEGINNING)
    visitor.set(n=2, max_tokens=6)
    visitor.area.focus()
    visitor.press("Control+Enter")
    visitor.ended()
    visitor.set(n=1)
    card = visitor.find("#card-list article").nth(1).locator(".token")
    first = card.nth(0).inner_text()
    visitor.hover(card.nth(1)).locator("button:not([aria-current]):not(:disabled)").first.click()
    visitor.ended()
    assert visitor.asked[-1]["prompt"].startswith(BEGINNING + first)


def test_the_arrows_walk_the_tree(visitor: PageDriver) -> None:
    visitor.write(BEGINNING)
    first = BEGINNING + visitor.continues(max_tokens=5, seed=1)
    second = first + visitor.continues()
    visitor.press("Alt+ArrowLeft")
    assert visitor.text == first
    visitor.press("Alt+ArrowLeft")
    assert visitor.text == BEGINNING
    visitor.press("Alt+ArrowLeft")
    assert visitor.text == BEGINNING, "there is nothing before the beginning"
    visitor.press("Alt+ArrowRight")
    visitor.press("Alt+ArrowRight")
    assert visitor.text == second


def test_write_again_makes_a_sibling(visitor: PageDriver) -> None:
    visitor.write(BEGINNING)
    first = visitor.continues(max_tokens=12)
    visitor.press("Alt+KeyR")
    visitor.ended()
    again = visitor.text[len(BEGINNING) :]
    assert visitor.asked[0] == visitor.asked[1]
    assert again != first, "which was drawn at random: one of 10^10"
    expect(visitor.find("#position")).to_have_text("2 / 2")
    visitor.press("Alt+ArrowUp")
    assert visitor.text == BEGINNING + first


def test_undo_and_redo_go_through_edits_and_answers(visitor: PageDriver) -> None:
    visitor.area.focus()
    visitor.page.keyboard.type("One day")
    answered = "One day" + visitor.continues(max_tokens=5, seed=1)
    visitor.caret(len(answered))
    visitor.page.keyboard.type("!")
    steps = ["", "One day", answered, f"{answered}!"]
    for text in reversed(steps[:-1]):
        visitor.press("Control+z")
        assert visitor.text == text
    for text in steps[1:]:
        visitor.press("Control+Shift+z")
        assert visitor.text == text
    assert visitor.find("#mirror .token").count() > 0, "numbers come back too"


def test_undo_during_an_answer_stops_and_takes_it_back(visitor: PageDriver) -> None:
    visitor.begins_endless()
    visitor.press("Control+z")
    assert visitor.text == BEGINNING
    expect(visitor.find("#go")).to_have_text("Continue")
    visitor.press("Control+Shift+z")
    assert len(visitor.text) > len(BEGINNING) + 20


def test_what_a_model_wrote_is_not_lost_when_it_is_deleted(visitor: PageDriver) -> None:
    visitor.write(BEGINNING)
    answer = visitor.continues(max_tokens=6, seed=1)
    visitor.write("Something else.")
    visitor.continues(seed=2)
    visitor.shows("branches")
    expect(visitor.find("#branches .branch")).to_have_count(4)
    labels = visitor.find("#branches .branch span").all_inner_texts()
    assert any(answer.strip()[:10] in label for label in labels)


def test_the_list_of_branches_goes_to_each(visitor: PageDriver) -> None:
    visitor.write(BEGINNING)
    first = BEGINNING + visitor.continues(max_tokens=5, seed=1)
    visitor.press("Alt+ArrowLeft")
    second = BEGINNING + visitor.continues(seed=2)
    visitor.shows("branches")
    rows = visitor.find("#branches .branch")
    expect(rows).to_have_count(3)
    expect(rows.nth(2)).to_have_attribute("aria-current", "true")
    rows.nth(1).click()
    assert visitor.text == first
    rows.nth(0).click()
    assert visitor.text == BEGINNING
    rows.nth(2).click()
    assert visitor.text == second
