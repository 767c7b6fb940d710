"""The page: size, origin, accessibility, widths, and long documents."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import pytest
from playwright.sync_api import expect

from .page_driver import BEGINNING, PageDriver

MOST = 180_000  # bytes

COLOURS = """() => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const over = (below, colour) => {
    context.clearRect(0, 0, 1, 1);
    for (const fill of [below, colour]) { context.fillStyle = fill; context.fillRect(0, 0, 1, 1); }
    const [r, g, b] = context.getImageData(0, 0, 1, 1).data;
    return `rgb(${r}, ${g}, ${b})`;
  };
  const ground = (element) => {
    const above = element.parentElement ? ground(element.parentElement) : "white";
    return over(above, getComputedStyle(element).backgroundColor);
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility({ visibilityProperty: true, opacityProperty: true })) continue;
    if (element.closest(":disabled, [disabled], .hidden, option, textarea")) continue;
    const below = ground(element);
    found.push([over(below, getComputedStyle(element).color), below, element.textContent.slice(0, 30)]);
  }
  return found;
}"""


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_page_is_small_and_from_one_origin(driver: PageDriver) -> None:
    expect(driver.find("#context-text")).not_to_be_empty()
    assert 50_000 < driver.weight <= MOST  # the `visit` fixture checks the origin of requests in every test


def test_every_file_has_the_content_security_policy(open_server: Any) -> None:
    with open_server.http() as client:
        page = client.get("/")
        files = re.findall(r'(?:href|src)="(playground/[\w.]+)"', page.text)
        assert len(files) == 4
        for path in ("/", *files):
            response = client.get(path)
            assert response.headers["content-security-policy"].startswith("default-src 'self'; ")
            assert response.headers["content-type"].endswith("; charset=utf-8")
            again = client.get(path, headers={"If-None-Match": response.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
    assert not re.search(r"<script>|\son\w+=|\sstyle=|javascript:|https?://", page.text)


def everything_open(driver: PageDriver) -> None:
    driver.write(BEGINNING)
    driver.continues(max_tokens=40, seed=5)
    driver.scores()
    driver.set(n=2)
    driver.find("#field-stop").fill("\\n")
    driver.press("Enter")
    driver.find("#field-logit_bias").fill(" cat")
    driver.press("Enter")
    expect(driver.find(".biases li")).to_be_visible()
    driver.find("#pane-settings > details > summary").click()


def test_all_controls_have_accessible_names(driver: PageDriver) -> None:
    everything_open(driver)
    for tab in ("settings", "branches", "request", "sessions"):
        driver.shows(tab)
        for role in (
            "button",
            "textbox",
            "checkbox",
            "radio",
            "combobox",
            "slider",
            "spinbutton",
            "tab",
            "meter",
            "link",
        ):
            nameless = driver.page.get_by_role(role, name=re.compile(r"^\s*$"))
            assert not nameless.evaluate_all("(all) => all.map((one) => one.outerHTML)"), (tab, role)
    ids = driver.page.evaluate("() => [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))


def test_tab_moves_through_all_controls_in_page_order(driver: PageDriver) -> None:
    driver.find("#model").focus()
    seen = ["model"]
    for _ in range(120):
        driver.press("Tab")
        here = driver.page.evaluate("() => document.activeElement.id || document.activeElement.name || ''")
        at_end = driver.page.evaluate("() => document.activeElement === document.body")
        if at_end or here in seen[:1]:
            break
        ring = driver.page.evaluate(
            """() => { const at = document.activeElement; const style = getComputedStyle(at.type === "radio"
                ? at.nextElementSibling : at); return style.outlineStyle !== "none" || at.id === "area"; }"""
        )
        assert ring, f"{here} shows no focus"
        seen.append(here)
    wanted = ["model", "colour", "boundaries", "area", "field-max_tokens", "go"]
    places = [seen.index(name) for name in wanted]
    assert all(a < b for a, b in pairwise(places)), seen


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_texts_have_enough_contrast(visit: Any, open_server: Any, dark: bool) -> None:
    driver = visit(open_server.url, dark=dark).open()
    everything_open(driver)
    for mode in ("off", "probability", "surprise"):
        driver.find(f'#colour [value="{mode}"]').check(force=True)
        if mode != "off":
            driver.hover(driver.tokens.nth(6))
        found = driver.page.evaluate(COLOURS)
        assert len(found) > 60
        weak = [(round(contrast(ink, ground), 2), text) for ink, ground, text in found if contrast(ink, ground) < 4.5]
        assert not weak, mode


def test_the_most_coloured_token_has_enough_contrast(visit: Any, open_server: Any) -> None:
    for dark in (False, True):
        driver = visit(open_server.url, dark=dark).open()
        driver.write("zq 日本 xkcd {}")
        driver.scores()
        driver.caret(0, 0)
        for author in ("you", "model"):
            driver.tokens.evaluate_all(
                "(all, author) => all.forEach((e) => { e.className = `${author} token p10 s10`; })", author
            )
            for mode in ("probability", "surprise"):
                driver.find(f'#colour [value="{mode}"]').check(force=True)
                found = [row for row in driver.page.evaluate(COLOURS) if row[2] and row[2] in "zq日本xkcd{}"]
                assert found
                assert min(contrast(ink, ground) for ink, ground, _ in found) >= 4.5, (dark, author, mode)


def test_arrow_keys_select_tabs_and_dialogs_open_and_close(driver: PageDriver) -> None:
    driver.find("#tab-settings").focus()
    for name in ("branches", "request", "sessions", "settings"):
        driver.press("ArrowRight")
        expect(driver.find(f"#tab-{name}")).to_be_focused()
        expect(driver.find(f"#pane-{name}")).to_be_visible()
    driver.find("#help").click()
    expect(driver.find("#help-dialog")).to_be_visible()
    driver.press("Escape")
    expect(driver.find("#help-dialog")).to_be_hidden()
    driver.find("#panel-button").click()
    expect(driver.find("#panel")).to_be_hidden()


def test_the_typeface_is_kept_after_a_reload(driver: PageDriver) -> None:
    driver.find("#pane-settings > details > summary").click()
    driver.find("#face").select_option("mono")
    driver.page.reload()
    driver.ready()
    families = "() => ['#area', '#mirror'].map((id) => getComputedStyle(document.querySelector(id)).fontFamily)"
    field, drawn = driver.page.evaluate(families)
    assert field == drawn
    assert "mono" in field


def test_the_theme_can_be_switched(driver: PageDriver) -> None:
    def ground() -> str:
        colour: str = driver.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        return colour

    grounds = [ground()]
    for _ in range(2):
        driver.find("#theme").click()
        grounds.append(ground())
    assert luminance(grounds[0]) == luminance(grounds[1]) > 0.8  # the system's, then light
    assert luminance(grounds[2]) < 0.05
    driver.page.reload()
    driver.ready()
    assert ground() == grounds[2]


@pytest.mark.parametrize("width", [360, 390, 820, 1440])
def test_the_page_fits_any_width(visit: Any, open_server: Any, width: int) -> None:
    driver = visit(open_server.url, width=width, height=800).open()
    driver.write(BEGINNING)
    driver.continues(max_tokens=20, seed=1, n=1)
    if width < 1100:
        driver.press("Escape")
        expect(driver.find("#panel")).to_be_hidden()
    driver.scores()
    sizes = driver.page.evaluate(
        "() => [document.documentElement.scrollWidth, innerWidth, document.body.scrollHeight, innerHeight]"
    )
    assert sizes[0] <= sizes[1]
    assert sizes[2] <= sizes[3]
    for name in ("go", "insert", "score", "undo", "previous", "panel-button", "model"):
        box = driver.find(f"#{name}").bounding_box()
        assert box is not None, name
        assert box["x"] >= 0, name
        assert box["x"] + box["width"] <= width, name
    page = driver.find("#page").bounding_box()
    assert page is not None
    assert page["height"] > 320, "there is room to write"
    driver.shows("settings")
    panel = driver.find("#panel").bounding_box()
    assert panel is not None
    assert panel["x"] >= 0
    assert panel["x"] + panel["width"] <= width + 1


def test_a_tap_shows_alternatives(visit: Any, open_server: Any) -> None:
    driver = visit(open_server.url, width=390, height=844, touch=True).open()
    driver.write(BEGINNING)
    driver.scores()
    box = driver.tokens.nth(5).bounding_box()
    assert box is not None
    driver.page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + 8)
    expect(driver.find("#popover")).to_be_visible()


HEIGHTS = """() => {
  const area = document.querySelector("#area");
  area.style.height = "0";
  const found = [area.scrollHeight, document.querySelector("#mirror").scrollHeight];
  area.style.height = "";
  return found;
}"""
TEXTS = [
    "word " * 400,
    "a  b   c    d " * 120,
    "no_blank_at_all" * 80,
    "one\n\ntwo\n\tthree\n" * 30 + "\n\n",
    "日本語のテキスト、😀 and العربية mixed " * 40,
]


@pytest.mark.parametrize("face", ["serif", "sans", "mono"])
@pytest.mark.parametrize("width", [390, 1440])
def test_the_mirror_wraps_lines_like_the_text_field(visit: Any, open_server: Any, width: int, face: str) -> None:
    driver = visit(open_server.url, width=width).open()
    driver.page.evaluate("(face) => { document.body.dataset.face = face; }", face)
    for text in TEXTS:
        driver.write(text)
        field, drawn = driver.page.evaluate(HEIGHTS)
        lowest = driver.page.evaluate("() => document.querySelector('#mirror').offsetHeight")
        assert abs(field - drawn) < 2 or (drawn == lowest and field <= drawn), text[:20]


def long_session(tokens: int) -> dict[str, Any]:
    """A session with `tokens` scored tokens in lines of forty."""
    alternatives = [[f" w{i}", -1.0 - i] for i in range(5)]
    pieces = []
    for index in range(tokens):
        raw = "\n" if index % 40 == 39 else f" w{index % 7}"
        part = {"raw": raw, "logprob": -float(index % 9), "top": alternatives}
        token = {"parts": [part], "logprob": part["logprob"], "context": 0, "gap": 0}
        pieces.append({"text": raw, "by": "model", "token": token})
    node = {"id": 1, "parent": None, "last": None, "facts": {}, "pieces": [[0, tokens]]}
    tree = {"pieces": pieces, "nodes": [node]}
    return {"kind": "afterword session", "version": 1, "name": "long", "tree": tree, "current": 1, "settings": {}}


def test_an_edit_of_a_long_document_redraws_only_changed_tokens(driver: PageDriver, tmp_path: Any) -> None:
    path = tmp_path / "long.json"
    path.write_text(json.dumps(long_session(8000)), encoding="utf-8")
    driver.shows("sessions")
    driver.find("#session-file").set_input_files(path)
    expect(driver.find("#mirror .first")).to_have_count(8000)
    chunks = [
        {"choices": [{"index": 0, "text": f" t{i}", "finish_reason": "length" if i == 199 else None, "logprobs": {
            "tokens": [f" t{i}"], "token_logprobs": [-1.0], "text_offset": [0], "top_logprobs": [{f" t{i}": -1.0}]}}]}
        for i in range(200)
    ]  # fmt: skip
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    driver.page.route("**/v1/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    driver.page.route(
        "**/tokenize", lambda route: route.fulfill(json={"tokens": [], "count": 8000, "max_model_len": 9})
    )
    driver.page.evaluate(
        """() => { window.made = 0; new MutationObserver((changes) => { for (const change of changes)
            window.made += change.addedNodes.length + change.removedNodes.length; })
            .observe(document.querySelector("#mirror"), { childList: true, subtree: true }); }"""
    )
    driver.area.focus()
    driver.press("Control+Enter")
    driver.ended()
    assert driver.find("#mirror .first").count() == 8200
    assert driver.page.evaluate("() => window.made") <= 210
    driver.caret(20_000)
    driver.page.keyboard.type("t")  # makes the numbers of the following tokens stale
    driver.page.evaluate("() => { window.made = 0; }")
    driver.page.keyboard.type("yped")
    assert driver.page.evaluate("() => window.made") <= 20
