"""The memory and the author's note of a session, and two models side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from oracle.tiny import write_tiny

from .page_driver import BEGINNING, PageDriver

TEXT = "The first line.\nThe second line.\nThe third line.\nThe last"


def give(driver: PageDriver, memory: str = "", note: str = "", depth: int = 3) -> None:
    driver.shows("settings")
    if driver.find("#notes").get_attribute("open") is None:
        driver.find("#notes summary").click()
    driver.find("#memory").fill(memory)
    driver.find("#note").fill(note)
    driver.find("#note-depth").fill(str(depth))


@pytest.mark.parametrize(
    ("depth", "sent"),
    [
        (1, "A tale.\nThe first line.\nThe second line.\nThe third line.\n[Note]\nThe last"),
        (3, "A tale.\nThe first line.\n[Note]\nThe second line.\nThe third line.\nThe last"),
        (9, "A tale.\n[Note]\n" + TEXT),
    ],
)
def test_memory_and_note_are_sent_and_not_shown(driver: PageDriver, depth: int, sent: str) -> None:
    give(driver, "A tale.", "[Note]", depth)
    driver.write(TEXT)
    driver.continues(max_tokens=4, seed=1)
    assert driver.asked[-1]["prompt"] == sent
    assert driver.text.startswith(TEXT)
    driver.press("Alt+ArrowLeft")
    driver.shows("request")
    expect(driver.find("#python")).to_contain_text("[Note]")


def test_a_line_end_at_the_end_is_not_doubled(driver: PageDriver) -> None:
    give(driver, "A tale.\n\n")
    driver.write("Once")
    driver.continues(max_tokens=2)
    assert driver.asked[-1]["prompt"] == "A tale.\n\nOnce"


def test_scores_are_those_with_memory_and_note(driver: PageDriver, open_server: Any) -> None:
    give(driver, "A tale of a cat named Tom.", "[sad]", 1)
    driver.write(TEXT)
    driver.scores()
    sent = driver.asked[-1]["prompt"]
    with open_server.http() as client:
        body = {"prompt": sent, "max_tokens": 0, "echo": True, "logprobs": 1}
        columns = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    last = columns["tokens"][-1]
    assert driver.tokens.last.inner_text() == last
    driver.caret(len(driver.text) - len(last), len(driver.text))
    expect(driver.find("#sums dd").nth(1)).to_have_text(f"{columns['token_logprobs'][-1]:.2f} nats".replace("-", "−"))
    assert driver.text == TEXT
    assert driver.mirrored == TEXT
    assert driver.find("#mirror .stale").count() == 0
    give(driver, "A tale of a dog.", "[sad]", 1)
    assert driver.find("#mirror .stale").count() == driver.tokens.count() > 0


def test_echo_leaves_memory_and_note_out_of_the_text(driver: PageDriver) -> None:
    give(driver, "A tale.", "[Note]", 2)
    driver.write(TEXT)
    driver.continues(max_tokens=4, echo=True, seed=1)
    assert driver.text.startswith(TEXT)
    assert driver.mirrored == driver.text
    assert "[Note]" not in driver.text
    assert driver.find("#mirror .you.token").count() > 8
    assert driver.find("#mirror .stale").count() == 0


def test_memory_and_note_belong_to_the_session(driver: PageDriver) -> None:
    give(driver, "A tale.", "[Note]", 2)
    driver.write(TEXT)
    driver.shows("sessions")
    driver.find("#session-new").click()
    expect(driver.find("#memory")).to_have_value("")
    driver.find("#sessions .branch").filter(has_text="The first line.").click()
    expect(driver.find("#memory")).to_have_value("A tale.")
    driver.page.reload()
    driver.ready()
    expect(driver.find("#note")).to_have_value("[Note]")
    expect(driver.find("#note-depth")).to_have_value("2")
    expect(driver.find("#notes")).to_have_attribute("open", "")


def test_memory_stays_when_the_oldest_text_is_left_out(driver: PageDriver) -> None:
    give(driver, "A tale.", "[Note]", 2)
    driver.find("#pane-settings > details > summary").click()
    driver.find("#leave-out").check()
    lines = "".join(f"This is line {i} of a text that is too long for the context of the model.\n" for i in range(260))
    driver.write(lines)
    driver.continues(max_tokens=4, seed=1)
    prompt = driver.asked[-1]["prompt"]
    assert prompt.startswith("A tale.\nThis is line ")
    assert prompt.endswith("[Note]\nThis is line 259 of a text that is too long for the context of the model.\n")
    expect(driver.find("#cut")).to_be_visible()


@pytest.fixture(scope="module")
def two_models(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server with two models."""
    folder: Path = tmp_path_factory.mktemp("two")
    models = [str(write_tiny(folder / f"{name}.gguf", seed=i)) for i, name in enumerate(("one", "two"))]
    with serve(*models, "--parallel", "2", key=None) as server:
        yield server


def test_two_models_answer_side_by_side(visit: Any, two_models: Any) -> None:
    driver = visit(two_models.url).open()
    driver.write("a b c")
    driver.find("#pane-settings > details > summary").click()
    first, second = driver.find("#model option").all_inner_texts()
    driver.find("#beside").select_option(second)
    driver.set(max_tokens=6, seed=1)
    driver.area.focus()
    driver.press("Control+Enter")
    driver.ended()
    assert sorted(body["model"] for body in driver.asked) == sorted([first, second])
    assert driver.asked[0]["prompt"] == driver.asked[1]["prompt"] == "a b c"
    cards = driver.find("#card-list article")
    assert cards.locator("h3").all_inner_texts() == [first, second]
    expect(driver.find("#status")).to_contain_text("12 tokens")
    assert driver.find("#cards .stale").count() == 0, "each has the numbers of its model"
    text = cards.nth(1).locator(".mirror").text_content()
    cards.nth(1).get_by_role("button", name="Use answer 2").click()
    assert driver.text.replace("\n", "") == f"a b c{text}"
    expect(driver.find("#position")).to_have_text("2 / 2")


def test_one_model_that_fails_leaves_the_other_its_text(visit: Any, two_models: Any) -> None:
    driver = visit(two_models.url).open()
    second = driver.find("#model option").nth(1).inner_text()
    error = {"error": {"message": "No.", "type": "server_error", "param": None, "code": None}}
    driver.page.route(
        "**/v1/completions",
        lambda route: (
            route.fulfill(status=500, json=error)
            if route.request.post_data_json["model"] == second
            else route.continue_()
        ),
    )
    driver.write("a b c")
    driver.find("#pane-settings > details > summary").click()
    driver.find("#beside").select_option(second)
    driver.set(max_tokens=6)
    driver.find("#go").click()
    expect(driver.find("#notice-text")).to_have_text("No.")
    expect(driver.find("#card-list article").nth(0)).to_contain_text("6 tokens")
    expect(driver.find("#card-list article").nth(1)).to_contain_text("0 tokens")
    driver.problems[:] = [line for line in driver.problems if "status of 500" not in line]


def test_a_server_with_one_model_offers_no_second_one(driver: PageDriver) -> None:
    driver.find("#pane-settings > details > summary").click()
    expect(driver.find("#face")).to_be_visible()
    expect(driver.find("#beside")).to_be_hidden()
    driver.write(BEGINNING)
    driver.continues(max_tokens=2)
    assert len(driver.asked) == 1
