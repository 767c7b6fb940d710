"""Two tabs with one session: one follows the other, or asks. No text is lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from .page_driver import BEGINNING, PageDriver

SAVES_NEVER = """() => {
  const later = window.setTimeout;
  for (let timer = later(() => {}); timer > 0; timer--) clearTimeout(timer);  // one may be about to save
  window.setTimeout = (act, pause, ...rest) => later(act, pause === 800 ? 1e9 : pause, ...rest);
}"""
HEARS_NOTHING = "addEventListener('storage', (event) => event.stopImmediatePropagation());"


@pytest.fixture
def other(driver: PageDriver) -> Iterator[PageDriver]:
    """A second tab, opened on the session of the first."""
    driver.write("The first words.")
    driver.shows("sessions")  # saves at once
    other = PageDriver(driver.page.context.new_page(), driver.url).open()
    assert other.text == driver.text
    yield other
    assert not other.problems


def saves(driver: PageDriver, text: str) -> None:
    """Replace the document and save at once."""
    driver.write(text)
    driver.shows("sessions")


def test_a_tab_follows_the_other(driver: PageDriver, other: PageDriver) -> None:
    saves(other, "The second words.")
    expect(driver.area).to_have_value("The second words.")
    driver.continues(max_tokens=4, seed=1)
    expect(other.area).to_have_value(driver.text)
    expect(other.tokens).to_have_count(driver.tokens.count())
    other.shows("settings")
    expect(other.find("#field-max_tokens")).to_have_value("4")
    expect(other.find("#offer")).to_be_hidden()
    expect(driver.find("#offer")).to_be_hidden()
    other.press("Alt+ArrowLeft")
    assert other.text == "The second words."


def asked(driver: PageDriver, other: PageDriver) -> None:
    """Both tabs have changed the text; the first one asks."""
    driver.page.evaluate(SAVES_NEVER)
    driver.write("My words.")
    saves(other, "Other words.")
    expect(driver.find("#offer")).to_contain_text("Another tab has changed this session.")
    assert driver.text == "My words."


def names(driver: PageDriver) -> list[str]:
    driver.find("#tab-sessions").click()
    return driver.find("#sessions .branch span").all_inner_texts()


def test_a_tab_with_changes_asks_and_can_show_the_others_text(driver: PageDriver, other: PageDriver) -> None:
    asked(driver, other)
    driver.find("#offer").get_by_role("button", name="Show its text").click()
    expect(driver.area).to_have_value("Other words.")
    expect(driver.find("#offer")).to_be_hidden()


def test_a_tab_with_changes_can_keep_its_text(driver: PageDriver, other: PageDriver) -> None:
    asked(driver, other)
    driver.find("#offer").get_by_role("button", name="Keep this text").click()
    expect(other.area).to_have_value("My words.")
    assert driver.text == "My words."


def test_both_texts_can_be_kept(driver: PageDriver, other: PageDriver) -> None:
    asked(driver, other)
    driver.find("#offer").get_by_role("button", name="Keep both").click()
    assert names(driver)[0].endswith("(2)")
    assert len(names(driver)) == 2
    assert (driver.text, other.text) == ("My words.", "Other words.")
    saves(driver, "My other words.")
    expect(other.find("#sessions li")).to_have_count(2)
    assert other.text == "Other words."


@pytest.mark.parametrize("way", ["reload", "new"])
def test_a_tab_that_is_left_before_the_choice_keeps_both(driver: PageDriver, other: PageDriver, way: str) -> None:
    asked(driver, other)
    if way == "reload":
        driver.page.reload()
        driver.ready()
        assert driver.text == "My words."
    else:
        driver.shows("sessions")
        driver.find("#session-new").click()
        assert driver.text == ""
    assert any(name.endswith("(2)") for name in names(driver))
    assert len(names(driver)) == 2
    assert other.text == "Other words."


def test_the_question_stays_before_other_offers_and_edits(driver: PageDriver, other: PageDriver) -> None:
    asked(driver, other)
    driver.caret(0)
    driver.page.keyboard.type("All ")
    driver.continues(max_tokens=3)
    expect(driver.find("#offer")).to_contain_text("Another tab has changed this session.")
    driver.find("#offer").get_by_role("button", name="Keep this text").click()
    expect(other.area).to_have_value(driver.text)


def test_a_tab_that_generates_asks(driver: PageDriver, other: PageDriver) -> None:
    driver.begins_endless()
    saves(other, "Other words.")
    expect(driver.find("#offer")).to_contain_text("Another tab has changed this session.")
    driver.press("Escape")
    assert driver.text.startswith(BEGINNING)
    driver.find("#offer").get_by_role("button", name="Keep both").click()
    assert other.text == "Other words."
    assert len(names(driver)) == 2


def test_a_change_that_was_not_heard_of_is_found_when_the_text_is_saved(driver: PageDriver) -> None:
    saves(driver, "The first words.")
    deaf = PageDriver(driver.page.context.new_page(), driver.url)
    deaf.page.add_init_script(HEARS_NOTHING)
    deaf.open()
    saves(driver, "Other words.")
    saves(deaf, "My words.")
    expect(deaf.find("#offer")).to_contain_text("Another tab has changed this session.")
    assert driver.text == "Other words."


def test_each_tab_reopens_its_own_session(driver: PageDriver, other: PageDriver) -> None:
    other.shows("sessions")
    other.find("#session-new").click()
    saves(other, "Another session.")
    for tab, text in ((driver, "The first words."), (other, "Another session.")):
        tab.page.reload()
        tab.ready()
        assert tab.text == text


def test_a_session_that_another_tab_deletes_can_be_saved_again(driver: PageDriver, other: PageDriver) -> None:
    other.shows("sessions")
    other.page.get_by_role("button", name="Delete The first words.").click()
    expect(driver.find("#offer")).to_contain_text("Another tab has deleted this session.")
    assert driver.text == "The first words."
    driver.find("#offer").get_by_role("button", name="Save it again").click()
    expect(other.find("#sessions .branch span")).to_have_text(["The first words."])


def test_a_name_is_shown_in_the_other_tab(driver: PageDriver, other: PageDriver) -> None:
    other.shows("sessions")
    other.find("#session-name").fill("A name")
    driver.shows("sessions")
    expect(driver.find("#session-name")).to_have_value("A name")
    saves(driver, "The next words.")
    assert names(driver) == ["A name"]
