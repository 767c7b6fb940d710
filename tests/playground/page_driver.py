"""A user of the page: actions, visible state, and the browser's requests and errors."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Locator, Page, Request, expect

BEGINNING = "Once upon a time there was a little girl named Lily."
ENDLESS = {"max_tokens": 1500, "ignore_eos": True}


class PageDriver:
    """One page. `problems`: console errors, exceptions and requests to other origins."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.problems: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.weight = 0
        page.on("console", lambda message: message.type == "error" and self.problems.append(message.text))
        page.on("pageerror", lambda error: self.problems.append(f"{error.message}\n{error.stack}"))
        page.on("request", self._requested)
        page.on("response", self._weigh)

    def _requested(self, request: Request) -> None:
        here = urlsplit(self.url).netloc
        if urlsplit(request.url).scheme not in ("blob", "data") and urlsplit(request.url).netloc != here:
            self.problems.append(f"left the origin: {request.url}")
        if request.url.endswith("/v1/completions"):
            self.asked.append(json.loads(request.post_data or "{}"))

    def _weigh(self, response: Any) -> None:
        self.weight += int(response.headers.get("content-length", 0))

    def open(self, suffix: str = "") -> PageDriver:
        self.page.goto(f"{self.url}/{suffix}")
        self.ready()
        return self

    def ready(self) -> None:
        expect(self.page.locator("body.ready")).to_be_visible()

    def find(self, selector: str) -> Locator:
        return self.page.locator(selector)

    @property
    def area(self) -> Locator:
        return self.find("#area")

    @property
    def text(self) -> str:
        return self.area.input_value()

    @property
    def mirrored(self) -> str:
        """The text of the coloured mirror behind the text field."""
        lines = "(root) => [...root.children].map((line) => line.textContent).join('\\n')"
        drawn: str = self.find("#mirror").evaluate(lines)
        return drawn

    @property
    def tokens(self) -> Locator:
        return self.find("#mirror .token")

    def expect_status(self, text: str) -> None:
        expect(self.find("#status")).to_contain_text(text)

    def press(self, keys: str) -> None:
        self.page.keyboard.press(keys)

    def write(self, text: str) -> None:
        """Replace the document, as if typed."""
        self.area.fill(text)

    def caret(self, at: int, end: int | None = None) -> None:
        self.area.focus()
        self.area.evaluate("(area, [at, end]) => area.setSelectionRange(at, end)", [at, at if end is None else end])

    def shows(self, tab: str) -> None:
        if not self.find("#panel").is_visible():
            self.find("#panel-button").click()
        self.find(f"#tab-{tab}").click()

    def set(self, **fields: Any) -> None:
        """Set fields of the request in the panel."""
        self.shows("settings")
        for details in self.find("#fields details").all():
            if details.get_attribute("open") is None:
                details.locator("summary").click()
        for name, value in fields.items():
            control = self.find(f"#field-{name}")
            control.set_checked(value) if isinstance(value, bool) else control.fill("" if value is None else str(value))

    def ended(self) -> None:
        self.expect_status("ended by")

    def continues(self, **fields: Any) -> str:
        """Continue the text. Returns the generated text."""
        if fields:
            self.set(**fields)
        before = self.text
        self.area.focus()
        self.press("Control+Enter")
        self.ended()
        assert self.text.startswith(before)
        return self.text[len(before) :]

    def begins_endless(self, text: str = BEGINNING) -> None:
        """Start a generation that runs until it is stopped, and wait for its first tokens."""
        self.write(text)
        self.set(**ENDLESS)
        self.area.focus()
        self.press("Control+Enter")
        expect(self.tokens.nth(30)).to_be_attached()

    def scores(self) -> None:
        self.find("#score").click()
        self.expect_status("Scored")

    def hover(self, token: Locator) -> Locator:
        """Move the pointer to a token and return its popover."""
        x, y = token.evaluate(
            "(node) => { const box = node.getClientRects()[0]; return [box.x + box.width / 2, box.y + 4] }"
        )
        self.page.mouse.move(x, y)
        popover = self.find("#popover")
        expect(popover).to_be_visible()
        return popover
