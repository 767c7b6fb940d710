"""Files for other programs, presets of settings, spell check, and texts from right to left."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from .page_driver import BEGINNING, PageDriver
from .test_interruptions import respond


def exported(driver: PageDriver, kind: str, folder: Path) -> tuple[str, str]:
    """The name and the content of the exported file."""
    driver.shows("sessions")
    driver.find("#export-kind").select_option(kind)
    with driver.page.expect_download() as download:
        driver.find("#session-export").click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path.name, path.read_bytes().decode("utf-8")


def test_the_text_is_exported(driver: PageDriver, tmp_path: Path) -> None:
    driver.write("Ein Märchen\n\n日本")
    assert exported(driver, "text", tmp_path) == ("Ein Märchen 日本.txt", "Ein Märchen\n\n日本\n")


def test_the_text_is_exported_as_markdown(driver: PageDriver, tmp_path: Path, open_server: Any) -> None:
    driver.write("One\nTwo\n\n```\na\nb\n```\n\nThree\n")
    driver.set(max_tokens=7, temperature=0)
    driver.shows("sessions")
    driver.find("#session-name").fill("Counting: a story")
    name, text = exported(driver, "markdown", tmp_path)
    assert name == "Counting a story.md"
    assert text.startswith("# Counting: a story\n\nOne  \nTwo\n\n```\na\nb\n```\n\nThree\n\n---\n")
    assert f"Written with {open_server.model}, max_tokens 7, temperature 0" in text


def test_the_tokens_are_exported_as_a_table(driver: PageDriver, tmp_path: Path, open_server: Any) -> None:
    text = 'He said: "日本, 😀"\nand left'
    driver.write(text)
    driver.scores()
    driver.area.focus()
    driver.press("Control+End")
    driver.page.keyboard.type("!")
    _, table = exported(driver, "table", tmp_path)
    rows = list(csv.DictReader(io.StringIO(table, newline="")))
    with open_server.http() as client:
        body = {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 5, "return_token_ids": True}
        columns = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert [row["text"] for row in rows] == [*columns["tokens"], "!"]
    assert [int(row["offset"]) for row in rows] == [*columns["text_offset"], len(text)]
    scored = [row for row in rows if row["log_probability"]]
    found = [float(row["log_probability"]) for row in scored]
    assert found == pytest.approx(columns["token_logprobs"][1:])
    assert [float(row["probability"]) for row in scored] == pytest.approx([math.exp(value) for value in found])
    assert {row["author"] for row in rows} == {"you"}
    assert {row["stale"] for row in scored} == {"false"}
    assert all(row["token_id"].isdigit() for row in scored)
    assert all(row["rank"].isdigit() for row in scored)
    best = {row["alternative_1"]: float(row["alternative_1_log_probability"]) for row in scored[:1]}
    assert best.items() <= columns["top_logprobs"][1].items()


def test_presets_are_saved_applied_and_deleted(driver: PageDriver) -> None:
    driver.find("#presets summary").click()
    driver.set(temperature=0.2, max_tokens=33)
    driver.find("#field-stop").fill(".")
    driver.press("Enter")
    driver.find("#preset-name").fill("Careful")
    driver.press("Enter")
    preset = driver.find("#preset-list .branch")
    expect(preset).to_have_text("Careful")
    expect(preset).to_have_attribute("aria-current", "true")
    driver.find("#reset").click()
    expect(driver.find("#field-temperature")).to_have_value("0.7")
    expect(preset).not_to_have_attribute("aria-current", "true")
    driver.page.reload()
    driver.ready()
    driver.find("#presets summary").click()
    preset.click()
    expect(driver.find("#field-temperature")).to_have_value("0.2")
    expect(driver.find("#field-max_tokens")).to_have_value("33")
    driver.write(BEGINNING)
    driver.continues()
    assert (driver.asked[-1]["temperature"], driver.asked[-1]["stop"]) == (0.2, ["."])
    driver.set(temperature=0.3)
    driver.find("#preset-name").fill("Careful")
    driver.find("#preset-save").click()
    expect(preset).to_have_count(1)
    driver.find("#reset").click()
    preset.click()
    expect(driver.find("#field-temperature"), "saved again under its name").to_have_value("0.3")
    driver.page.get_by_role("button", name="Delete the preset Careful").click()
    expect(preset).to_have_count(0)


def test_a_preset_is_not_changed_by_settings_that_follow(driver: PageDriver) -> None:
    driver.find("#presets summary").click()
    driver.find("#preset-name").fill("First")
    driver.press("Enter")
    driver.find("#preset-list .branch").click()
    driver.set(temperature=1.5)
    driver.find("#preset-list .branch").click()
    expect(driver.find("#field-temperature")).to_have_value("0.7")


def test_spell_check_can_be_switched_on(driver: PageDriver) -> None:
    checked = "(area) => area.spellcheck"
    assert driver.area.evaluate(checked) is False
    driver.find("#pane-settings > details > summary").click()
    driver.find("#spelling").check()
    assert driver.area.evaluate(checked) is True
    driver.page.reload()
    driver.ready()
    assert driver.area.evaluate(checked) is True


EDGES = """([line, from, to]) => {
  const range = new Range();
  const node = document.querySelectorAll("#mirror .line")[line].firstChild;
  range.setStart(node, from);
  range.setEnd(node, to);
  const { left, right } = range.getBoundingClientRect();
  const paper = document.querySelector("#mirror").getBoundingClientRect();
  return [left - paper.left, paper.right - right];
}"""


def test_lines_from_right_to_left_begin_at_the_right(driver: PageDriver) -> None:
    driver.write("שלום עולם\nHello\nمرحبا")
    for line, text in enumerate(driver.text.split("\n")):
        left, right = driver.page.evaluate(EDGES, [line, 0, len(text)])
        assert (left < 10) == (text == "Hello"), text
        assert (right < 10) == (text != "Hello"), text
    first, last = (driver.page.evaluate(EDGES, [0, at, at + 1])[1] for at in (0, 8))
    assert first < last, "the first letter is the rightmost"
    assert driver.area.evaluate("(area) => getComputedStyle(area).direction") == "rtl"


def test_a_click_in_a_line_from_right_to_left_sets_the_cursor_at_the_drawn_letter(driver: PageDriver) -> None:
    driver.write("Hello\nשלום עולם")
    box = driver.page.evaluate(
        """() => { const range = new Range(); const node = document.querySelectorAll("#mirror .line")[1].firstChild;
        range.setStart(node, 5); range.setEnd(node, 6);
        const { left, right, top, bottom } = range.getBoundingClientRect();
        return [(left + 3 * right) / 4, (top + bottom) / 2]; }"""
    )
    driver.page.mouse.click(*box)
    assert driver.area.evaluate("(area) => area.selectionStart") == len("Hello\n") + 5


def test_probabilities_below_a_half_have_different_colours(driver: PageDriver) -> None:
    shares = [0.99, 0.75, 0.5, 0.4, 0.2, 0.05, 0.02, 0.001]
    columns = {
        "tokens": [f" t{i}" for i in range(len(shares))],
        "token_logprobs": [math.log(share) for share in shares],
        "text_offset": [3 * i for i in range(len(shares))],
        "top_logprobs": None,
    }
    respond(driver, {"text": "".join(columns["tokens"] or []), "logprobs": columns, "finish_reason": "stop"})
    driver.write("Once")
    driver.area.focus()
    driver.press("Control+Enter")
    driver.ended()
    colours = driver.tokens.evaluate_all("(all) => all.map((node) => getComputedStyle(node).backgroundColor)")
    assert len(colours) == len(set(colours)) == len(shares)
