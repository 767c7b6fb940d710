"""Branches: the tree keeps every generated text under the text that it continues."""

from __future__ import annotations

import json
from typing import Any

from playwright.sync_api import expect

from .page_driver import BEGINNING, PageDriver
from .test_interruptions import respond


def test_several_choices_are_shown_until_one_is_picked(driver: PageDriver) -> None:
    driver.write(BEGINNING)
    driver.set(n=3, max_tokens=10, seed=4)
    driver.area.focus()
    driver.press("Control+Enter")
    driver.ended()
    cards = driver.find("#card-list article")
    assert cards.count() == 3
    assert driver.text == BEGINNING, "nothing is chosen yet"
    texts = [card.locator(".mirror").text_content() or "" for card in cards.all()]
    assert len(set(texts)) == 3
    assert "10 tokens" in cards.nth(1).inner_text()
    assert driver.find("#cards .token").count() > driver.find("#cards .stale").count() == 0
    cards.nth(1).get_by_role("button", name="Use answer 2").click()
    assert driver.text.replace("\n", "") == BEGINNING + texts[1].replace("\n", "")
    expect(driver.find("#cards")).to_be_hidden()
    expect(driver.find("#position")).to_have_text("2 / 3")
    for keys, index in (("Alt+ArrowDown", 2), ("Alt+ArrowUp", 1), ("Alt+ArrowUp", 0)):
        driver.press(keys)
        assert driver.text.replace("\n", "") == BEGINNING + texts[index].replace("\n", ""), keys


def test_an_empty_choice_is_shown_and_adds_no_branch(driver: PageDriver) -> None:
    def choice(index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": "stop"}

    events = [{"choices": [choice(0, "")]}, {"choices": [choice(1, " there")]}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    driver.page.route("**/v1/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    driver.write("Hello")
    driver.set(n=2)
    driver.area.focus()
    driver.press("Control+Enter")
    driver.ended()
    cards = driver.find("#card-list article")
    expect(cards).to_have_count(2)
    expect(cards.nth(0)).to_contain_text("0 tokens")
    expect(cards.nth(0).locator("button")).to_be_disabled()
    cards.nth(1).locator("button").click()
    assert driver.text == "Hello there"
    expect(driver.find("#position")).to_have_text("1 / 1")


def test_closed_choices_stay_in_the_branches(driver: PageDriver) -> None:
    driver.write(BEGINNING)
    driver.set(n=2, max_tokens=4)
    driver.area.focus()
    driver.press("Control+Enter")
    driver.ended()
    driver.find("#cards [data-close]").click()
    expect(driver.find("#cards")).to_be_hidden()
    assert driver.text == BEGINNING
    driver.press("Alt+ArrowRight")
    assert len(driver.text) > len(BEGINNING)


def test_an_alternative_in_a_choice_continues_from_its_token(driver: PageDriver) -> None:
    driver.write(BEGINNING)
    driver.set(n=2, max_tokens=6)
    driver.area.focus()
    driver.press("Control+Enter")
    driver.ended()
    driver.set(n=1)
    card = driver.find("#card-list article").nth(1).locator(".token")
    first = card.nth(0).inner_text()
    driver.hover(card.nth(1)).locator("button:not([aria-current]):not(:disabled)").first.click()
    driver.ended()
    assert driver.asked[-1]["prompt"].startswith(BEGINNING + first)


def test_arrow_keys_move_through_the_tree(driver: PageDriver) -> None:
    driver.write(BEGINNING)
    first = BEGINNING + driver.continues(max_tokens=5, seed=1)
    second = first + driver.continues()
    driver.press("Alt+ArrowLeft")
    assert driver.text == first
    driver.press("Alt+ArrowLeft")
    assert driver.text == BEGINNING
    driver.press("Alt+ArrowLeft")
    assert driver.text == BEGINNING, "there is nothing before the beginning"
    driver.press("Alt+ArrowRight")
    driver.press("Alt+ArrowRight")
    assert driver.text == second


def test_write_again_makes_a_sibling(driver: PageDriver) -> None:
    driver.write(BEGINNING)
    first = driver.continues(max_tokens=12)
    driver.press("Alt+KeyR")
    driver.ended()
    again = driver.text[len(BEGINNING) :]
    assert driver.asked[0] == driver.asked[1]
    assert again != first, "which was drawn at random: one of 10^10"
    expect(driver.find("#position")).to_have_text("2 / 2")
    driver.press("Alt+ArrowUp")
    assert driver.text == BEGINNING + first


def test_undo_and_redo_go_through_edits_and_answers(driver: PageDriver) -> None:
    driver.write("")
    driver.area.focus()
    driver.page.keyboard.type("One day")
    answered = "One day" + driver.continues(max_tokens=5, seed=1)
    driver.caret(len(answered))
    driver.page.keyboard.type("!")
    steps = ["", "One day", answered, f"{answered}!"]
    for text in reversed(steps[:-1]):
        driver.press("Control+z")
        assert driver.text == text
    for text in steps[1:]:
        driver.press("Control+Shift+z")
        assert driver.text == text
    assert driver.find("#mirror .token").count() > 0, "numbers come back too"


def test_undo_during_an_answer_stops_and_takes_it_back(driver: PageDriver) -> None:
    driver.begins_endless()
    driver.press("Control+z")
    assert driver.text == BEGINNING
    expect(driver.find("#go")).to_have_text("Continue")
    driver.press("Control+Shift+z")
    assert len(driver.text) > len(BEGINNING) + 20


def test_deleted_generated_text_stays_in_the_tree(driver: PageDriver) -> None:
    driver.write(BEGINNING)
    answer = driver.continues(max_tokens=6, seed=1)
    driver.write("Something else.")
    driver.continues(seed=2)
    driver.shows("branches")
    expect(driver.find("#branches .branch")).to_have_count(4)
    labels = driver.find("#branches .branch span").all_inner_texts()
    assert any(answer.strip()[:10] in label for label in labels)


def test_a_click_in_the_branch_list_opens_the_branch(driver: PageDriver) -> None:
    driver.write(BEGINNING)
    first = BEGINNING + driver.continues(max_tokens=5, seed=1)
    driver.press("Alt+ArrowLeft")
    second = BEGINNING + driver.continues(seed=2)
    driver.shows("branches")
    rows = driver.find("#branches .branch")
    expect(rows).to_have_count(3)
    expect(rows.nth(2)).to_have_attribute("aria-current", "true")
    rows.nth(1).click()
    assert driver.text == first
    rows.nth(0).click()
    assert driver.text == BEGINNING
    rows.nth(2).click()
    assert driver.text == second


def answers(driver: PageDriver, *texts: str) -> None:
    """Generate these texts below the document, one after the other."""
    driver.write("Once")
    for text in texts:
        respond(driver, {"text": text, "finish_reason": "stop"})
        driver.area.focus()
        driver.press("Control+Enter")
        driver.ended()
        driver.page.unroute("**/v1/completions")
        driver.press("Alt+ArrowLeft")
    driver.shows("branches")
    expect(driver.find("#branches .branch")).to_have_count(len(texts) + 1)  # the list is drawn after the text


def goes(driver: PageDriver, number: int) -> None:
    """Move to a branch of the list, and wait for the list, which is drawn after the text."""
    driver.find("#branches .branch").nth(number).click()
    expect(driver.find("#branches .branch").nth(number)).to_have_attribute("aria-current", "true")


def rows(driver: PageDriver) -> list[str]:
    return driver.find("#branches .branch > :first-child").all_inner_texts()


def test_branches_show_where_they_part(driver: PageDriver) -> None:
    answers(driver, " there was a cat who sat down.", " there was a cat who saw a dog.", " a king")
    assert rows(driver) == ["Once", "there was a cat who sat down.", "there was a cat who saw a dog.", "a king"]
    shared = driver.find("#branches .branch i")
    assert shared.all_text_contents() == ["there was a cat who "] * 2


def test_what_long_branches_share_is_shortened(driver: PageDriver) -> None:
    answers(driver, " word" * 30 + " one", " word" * 30 + " two")
    assert [text[0] + text[-4:] for text in rows(driver)[1:]] == ["… one", "… two"]
    assert all(len(text) < 40 for text in rows(driver)[1:])


def test_branches_can_be_collapsed(driver: PageDriver) -> None:
    answers(driver, " one", " two")
    goes(driver, 1)
    answer = driver.continues(max_tokens=3, seed=1)
    driver.shows("branches")
    expect(driver.find("#branches .branch")).to_have_count(4)
    fold = driver.find("#branches li").nth(1).locator("button.fold")
    fold.focus()
    driver.press("Enter")
    expect(driver.find("#branches .branch")).to_have_count(3)
    expect(driver.find("#branches [aria-current]")).to_have_attribute("aria-current", "location")
    expect(driver.find("#branches li").nth(1)).to_contain_text("+1")
    expect(fold, "the keyboard stays at the button").to_be_focused()
    expect(fold).to_have_attribute("aria-expanded", "false")
    driver.shows("sessions")
    driver.page.reload()
    driver.ready()
    assert driver.text.endswith(answer)
    driver.shows("branches")
    expect(driver.find("#branches .branch"), "it is kept").to_have_count(3)
    fold.click()
    expect(driver.find("#branches .branch")).to_have_count(4)
    goes(driver, 3)
    driver.find("#branch-fold").click()
    expect(driver.find("#branches .branch")).to_have_count(3)


def test_a_branch_has_a_name(driver: PageDriver) -> None:
    answers(driver, " one", " two")
    goes(driver, 1)
    driver.find("#branch-name").fill("The first way")
    expect(driver.find("#branches strong")).to_have_text("The first way")
    goes(driver, 2)
    expect(driver.find("#branch-name")).to_have_value("")
    driver.shows("sessions")
    driver.page.reload()
    driver.ready()
    driver.shows("branches")
    expect(driver.find("#branches strong")).to_have_text("The first way")
    goes(driver, 1)
    driver.find("#branch-name").fill("")
    expect(driver.find("#branches strong")).to_have_count(0)


def test_a_branch_is_deleted_and_taken_back(driver: PageDriver) -> None:
    answers(driver, " one", " two")
    goes(driver, 1)
    driver.continues(max_tokens=3, seed=1)
    text = driver.text
    driver.press("Alt+ArrowLeft")
    assert driver.text == "Once one"
    driver.shows("branches")
    driver.find("#branch-delete").click()
    assert driver.text == "Once"
    expect(driver.find("#branches .branch")).to_have_count(2)
    assert rows(driver) == ["Once", "two"]
    expect(driver.find("#offer")).to_contain_text("Deleted 2 branches.")
    driver.find("#offer").get_by_role("button", name="Take it back").click()
    assert driver.text == "Once one"
    expect(driver.find("#branches .branch")).to_have_count(4)
    driver.press("Alt+ArrowRight")
    assert driver.text == text
    driver.find("#branch-delete").click()
    driver.shows("sessions")
    driver.page.reload()
    driver.ready()
    driver.shows("branches")
    expect(driver.find("#branches .branch"), "and the deletion is kept").to_have_count(3)


def test_the_last_branch_can_be_deleted(driver: PageDriver) -> None:
    driver.write("Once")
    driver.shows("branches")
    driver.find("#branch-delete").click()
    assert driver.text == ""
    expect(driver.find("#branches .branch")).to_have_count(1)
    driver.find("#offer").get_by_role("button", name="Take it back").click()
    assert driver.text == "Once"
    expect(driver.find("#branches .branch")).to_have_count(1)
    driver.continues(max_tokens=2)
    assert driver.asked[-1]["prompt"] == "Once"
