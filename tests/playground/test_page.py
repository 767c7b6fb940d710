"""The page itself: small, from one origin, usable by everyone, on any width, with any length of text."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import pytest
from playwright.sync_api import expect

from .page_driver import BEGINNING, PageDriver

MOST = 150_000  # bytes

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


def test_it_is_small_and_from_one_origin(visitor: PageDriver) -> None:
    expect(visitor.find("#context-text")).not_to_be_empty()
    assert 50_000 < visitor.weight <= MOST  # that requests stay on the origin is looked at on every visit


def test_the_policy_is_told_with_every_file_and_kept(open_server: Any) -> None:
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


def everything_open(visitor: PageDriver) -> None:
    visitor.write(BEGINNING)
    visitor.continues(max_tokens=40, seed=5)
    visitor.scores()
    visitor.set(n=2)
    visitor.find("#field-stop").fill("\\n")
    visitor.press("Enter")
    visitor.find("#field-logit_bias").fill(" cat")
    visitor.press("Enter")
    expect(visitor.find(".biases li")).to_be_visible()
    visitor.find("#pane-settings > details > summary").click()


def test_everything_that_can_be_used_has_a_name(visitor: PageDriver) -> None:
    everything_open(visitor)
    for tab in ("settings", "branches", "request", "sessions"):
        visitor.shows(tab)
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
            nameless = visitor.page.get_by_role(role, name=re.compile(r"^\s*$"))
            assert not nameless.evaluate_all("(all) => all.map((one) => one.outerHTML)"), (tab, role)
    ids = visitor.page.evaluate("() => [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))


def test_the_keyboard_goes_through_everything_in_the_order_of_the_page(visitor: PageDriver) -> None:
    visitor.find("#model").focus()
    seen = ["model"]
    for _ in range(120):
        visitor.press("Tab")
        here = visitor.page.evaluate("() => document.activeElement.id || document.activeElement.name || ''")
        at_end = visitor.page.evaluate("() => document.activeElement === document.body")
        if at_end or here in seen[:1]:
            break
        ring = visitor.page.evaluate(
            """() => { const at = document.activeElement; const style = getComputedStyle(at.type === "radio"
                ? at.nextElementSibling : at); return style.outlineStyle !== "none" || at.id === "area"; }"""
        )
        assert ring, f"{here} shows no focus"
        seen.append(here)
    wanted = ["model", "colour", "boundaries", "area", "field-max_tokens", "go"]
    places = [seen.index(name) for name in wanted]
    assert all(a < b for a, b in pairwise(places)), seen


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_stands_out(visit: Any, open_server: Any, dark: bool) -> None:
    visitor = visit(open_server.url, dark=dark).open()
    everything_open(visitor)
    for mode in ("off", "probability", "surprise"):
        visitor.find(f'#colour [value="{mode}"]').check(force=True)
        if mode != "off":
            visitor.hover(visitor.tokens.nth(6))
        found = visitor.page.evaluate(COLOURS)
        assert len(found) > 60
        weak = [(round(contrast(ink, ground), 2), text) for ink, ground, text in found if contrast(ink, ground) < 4.5]
        assert not weak, mode


def test_the_most_coloured_token_stands_out_too(visit: Any, open_server: Any) -> None:
    for dark in (False, True):
        visitor = visit(open_server.url, dark=dark).open()
        visitor.write("zq 日本 xkcd {}")
        visitor.scores()
        visitor.caret(0, 0)
        for author in ("you", "model"):
            visitor.tokens.evaluate_all(
                "(all, author) => all.forEach((e) => { e.className = `${author} token p10 s10`; })", author
            )
            for mode in ("probability", "surprise"):
                visitor.find(f'#colour [value="{mode}"]').check(force=True)
                found = [row for row in visitor.page.evaluate(COLOURS) if row[2] and row[2] in "zq日本xkcd{}"]
                assert found
                assert min(contrast(ink, ground) for ink, ground, _ in found) >= 4.5, (dark, author, mode)


def test_tabs_are_walked_with_the_arrows_and_dialogs_open_and_close(visitor: PageDriver) -> None:
    visitor.find("#tab-settings").focus()
    for name in ("branches", "request", "sessions", "settings"):
        visitor.press("ArrowRight")
        expect(visitor.find(f"#tab-{name}")).to_be_focused()
        expect(visitor.find(f"#pane-{name}")).to_be_visible()
    visitor.find("#help").click()
    expect(visitor.find("#help-dialog")).to_be_visible()
    visitor.press("Escape")
    expect(visitor.find("#help-dialog")).to_be_hidden()
    visitor.find("#panel-button").click()
    expect(visitor.find("#panel")).to_be_hidden()


def test_the_typeface_is_chosen_and_kept(visitor: PageDriver) -> None:
    visitor.find("#pane-settings > details > summary").click()
    visitor.find("#face").select_option("mono")
    visitor.page.reload()
    visitor.ready()
    families = "() => ['#area', '#mirror'].map((id) => getComputedStyle(document.querySelector(id)).fontFamily)"
    field, drawn = visitor.page.evaluate(families)
    assert field == drawn
    assert "mono" in field


def test_the_theme_can_be_switched(visitor: PageDriver) -> None:
    def ground() -> str:
        colour: str = visitor.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        return colour

    grounds = [ground()]
    for _ in range(2):
        visitor.find("#theme").click()
        grounds.append(ground())
    assert luminance(grounds[0]) == luminance(grounds[1]) > 0.8  # the system's, then light
    assert luminance(grounds[2]) < 0.05
    visitor.page.reload()
    visitor.ready()
    assert ground() == grounds[2]


@pytest.mark.parametrize("width", [360, 390, 820, 1440])
def test_it_fits_any_width(visit: Any, open_server: Any, width: int) -> None:
    visitor = visit(open_server.url, width=width, height=800).open()
    visitor.write(BEGINNING)
    visitor.continues(max_tokens=20, seed=1, n=1)
    if width < 1100:
        visitor.press("Escape")
        expect(visitor.find("#panel")).to_be_hidden()
    visitor.scores()
    sizes = visitor.page.evaluate(
        "() => [document.documentElement.scrollWidth, innerWidth, document.body.scrollHeight, innerHeight]"
    )
    assert sizes[0] <= sizes[1]
    assert sizes[2] <= sizes[3]
    for name in ("go", "insert", "score", "undo", "previous", "panel-button", "model"):
        box = visitor.find(f"#{name}").bounding_box()
        assert box is not None, name
        assert box["x"] >= 0, name
        assert box["x"] + box["width"] <= width, name
    page = visitor.find("#page").bounding_box()
    assert page is not None
    assert page["height"] > 320, "there is room to write"
    visitor.shows("settings")
    panel = visitor.find("#panel").bounding_box()
    assert panel is not None
    assert panel["x"] >= 0
    assert panel["x"] + panel["width"] <= width + 1


def test_a_finger_sees_alternatives_too(visit: Any, open_server: Any) -> None:
    visitor = visit(open_server.url, width=390, height=844, touch=True).open()
    visitor.write(BEGINNING)
    visitor.scores()
    box = visitor.tokens.nth(5).bounding_box()
    assert box is not None
    visitor.page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + 8)
    expect(visitor.find("#popover")).to_be_visible()


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
def test_what_is_drawn_breaks_its_lines_where_the_field_does(
    visit: Any, open_server: Any, width: int, face: str
) -> None:
    visitor = visit(open_server.url, width=width).open()
    visitor.page.evaluate("(face) => { document.body.dataset.face = face; }", face)
    for text in TEXTS:
        visitor.write(text)
        field, drawn = visitor.page.evaluate(HEIGHTS)
        lowest = visitor.page.evaluate("() => document.querySelector('#mirror').offsetHeight")
        assert abs(field - drawn) < 2 or (drawn == lowest and field <= drawn), text[:20]


def long_session(tokens: int) -> dict[str, Any]:
    """A document of so many tokens in lines of forty, each with its numbers."""
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


def test_a_long_document_costs_no_more_than_what_changes(visitor: PageDriver, tmp_path: Any) -> None:
    path = tmp_path / "long.json"
    path.write_text(json.dumps(long_session(8000)), encoding="utf-8")
    visitor.shows("sessions")
    visitor.find("#session-file").set_input_files(path)
    expect(visitor.find("#mirror .first")).to_have_count(8000)
    chunks = [
        {"choices": [{"index": 0, "text": f" t{i}", "finish_reason": "length" if i == 199 else None, "logprobs": {
            "tokens": [f" t{i}"], "token_logprobs": [-1.0], "text_offset": [0], "top_logprobs": [{f" t{i}": -1.0}]}}]}
        for i in range(200)
    ]  # fmt: skip
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    visitor.page.route("**/v1/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    visitor.page.route(
        "**/tokenize", lambda route: route.fulfill(json={"tokens": [], "count": 8000, "max_model_len": 9})
    )
    visitor.page.evaluate(
        """() => { window.made = 0; new MutationObserver((changes) => { for (const change of changes)
            window.made += change.addedNodes.length + change.removedNodes.length; })
            .observe(document.querySelector("#mirror"), { childList: true, subtree: true }); }"""
    )
    visitor.area.focus()
    visitor.press("Control+Enter")
    visitor.ended()
    assert visitor.find("#mirror .first").count() == 8200
    assert visitor.page.evaluate("() => window.made") <= 210
    visitor.caret(20_000)
    visitor.page.keyboard.type("t")  # from here on the new tokens' numbers are of another text, and look so
    visitor.page.evaluate("() => { window.made = 0; }")
    visitor.page.keyboard.type("yped")
    assert visitor.page.evaluate("() => window.made") <= 20
